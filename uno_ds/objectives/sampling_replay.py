"""Replays recorded sampling through the functions that `scripts/sample.py` calls, and compares.

Shape suffixes: docs/notation.md.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import assert_never

import numpy as np
import torch
from PIL import Image

from uno_ds.generation.inference import CaptionSettings, caption_tokens, special_tokens
from uno_ds.model.codec import latents_to_rows
from uno_ds.objectives.golden import Comparison, errors
from uno_ds.objectives.sampling_case import (
    PictureRun,
    SamplingCase,
    TextRun,
    in_case,
    load_sampling_case,
)
from uno_ds.objectives.sampling_task import PictureTask, TextTask
from uno_ds.sequence.composition import ImageViews
from uno_ds.settings import SettingsError, build


def replay(path: Path, backend: str, tolerance: float) -> Iterator[Comparison]:
    """Repeats every run of a case, picture by picture and then in one batch where there are
    several, and yields a comparison for each recorded quantity. Tokens whose recorded margin is too
    small for `tolerance` to decide are noted, not counted."""
    case = load_sampling_case(path, backend)
    yield from _compare_texts(case)
    try:
        match case.task:
            case PictureTask():
                yield from _replay_pictures(case, case.task)
            case TextTask():
                yield from _replay_captions(case, tolerance)
            case _:
                assert_never(case.task)
    except SettingsError as error:
        raise in_case(path, error) from None


def _replay_pictures(case: SamplingCase, task: PictureTask) -> Iterator[Comparison]:
    sources: list[Image.Image | ImageViews] = []
    noise: list[torch.Tensor] = []
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number in range(len(case.texts)):
        size = case.size
        if task.has_sources:
            source, source_size = case.source(number)
            sources.append(source)
            size = size or source_size
        assert size is not None, "a case without sources has a size"
        noise.append(case.noise_GC(number, size))
        by_size[size].append(number)
    ways = {
        "one by one": [[number] for number in range(len(case.texts))],
        "together": [group for group in by_size.values() if len(group) > 1],
    }
    for run in case.picture_runs:
        for way, groups in ways.items():
            for group in groups:
                noise_BGC = torch.stack([noise[number] for number in group])
                yield from _replay_group(case, task, run, group, sources, noise_BGC, way)


def _replay_group(
    case: SamplingCase,
    task: PictureTask,
    run: PictureRun,
    group: Sequence[int],
    sources: Sequence[Image.Image | ImageViews],
    noise_BGC: torch.Tensor,
    way: str,
) -> Iterator[Comparison]:
    texts = [case.texts[picture] for picture in group]
    times: list[float] = []
    velocities: list[dict[str, torch.Tensor]] = []
    branches: list[int] = []

    def observe(
        _step: int, t: float, branch: dict[str, torch.Tensor], guided: torch.Tensor
    ) -> None:
        times.append(t)
        branches.append(len(branch))
        velocities.append(branch | {"guided": guided})

    with_source = group if task.has_sources else []
    own_sources = [sources[picture] for picture in with_source]
    task.draw(case.opened, own_sources, texts, run.settings, case.size, noise_BGC, observe)
    decoded = case.codec.decoded
    assert decoded is not None, "every picture is decoded"
    patch = case.opened.model.shape.latent_patch
    final_BGC = latents_to_rows(decoded, patch).view(noise_BGC.shape)

    for place, picture in enumerate(group):
        label = f"run {run.number}, picture {picture}, {way}"

        def compared(what: str, pairs: list, label: str = label) -> Comparison:
            return Comparison(f"{label}: {what}", *_largest(pairs), note=run.note)

        t = case.of_run(run.number, picture, "t")
        if t is not None:
            yield compared("noise levels", [(torch.tensor(times), t)])
        yield _equal(f"{label}: branches per step", branches, run.branches, run.note)
        pairs_of: dict[str, list[tuple[torch.Tensor | None, torch.Tensor]]] = defaultdict(list)
        for step, name in case.steps_of_run(run.number):
            recorded = case.of_run(run.number, picture, f"step{step}.{name}")
            ours = velocities[step].get(name) if step < len(velocities) else None
            if recorded is not None:
                pairs_of[name].append((None if ours is None else ours[place], recorded))
        for name, pairs in pairs_of.items():
            yield compared(f"velocity {name}", pairs)
        final = case.of_run(run.number, picture, "final")
        if final is None:
            case.tensor(f"run{run.number}.final", f"run{run.number}.picture{picture}.final")
        yield compared("final latents", [(final_BGC[place], final)])


def _replay_captions(case: SamplingCase, tolerance: float) -> Iterator[Comparison]:
    shown = sorted({run.picture for run in case.text_runs})
    sources = {number: case.source(number)[0] for number in shown}
    alike: dict[tuple, list[TextRun]] = defaultdict(list)
    for run in case.text_runs:
        alike[run.question, run.view, run.max_tokens].append(run)
    ways = {
        "one by one": [[run] for run in case.text_runs],
        "together": [runs for runs in alike.values() if len(runs) > 1],
    }
    for way, groups in ways.items():
        for group in groups:
            logits: list[list[np.ndarray]] = [[] for _ in group]

            def observe(_place: int, rows: dict[int, np.ndarray], logits: list = logits) -> None:
                for number, row in rows.items():
                    logits[number].append(row)

            texts = caption_tokens(
                case.opened.model,
                case.opened.codec,
                case.opened.tokenizer,
                [sources[run.picture] for run in group],
                build(CaptionSettings, {"max_tokens": group[0].max_tokens}),
                group[0].question,
                group[0].view,
                observe,
            )
            for run, ids, rows in zip(group, texts, logits, strict=True):
                yield from _compare_caption(case, run, way, ids, np.stack(rows), tolerance)


def _compare_caption(
    case: SamplingCase,
    run: TextRun,
    way: str,
    ids: list[int],
    logits_TV: np.ndarray,
    tolerance: float,
) -> Iterator[Comparison]:
    label = f"run {run.number}, picture {run.picture}, {way}"
    eos = case.opened.tokenizer.eos
    recorded = case.tensor(f"run{run.number}.tokens").tolist() + [eos] * run.ended
    recorded_TV = case.tensor(f"run{run.number}.logits")
    ours = [*ids, *[eos] * (len(logits_TV) > len(ids))]
    same = _equal_tokens(ours, recorded)
    # After the first token that differs the two texts are not comparable.
    count = min(same + 1, len(recorded_TV), len(logits_TV))
    pair = torch.from_numpy(logits_TV[:count]), recorded_TV[:count]
    yield Comparison(f"{label}: logits of the first {count} steps", *errors(*pair), note=run.note)
    note, margin = run.note, run.margin
    if ours != recorded and not note:
        if same < len(recorded_TV):
            likeliest = recorded_TV[same].topk(2).values
            margin = float(likeliest[0] - likeliest[1])
        # Two logits within the tolerance can swap order if they differ by less than twice the
        # allowed error.
        step = min(same, len(logits_TV) - 1)
        bound = 2 * tolerance * float(np.abs(logits_TV[step]).max())
        if margin < bound:
            note = (
                f"undecidable at token {same}: the recorded margin is {margin:.1e}, rounding "
                f"within the tolerance decides below {bound:.1e}"
            )
    yield _equal(f"{label}: tokens", ours, recorded, note)


def _equal_tokens(ours: Sequence, recorded: Sequence) -> int:
    """Number of equal tokens before the first that differs."""
    for place, (one, other) in enumerate(zip(ours, recorded, strict=False)):
        if one != other:
            return place
    return min(len(ours), len(recorded))


def _compare_texts(case: SamplingCase) -> Iterator[Comparison]:
    """Special tokens, and token ids of the texts, by the tokenizer of the model."""
    tokens = special_tokens(case.opened.tokenizer)
    ours = {
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "start_of_image": tokens.start_of_image,
        "end_of_image": tokens.end_of_image,
    }
    recorded = [case.special_tokens.get(name) for name in ours]
    yield _equal("special tokens", list(ours.values()), recorded)
    pairs = list(zip(case.texts, case.text_ids or [], strict=False))
    questions: dict[str, list[int]] = {}
    for run in case.text_runs:
        if run.question is not None and run.question_ids is not None:
            questions[run.question] = run.question_ids
    for text, ids in [*pairs, *questions.items()]:
        yield _equal(f"token ids of {text!r}", case.opened.tokenizer.encode(text), list(ids))


def _equal(quantity: str, ours: list, recorded: list, note: str = "") -> Comparison:
    """Of a quantity that has to be equal whatever the tolerance."""
    differing = sum(one != other for one, other in zip(ours, recorded, strict=False))
    differing += abs(len(ours) - len(recorded))
    return Comparison(quantity, float(differing), float("inf") if differing else 0.0, note)


def _largest(pairs: list[tuple[torch.Tensor | None, torch.Tensor]]) -> tuple[float, float]:
    """Largest (absolute, relative) error; infinite where we computed nothing."""
    infinite = (float("inf"), float("inf"))
    found = [infinite if ours is None else errors(ours, recorded) for ours, recorded in pairs]
    return max(absolute for absolute, _ in found), max(relative for _, relative in found)
