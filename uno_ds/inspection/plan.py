"""The work of an inspection: which pieces there are, and how each is computed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from uno_ds.data.samples import SampleMaker
from uno_ds.generation.inference import SampleSettings
from uno_ds.inspection.collection import Collector, Record
from uno_ds.inspection.diagnosis import Prompt, as_array, diagnose
from uno_ds.inspection.gradients import measure_gradients
from uno_ds.inspection.images import ImageSet, noised_segment, picture_of
from uno_ds.inspection.subject import Subject
from uno_ds.model.layer import Layer
from uno_ds.settings import build

PARTS = ("maps", "alignment", "probes", "reading", "gradients", "diagnosis")
OF_STATES = frozenset({"maps", "alignment", "probes", "reading"})
OF_FEATURES = frozenset({"alignment", "probes"})
ENCODER = "encoder"
FEATURES = "features"


@dataclass(frozen=True)
class Plan:
    """What is looked at. keys: a name for each checkpoint that is a folder name; shown: images with
    maps; gradient_images: of the batch whose gradients are taken; prompts: of the diagnosis, drawn
    by `drawing`, settings of the sampler."""

    keys: tuple[str, ...]
    parts: tuple[str, ...]
    levels: tuple[float, ...]
    layers: tuple[int, ...]
    images: int
    shown: int
    batch: int
    gradient_images: int
    most_tokens: int
    prompts: tuple[Prompt, ...]
    drawing: dict[str, Any]
    encoder: bool = False

    @property
    def chunks(self) -> list[range]:
        return _chunks(self.images, self.batch)

    @property
    def prompt_chunks(self) -> list[range]:
        return _chunks(len(self.prompts), self.batch)

    def states(self, key: str, level: float) -> list[str]:
        return [f"{key}/states_{level:g}_{chunk.start:06d}" for chunk in self.chunks]

    def captions(self, key: str, level: float) -> list[str]:
        return [f"{key}/captions_{level:g}_{chunk.start:06d}" for chunk in self.chunks]

    def features(self, key: str) -> list[str]:
        return [f"{key}/{FEATURES}_{chunk.start:06d}" for chunk in self.chunks]

    def gradients(self, key: str, level: float) -> str:
        return f"{key}/gradients_{level:g}"

    def diagnosis(self, key: str) -> list[str]:
        return [f"{key}/diagnosis_{chunk.start:06d}" for chunk in self.prompt_chunks]

    def pieces(self) -> list[tuple[str, str]]:
        """(checkpoint or ENCODER, name) of every piece of work."""
        found = []
        for key in self.keys:
            names: list[str] = []
            for level in self.levels:
                names += self.states(key, level) if OF_STATES & set(self.parts) else []
                names += self.captions(key, level) if "reading" in self.parts else []
                names += [self.gradients(key, level)] if "gradients" in self.parts else []
            names += self.features(key) if OF_FEATURES & set(self.parts) else []
            names += self.diagnosis(key) if "diagnosis" in self.parts else []
            found += [(key, name) for name in names]
        if self.encoder and OF_FEATURES & set(self.parts):
            found += [(ENCODER, name) for name in self.features(ENCODER)]
        return found


def work_of(
    plan: Plan, key: str, subject: Subject, images: ImageSet
) -> dict[str, Callable[[], Record]]:
    """What computes each piece of one checkpoint, by its name."""
    collector = Collector(subject, images, plan.layers, plan.shown)
    work: dict[str, Callable[[], Record]] = {}
    for level in plan.levels:
        for name, chunk in zip(plan.states(key, level), plan.chunks, strict=True):
            work[name] = _call(collector.states, chunk, level)
        for name, chunk in zip(plan.captions(key, level), plan.chunks, strict=True):
            work[name] = _call(collector.captions, chunk, level, plan.most_tokens)
        work[plan.gradients(key, level)] = _call(_gradients, collector, plan, level)
    for name, chunk in zip(plan.features(key), plan.chunks, strict=True):
        work[name] = _call(collector.features, chunk)
    for name, chunk in zip(plan.diagnosis(key), plan.prompt_chunks, strict=True):
        work[name] = _call(_diagnosis, subject, plan, chunk)
    return work


def pictures_of(
    images: ImageSet, numbers: Sequence[int], make_sample: SampleMaker
) -> Iterator[Image.Image]:
    """The clean images as the codec reads them."""
    for sample in images.samples(numbers, make_sample):
        yield picture_of(noised_segment(sample).image)


def _gradients(collector: Collector, plan: Plan, level: float) -> Record:
    """Of one batch at one noise level, without ranks: each rank takes pieces of its own."""
    subject = collector.subject
    samples = collector.samples(range(plan.gradient_images), level)
    batch = subject.collator()(samples).to(subject.device)
    objective = subject.objective
    tokens = [batch.loss_counts[name] for name in objective.losses]
    counts = torch.tensor(tokens, dtype=torch.float64)
    objective.set_trainable(everything=False)
    for layer in objective.model.layers:
        assert isinstance(layer, Layer)
        # A model on one device leaves little room for activations.
        layer.recompute = True
    try:
        report = measure_gradients(
            objective, [batch], counts.to(subject.device), windows=((0.0, 1.0),)
        )
    finally:
        objective.requires_grad_(False)
    return {}, report


def _diagnosis(subject: Subject, plan: Plan, chunk: range) -> Record:
    prompts = [plan.prompts[number] for number in chunk]
    drawing = dict(plan.drawing)
    drawing |= {"prompts": [p.text for p in prompts], "seed": drawing["seed"] + chunk.start}
    settings = build(SampleSettings, drawing)
    pictures, records = diagnose(subject, prompts, settings, plan.most_tokens)
    arrays: dict[str, np.ndarray] = {
        f"picture_{number}": as_array(picture)
        for number, picture in zip(chunk, pictures, strict=True)
    }
    return arrays, {"records": records}


def _call(function: Callable[..., Record], *arguments: Any) -> Callable[[], Record]:
    return lambda: function(*arguments)


def _chunks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
