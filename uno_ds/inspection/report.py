"""The report's sections: figures from the numbers, with what each shows and what it does not
prove."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from uno_ds.files_on_disk import replacing
from uno_ds.inspection import figures
from uno_ds.inspection.alignment import SPATIAL_MEASURES
from uno_ds.inspection.analysis import VIT, examples
from uno_ds.inspection.diagnosis import CELLS
from uno_ds.inspection.explanations import EXPLANATIONS
from uno_ds.inspection.figures import Curve
from uno_ds.inspection.maps import colours, fit_basis
from uno_ds.inspection.page import Section
from uno_ds.inspection.plan import ENCODER, Plan
from uno_ds.inspection.store import Store
from uno_ds.inspection.style import save

FIGURES, PICTURES = "figures", "pictures"
EXAMPLES_OF_A_CELL, EXAMPLES_OF_TEXTS = 3, 4
TARGET_NAMES = {VIT: "visual encoder", ENCODER: "other encoder"}
SPATIAL_NAMES = {
    "local_minus_distant": "similarity, near - far",
    "decay": "decay over distance",
    "contrast": "contrast of tokens",
    "region": "object, near -\nbackground, far",
}


def picture_path(key: str, number: int) -> str:
    """Where the picture of a prompt is, below the report's folder."""
    return f"{PICTURES}/{key}/{number:04d}.png"


def write_pictures(folder: Path, plan: Plan, store: Store) -> None:
    """The pictures of the diagnosis, for a judge."""
    for key in plan.keys:
        for number in range(len(plan.prompts)):
            name = plan.diagnosis(key)[number // plan.batch]
            picture = Image.fromarray(store.array(name, f"picture_{number}"))
            path = folder / picture_path(key, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                picture.save(partial, format="PNG")


class Report:
    """Makes figures in OUT/figures and the sections that hold them. pictures: the clean images that
    are shown."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        store: Store,
        results: dict[str, Any],
        pictures: Sequence[Image.Image],
        captions: Sequence[str],
    ):
        self.folder, self.plan, self.store, self.results = folder, plan, store, results
        self.pictures, self.captions = pictures, captions
        (folder / FIGURES).mkdir(exist_ok=True)

    def sections(self) -> list[Section]:
        makers: dict[str, Callable[[], Section]] = {
            "maps": self._maps,
            "alignment": self._alignment,
            "probes": self._probes,
            "reading": self._reading,
            "gradients": self._gradients,
            "diagnosis": self._diagnosis,
        }
        return [make() for part, make in makers.items() if part in self.plan.parts]

    def _save(self, name: str, figure: Any) -> str:
        file = f"{FIGURES}/{name}.png"
        save(figure, self.folder / file)
        return file

    def _maps(self) -> Section:
        plan = self.plan
        pictures: list[dict[str, list[list[np.ndarray]]]] = []
        for _ in range(plan.shown):
            pictures.append({key: _empty_lists(len(plan.levels)) for key in plan.keys})
        explained: dict[str, float] = {}
        for place, layer in enumerate(plan.layers):
            basis = fit_basis(functools.partial(self._tokens, place))
            explained[f"layer {layer}"] = basis.explained
            for number, key, row, tokens_TH, grid in self._states(place):
                shown = colours(tokens_TH, basis, grid).numpy()
                pictures[number][key][row].append(shown)
        made = []
        for number, models in enumerate(pictures):
            key = plan.keys[0]
            noised = [
                self.store.array(self._chunk_of(key, level, number), f"noised_{number}")
                for level in plan.levels
            ]
            figure = figures.maps(noised, models, plan.levels, plan.layers)
            caption = f"Image {number}: {self.captions[number]}"
            made.append((self._save(f"maps_{number}", figure), caption))
        self.results["maps"] = {"explained": explained}
        shares = [[layer, f"{100 * share:.0f} %"] for layer, share in explained.items()]
        return Section(
            "Maps",
            EXPLANATIONS["maps"],
            made,
            [("Variance within images that the three components have", ["", "share"], shares)],
        )

    def _states(self, place: int) -> Iterator[tuple[int, str, int, torch.Tensor, tuple[int, int]]]:
        """(image, model, number of the noise level, hidden states [T, H] after the layer at
        `place`, grid) of every map, one at a time."""
        for key in self.plan.keys:
            for row, level in enumerate(self.plan.levels):
                for number in range(self.plan.shown):
                    name = self._chunk_of(key, level, number)
                    tokens_TH = torch.from_numpy(self.store.array(name, f"tokens_{number}")[place])
                    rows, columns = self.store.values(name)["grids"][number % self.plan.batch]
                    yield number, key, row, tokens_TH, (rows, columns)

    def _tokens(self, place: int) -> Iterator[torch.Tensor]:
        for _, _, _, tokens_TH, _ in self._states(place):
            yield tokens_TH

    def _chunk_of(self, key: str, level: float, number: int) -> str:
        return self.plan.states(key, level)[number // self.plan.batch]

    def _alignment(self) -> Section:
        found = self.results["alignment"]
        made = []
        for target in (VIT, ENCODER):
            if target not in next(iter(found.values())):
                continue
            of_target = {key: values[target] for key, values in found.items()}
            rows = []
            for name, label in (("cknna", "CKNNA, k = 10"), ("cka", "linear CKA")):
                curves = {key: values[name] for key, values in of_target.items()}
                shuffled = {key: values[f"{name}_shuffled"] for key, values in of_target.items()}
                rows.append(Curve(label, curves, shuffled=shuffled))
            figure = figures.curves(rows, self.plan.levels, self.plan.layers)
            name = TARGET_NAMES[target]
            made.append(
                (
                    self._save(f"alignment_{target}", figure),
                    "Alignment of hidden states, averaged over each image, with the features that "
                    f"the {name} has of the clean image",
                )
            )
        reference = self.results["spatial_of_targets"][VIT]
        spatial = []
        for name in SPATIAL_MEASURES:
            grids = {key: values["spatial"][name] for key, values in found.items()}
            # What is in an image is known of scenes alone.
            if all(value is None for value in _cells(grids)):
                continue
            drawn = None
            if reference[name] is not None:
                drawn = ("visual encoder, clean image", reference[name])
            spatial.append(Curve(SPATIAL_NAMES[name], grids, reference=drawn))
        figure = figures.curves(spatial, self.plan.levels, self.plan.layers)
        made.append(
            (
                self._save("spatial", figure),
                "Spatial structure of the hidden states of single images (LDS, CDS, RMSC and, "
                "where objects are known, SRSS of iREPA)",
            )
        )
        return Section(
            "Alignment",
            EXPLANATIONS["alignment"],
            made,
        )

    def _probes(self) -> Section:
        found = self.results["probes"]
        names = list(dict.fromkeys(chain.from_iterable(found.values())))
        rows, chances = [], []
        for name in names:
            have = {key: values[name] for key, values in found.items() if name in values}
            parts = {
                part: {key: _pick(grid, part) for key, grid in have.items()}
                for part in ("score", "low", "high", "shuffled")
            }
            first = next(filter(None, _cells(have)))
            regression = name in TARGET_NAMES
            label = f"{TARGET_NAMES[name]}\nR²" if regression else f"{name}\naccuracy"
            rows.append(
                Curve(
                    label,
                    parts["score"],
                    parts["low"],
                    parts["high"],
                    chance=first["chance"],
                    shuffled=parts["shuffled"],
                )
            )
            chances.append(
                [
                    TARGET_NAMES.get(name, name),
                    str(first["images"]),
                    f"{first['chance']:.2f}",
                    f"{float(np.nanmean(_all(parts['shuffled']))):.2f}",
                ]
            )
        made = []
        if rows:
            figure = figures.curves(rows, self.plan.levels, self.plan.layers)
            made.append((self._save("probes", figure), "Cross-validated probes, 95 % intervals"))
        return Section(
            "Probes",
            EXPLANATIONS["probes"]
            + ([] if rows else ["There were too few images, or nothing that is known about them."]),
            made,
            [("Chance", ["", "images", "chance", "shuffled, mean"], chances)] if rows else (),
        )

    def _reading(self) -> Section:
        found, plan = self.results["reading"], self.plan
        made = [
            (
                self._save("reading", figures.reading(found, plan.levels)),
                "What the understanding expert reads from noised latents",
            )
        ]
        for key, values in found.items():
            if "cosine_of_shown" not in values["levels"][0]:
                continue
            made += self._metaqueries(key, values["levels"])
        rows = []
        for number, key in product(range(min(EXAMPLES_OF_TEXTS, plan.images)), found):
            texts = [entry["texts"][number] for entry in found[key]["levels"]]
            rows.append([self.captions[number], key, *texts])
        levels = [f"t = {level:g}" for level in plan.levels]
        return Section(
            "Reading",
            EXPLANATIONS["reading"],
            made,
            [("Captions that were read", ["caption of the image", "model", *levels], rows)],
        )

    def _metaqueries(self, key: str, levels: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
        """A figure for each grid of a model's metaqueries."""
        grids = levels[0]["metaquery_grids"]
        ends = np.cumsum([side**2 for side in grids])
        by_level = []
        for entry in levels:
            every = np.array([*entry["cosine_of_shown"], entry["cosine_of_cells"]])
            by_level.append(np.split(every, ends[:-1], axis=1))
        shown = [np.asarray(picture) for picture in self.pictures]
        made = []
        for number, side in enumerate(grids):
            cosines = [of_grids[number].reshape(-1, side, side) for of_grids in by_level]
            figure = figures.metaqueries(shown, cosines, self.plan.levels)
            several = len(grids) > 1
            name = f"metaqueries_{key}_{side}" if several else f"metaqueries_{key}"
            title = f"Metaqueries of {key} against their targets"
            made.append((self._save(name, figure), title + f", {side} x {side}" * several))
        return made

    def _gradients(self) -> Section:
        found, levels = self.results["gradients"], self.plan.levels
        made = [
            (
                self._save("gradients", figures.gradients(found, levels)),
                "Gradients of each weighted loss at all trained weights",
            )
        ]
        layers = figures.gradient_layers(found, levels)
        if layers is not None:
            made.append(
                (
                    self._save("gradients_layers", layers),
                    "Cosines between the gradients of two losses, by part of the model",
                )
            )
        rows = []
        for key, level in product(found, levels):
            for part, products in _latents(found[key][f"{level:g}"]).items():
                cells = [_listed(products[name]) for name in ("norm", "share", "cosine")]
                rows.append([key, f"{level:g}", part, *cells])
        return Section(
            "Gradients",
            EXPLANATIONS["gradients"],
            made,
            [
                (
                    "At the noised latents, after each of some layers",
                    ["model", "t", "after", "norm", "share", "cosine"],
                    rows,
                )
            ],
        )

    def _diagnosis(self) -> Section:
        found = self.results["diagnosis"]
        pictures: dict[str, dict[str, list[tuple[np.ndarray, str, str]]]] = {}
        for key, values in found.items():
            pictures[key] = {
                cell: [self._drawn(key, values["records"], number) for number in numbers]
                for cell, numbers in examples(values["records"], EXAMPLES_OF_A_CELL).items()
            }
        figure = figures.diagnosis(found, pictures)
        rows = []
        for key, values in found.items():
            counts = [str(values["cells"][", ".join(cell)]) for cell in CELLS]
            rows.append([key, *counts, str(values["not_judged"])])
        facets: list[list[str]] = []
        names: list[str] = []
        for key, values in found.items():
            for side, shares in values["facets"].items():
                names = names or list(shares)
                facets.append([key, side, *(f"{share:.2f}" for share in shares.values())])
        tables: list[Any] = [
            ("Pictures in each cell", ["model", *map(", ".join, CELLS), "not judged"], rows)
        ]
        if facets:
            tables.append(
                ("Right by program, share of the pictures", ["model", "", *names], facets)
            )
        judge = self.results.get("judge")
        by = []
        if judge is not None:
            causes = ", ".join(f"{cause} {count}" for cause, count in judge["failures"].items())
            without = f"; without a usable answer: {causes}" if causes else ""
            by = [f"Judged by {judge['name']} at {judge['endpoint']}{without}."]
        return Section(
            "Diagnosis",
            [*EXPLANATIONS["diagnosis"], *by],
            [(self._save("diagnosis", figure), "Examples of each cell")],
            tables,
        )

    def _drawn(
        self, key: str, records: Sequence[dict[str, Any]], number: int
    ) -> tuple[np.ndarray, str, str]:
        name = self.plan.diagnosis(key)[number // self.plan.batch]
        picture = self.store.array(name, f"picture_{number}")
        return picture, records[number]["prompt"], records[number]["caption"]


def _latents(report: dict[str, Any]) -> dict[str, Any]:
    """{layer: products} of a report with one window."""
    return {layer: next(iter(windows.values())) for layer, windows in report["latents"].items()}


def _pick(grid: Sequence[Sequence[Any]], part: str) -> list[list[float | None]]:
    return [[probe[part] if probe else None for probe in across] for across in grid]


def _empty_lists(count: int) -> list[list[Any]]:
    return [[] for _ in range(count)]


def _cells(grids: Mapping[str, Sequence[Sequence[Any]]]) -> Iterator[Any]:
    """Of all models and layers, at each noise level."""
    return chain.from_iterable(chain.from_iterable(grids.values()))


def _all(values: dict[str, list[list[float | None]]]) -> list[float]:
    return [np.nan if value is None else value for value in _cells(values)]


def _listed(values: dict[str, float | None]) -> str:
    shown = {name: "-" if value is None else f"{value:.3g}" for name, value in values.items()}
    return ", ".join(f"{name.replace('_', '/')} {value}" for name, value in shown.items())
