"""From what was collected to the numbers of the report.

Shape suffixes: docs/notation.md."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from uno_ds.inspection.alignment import NEIGHBOURS, SPATIAL_MEASURES, cknna, linear_cka
from uno_ds.inspection.diagnosis import CELLS, Verdict, cell_of, table
from uno_ds.inspection.plan import ENCODER, Plan
from uno_ds.inspection.probes import classify, regress
from uno_ds.inspection.reading import right_shares
from uno_ds.inspection.store import Store

VIT = "vit"
Tick = Callable[[], object]


def results_of(
    plan: Plan,
    store: Store,
    scenes: Sequence[Any],
    tick: Tick = lambda: None,
    verdicts: Mapping[str, Sequence[Verdict]] | None = None,
) -> dict[str, Any]:
    """Every number of the report, by part and checkpoint. `scenes`: the ground truth of each image,
    None where there is none; `tick` is called after each (checkpoint, noise level); `verdicts`:
    what a judge model says of the pictures of each checkpoint, if there is one."""
    makers = {
        "alignment": lambda key: _alignment(plan, store, key, tick),
        "probes": lambda key: _probes(plan, store, key, scenes, tick),
        "reading": lambda key: _reading(plan, store, key, scenes),
        "gradients": lambda key: {
            f"{level:g}": store.values(plan.gradients(key, level)) for level in plan.levels
        },
        "diagnosis": lambda key: _diagnosis(plan, store, key, (verdicts or {}).get(key)),
    }
    results: dict[str, Any] = {}
    for part, make in makers.items():
        if part in plan.parts:
            results[part] = {key: make(key) for key in plan.keys}
    if "alignment" in plan.parts:
        results["spatial_of_targets"] = {
            target: _means(_joined(store, plan.features(key), "spatial"))
            for target, key in _targets(plan, plan.keys[0]).items()
        }
    return _without_nan(results)


def ticks_of(plan: Plan) -> int:
    """Calls of `tick` that `results_of` makes."""
    parts = sum(part in plan.parts for part in ("alignment", "probes"))
    return parts * len(plan.keys) * len(plan.levels)


def pooled(plan: Plan, store: Store, key: str, level: float, place: int) -> np.ndarray:
    """[N, 4, H]: hidden states after the layer at `place` of the plan's, averaged over quarters of
    each image."""
    return np.concatenate(
        [store.of_layer(name, "pooled", place) for name in plan.states(key, level)]
    )


def attributes(scene: Any) -> dict[str, str]:
    """What a probe can be asked about a scene: shape and colour where all its objects share it,
    count, and the place of a single object or the relation of a pair."""
    if scene is None:
        return {}
    things = scene["objects"]
    found = {"count": str(len(things))}
    for name in ("shape", "colour"):
        values = {thing[name] for thing in things}
        if len(values) == 1:
            found[name] = values.pop()
    for name in ("place", "relation"):
        if scene[name] is not None:
            found[name] = scene[name]
    return found


def _targets(plan: Plan, key: str) -> dict[str, str]:
    """{what is compared with: under which key its features are}."""
    return {VIT: key} | ({ENCODER: ENCODER} if plan.encoder else {})


def _alignment(plan: Plan, store: Store, key: str, tick: Tick) -> dict[str, Any]:
    """{target: {measure: [layer][level]}} of CKNNA and CKA, with the same of images that were
    shuffled, and under "spatial" {measure: [layer][level]}."""
    targets = {
        name: torch.from_numpy(_joined(store, plan.features(source), "pooled"))
        for name, source in _targets(plan, key).items()
    }
    shuffled = torch.randperm(plan.images, generator=torch.Generator().manual_seed(0))
    names = ("cknna", "cka", "cknna_shuffled", "cka_shuffled")
    found: dict[str, Any] = {target: {name: _grid(plan) for name in names} for target in targets}
    spatial: dict[str, Any] = {name: _grid(plan) for name in SPATIAL_MEASURES}
    for number, level in enumerate(plan.levels):
        per_image = _joined(store, plan.states(key, level), "spatial")
        for place in range(len(plan.layers)):
            x_BW = torch.from_numpy(pooled(plan, store, key, level, place).mean(axis=1))
            for target, y_BW in targets.items():
                values = found[target]
                values["cknna"][place][number] = cknna(x_BW, y_BW)
                values["cka"][place][number] = linear_cka(x_BW, y_BW)
                values["cknna_shuffled"][place][number] = cknna(x_BW, y_BW[shuffled])
                values["cka_shuffled"][place][number] = linear_cka(x_BW, y_BW[shuffled])
            for name, value in _means(per_image[:, place]).items():
                spatial[name][place][number] = value
        tick()
    return found | {"spatial": spatial, "neighbours": NEIGHBOURS}


def _probes(
    plan: Plan, store: Store, key: str, scenes: Sequence[Any], tick: Tick
) -> dict[str, Any]:
    """{what is probed: [layer][level] probe}; what cannot be probed for want of images is left
    out. Shuffled labels are probed for the first model."""
    known = [attributes(scene) for scene in scenes]
    present: set[str] = set().union(*known)
    names = [name for name in ("shape", "colour", "count", "place", "relation") if name in present]
    targets = {
        name: _joined(store, plan.features(source), "pooled")
        for name, source in _targets(plan, key).items()
    }
    found: dict[str, Any] = {name: _grid(plan) for name in [*names, *targets]}
    # What shuffled labels give hardly depends on the model.
    shuffled = key == plan.keys[0]
    for number, level in enumerate(plan.levels):
        for place in range(len(plan.layers)):
            x_BW = pooled(plan, store, key, level, place).reshape(plan.images, -1)
            for name in names:
                labels = [of_image.get(name) for of_image in known]
                probe = classify(x_BW, labels, shuffled=shuffled)
                found[name][place][number] = probe.plain() if probe else None
            for target, y_BW in targets.items():
                fitted = regress(x_BW, y_BW, shuffled=shuffled)
                found[target][place][number] = fitted.plain() if fitted else None
        tick()
    return {name: grid for name, grid in found.items() if any(map(any, grid))}


def _reading(plan: Plan, store: Store, key: str, scenes: Sequence[Any]) -> dict[str, Any]:
    """By noise level: cross entropy of the caption per token with its 95 % interval over images,
    share of read captions that are right by program, mean cosine at the metaqueries, the texts, and
    the flow loss."""
    levels = []
    for level in plan.levels:
        sums = _joined(store, plan.states(key, level), "caption")
        texts = store.joined(plan.captions(key, level), "texts")
        entry: dict[str, Any] = {
            "t": level,
            "cross_entropy": _ratio_with_interval(sums),
            "right": right_shares(texts, scenes),
            "texts": texts,
            "flow": _flow(plan, store, key, level),
        }
        if "cosine" in store.keys(plan.states(key, level)[0]):
            cosine = _joined(store, plan.states(key, level), "cosine")
            entry["cosine"] = float(cosine.mean())
            record = store.values(plan.states(key, level)[0])
            # Work of earlier versions is of one grid.
            entry["metaquery_grids"] = record.get("metaquery_grids", [math.isqrt(cosine.shape[1])])
            entry["cosine_of_cells"] = cosine.mean(axis=0).tolist()
            entry["cosine_of_shown"] = cosine[: plan.shown].tolist()
        levels.append(entry)
    return {"levels": levels}


def _flow(plan: Plan, store: Store, key: str, level: float) -> float:
    values = [store.values(name) for name in plan.states(key, level)]
    rows = sum(value["counts"]["flow"] for value in values)
    return sum(value["sums"]["flow"] for value in values) / rows


def _diagnosis(
    plan: Plan, store: Store, key: str, verdicts: Sequence[Verdict] | None
) -> dict[str, Any]:
    records = store.joined(plan.diagnosis(key), "records")
    cells = [
        cell_of(record, prompt.verdict(key), verdicts[number] if verdicts else None)
        for number, (record, prompt) in enumerate(zip(records, plan.prompts, strict=True))
    ]
    for record, verdict in zip(records, verdicts or ()):
        record["judge"] = dataclasses.asdict(verdict)
    for record, cell in zip(records, cells, strict=True):
        record["cell"] = ", ".join(cell) if cell else None
    facets: dict[str, Any] = {}
    judged = [record for record in records if "drawn" in record]
    for side in ("drawn", "read") if judged else ():
        facets[side] = {}
        for facet in judged[0][side]:
            right = sum(record[side][facet] for record in judged)
            facets[side][facet] = right / len(judged)
    return table(cells) | {"facets": facets, "records": records}


def examples(records: Sequence[dict[str, Any]], most: int) -> dict[str, list[int]]:
    """Numbers of the first pictures of each cell."""
    found: dict[str, list[int]] = {", ".join(cell): [] for cell in CELLS}
    for number, record in enumerate(records):
        of_cell = found.get(record["cell"])
        if of_cell is not None and len(of_cell) < most:
            of_cell.append(number)
    return found


def _ratio_with_interval(sums_B2: np.ndarray) -> dict[str, float] | None:
    """Sum over sum of the columns, and its 95 % interval over resampled images."""
    if not len(sums_B2) or not sums_B2[:, 1].sum():
        return None
    chosen = np.random.default_rng(0).integers(len(sums_B2), size=(1000, len(sums_B2)))
    resampled = sums_B2[chosen].sum(axis=1)
    low, high = np.quantile(resampled[:, 0] / resampled[:, 1].clip(min=1), [0.025, 0.975])
    mean = sums_B2[:, 0].sum() / sums_B2[:, 1].sum()
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def _means(spatial_B4: np.ndarray) -> dict[str, float]:
    """Mean of each spatial measure over the images that have it."""
    means = {}
    for column, name in enumerate(SPATIAL_MEASURES):
        values = spatial_B4[:, column]
        known = values[~np.isnan(values)]
        means[name] = float(known.mean()) if len(known) else math.nan
    return means


def _joined(store: Store, names: Sequence[str], key: str) -> np.ndarray:
    return np.concatenate([store.array(name, key) for name in names])


def _grid(plan: Plan) -> list[list[Any]]:
    return [[None] * len(plan.levels) for _ in plan.layers]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
