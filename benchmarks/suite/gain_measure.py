"""Measures one model of an experiment: scenes that are right, and losses of held-out scenes.

Prompts, noise and held-out scenes are fixed and the same for all models. Their contents are those
that no scene of the training data has."""

import base64
import dataclasses
import hashlib
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.suite.gain_experiment import SPLITS, Experiment, identity
from benchmarks.suite.models import DTYPES
from uno_ds.data.layouts.text_to_image import TextToImage
from uno_ds.data.samples import SampleMaker
from uno_ds.data.scene_drawing import Scene, draw
from uno_ds.data.scene_language import captions
from uno_ds.data.scene_reading import score_text
from uno_ds.data.scene_score import score
from uno_ds.data.scenes import content_of, prompts
from uno_ds.generation.inference import (
    CaptionSettings,
    caption,
    caption_noised,
    generate,
    special_tokens,
)
from uno_ds.generation.inference_model import OpenModel, assemble, open_model
from uno_ds.generation.sampler import noise_of_seeds
from uno_ds.inspection.alignment import NEIGHBOURS, cknna
from uno_ds.inspection.collection import visual_features
from uno_ds.inspection.hidden_states import ImageMeans, evenly_spaced
from uno_ds.inspection.images import noised_segment
from uno_ds.inspection.subject import Subject, subject_of
from uno_ds.objectives.uno import LOSSES, ObjectiveSettings
from uno_ds.recipe import Recipe
from uno_ds.sequence.composition import SampleComposer
from uno_ds.sequence.segments import Sample
from uno_ds.settings import to_plain
from uno_ds.training.checkpoint_file import is_checkpoint
from uno_ds.training.export import TrainedModel
from uno_ds.training.held_out import at_level, loss_totals, packed

# Longer than the longest caption of a scene.
CAPTION_TOKENS = 48
# Bytes.
ENDS = 1 << 20
# Pictures that are kept of a last point, for the page.
KEPT_PICTURES = 24
# At most so many layers are compared with the visual encoder.
ALIGNED_LAYERS = 4


class Measurement:
    """Of models that the recipe can open. `recipe`: sizes of images, sampler, precision."""

    def __init__(self, experiment: Experiment, recipe: Recipe):
        self.experiment, self.recipe = experiment, recipe
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if cuda else torch.device("cpu")

    def __call__(self, model: Path, split: str, count: int, is_last: bool) -> dict[str, Any]:
        """`model`: a base folder or a checkpoint. `count`: prompts. `is_last`: also the losses of
        held-out scenes, and what the understanding expert reads from noised latents."""
        started = time.monotonic()
        opened = self._open(model)
        asked = self._prompts(split, count)
        pictures = self._draw(opened, [prompt for prompt, _ in asked], SPLITS[split][2])
        rows = []
        for (_, scene), picture in zip(asked, pictures, strict=True):
            right = {aspect: int(holds) for aspect, holds in score(picture, scene).items()}
            rows.append({"content": content_of(scene), "kind": scene["kind"], "right": right})
        found: dict[str, Any] = {"split": split, "prompts": count, "rows": rows}
        found["drawing_seconds"] = time.monotonic() - started
        if is_last:
            found["pictures"] = [_encoded(picture) for picture in pictures[:KEPT_PICTURES]]
            found["texts"] = [prompt for prompt, _ in asked[:KEPT_PICTURES]]
            found["losses"], found["alignment"] = self._losses_and_alignment(opened, split)
            found["captions_right"] = self._captions_right(opened, split)
        found["seconds"] = time.monotonic() - started
        return found

    def identity(self) -> str:
        """Of everything that decides the numbers, and of the base, but for what an arm learns."""
        recipe = self.recipe
        assert recipe.base is not None, "an experiment's recipe has one"
        sampler = dataclasses.replace(recipe.samples, prompts=[])
        parts = [sampler, recipe.data.scenes, recipe.data.latent_image]
        known = [self.experiment.measured_by(), *map(to_plain, parts)]
        return identity([*known, _fingerprint(recipe.base)])

    def _open(self, path: Path) -> OpenModel:
        recipe = self.recipe
        dtype = DTYPES[recipe.engine.resolved_precision()]
        attention = recipe.kernels.resolved(recipe.kernel_demands).attention
        if not is_checkpoint(path):
            return open_model(path, self.device, dtype, attention)
        trained = TrainedModel(path, average=None)
        return assemble(
            trained.shape,
            trained.read,
            trained.base,
            trained.tokenizer,
            self.device,
            dtype,
            attention,
        )

    def _prompts(self, split: str, count: int) -> list[tuple[str, Scene]]:
        scenes = self.recipe.data.scenes
        part = self.experiment.part(split, scenes.held_out)
        return prompts(self.experiment.drawn_from(scenes), count, SPLITS[split][2], part)

    def _draw(self, opened: OpenModel, texts: Sequence[str], seed: int) -> list[Image.Image]:
        """A picture of each prompt, with the noise of its place."""
        settings = self.recipe.samples
        stride = opened.model.shape.geometry.latent_stride
        shape = (
            (settings.height // stride) * (settings.width // stride),
            opened.model.shape.latent_values,
        )
        pictures: list[Image.Image] = []
        for start in range(0, len(texts), self.experiment.batch):
            part = list(texts[start : start + self.experiment.batch])
            seeds = [seed * 10**6 + start + place for place in range(len(part))]
            drawn = dataclasses.replace(settings, prompts=part)
            parts = (opened.model, opened.codec, opened.tokenizer)
            pictures += generate(*parts, drawn, None, noise_of_seeds(seeds, shape))
        return pictures

    def held_out_samples(self, opened: OpenModel, split: str) -> list[Sample]:
        """The held-out scenes with prompt and caption, each with the noise of its place."""
        return self._held_out(self._sample_maker(opened, metaqueries=0), split)

    def _held_out(self, make_sample: SampleMaker, split: str) -> list[Sample]:
        samples = []
        for place, (_, scene) in enumerate(self._prompts(split, self.experiment.rows)):
            rng = np.random.default_rng([SPLITS[split][2], place])
            picture = draw(scene, self.recipe.data.scenes.size)
            example = TextToImage(str(place), picture, list(captions(scene)))
            samples.append(make_sample(example, rng))
        return samples

    def _sample_maker(self, opened: OpenModel, metaqueries: int) -> SampleMaker:
        recipe = self.recipe
        whole = dataclasses.replace(
            recipe.sequence,
            drop_text=0.0,
            supervised_fraction=1.0,
            supervision_window=[0.0, 1.0],
            metaquery_grid=metaqueries,
        )
        tokens = special_tokens(opened.tokenizer)
        geometry = opened.model.shape.geometry
        composer = SampleComposer(whole, geometry, tokens, captions=True, metaqueries=True)
        data = recipe.data
        return SampleMaker(
            composer,
            opened.tokenizer,
            data.latent_image,
            data.vit_image,
            recipe.sequence.token_budget,
        )

    def _losses_and_alignment(
        self, opened: OpenModel, split: str
    ) -> tuple[dict[str, float], dict[str, float]]:
        """({"LOSS/t=T": mean over its tokens}, of flow and caption; {"layer N/t=T": CKNNA}, of the
        generation expert's hidden states after a layer with the features of the model's own visual
        encoder of the clean image, both averaged over the image)."""
        subject = subject_of(opened, {}, ObjectiveSettings(caption_weight=1.0))
        collate = subject.collator()
        samples = self.held_out_samples(opened, split)
        features_BW = self._visual_features(subject, opened, split)
        layers = evenly_spaced(len(opened.model.layers), ALIGNED_LAYERS)
        rows, columns = noised_segment(samples[0]).grid
        losses, alignment = {}, {}
        for t in self.experiment.times:
            at_t = [at_level(sample, t) for sample in samples]
            packs = packed(at_t, self.recipe.sequence.token_budget)
            # All scenes have one size.
            with ImageMeans(subject.objective, layers, rows * columns) as means:
                totals = loss_totals(subject.objective, collate, packs, self.device)
            sums, counts = totals.tolist()
            for name in ("flow", "caption"):
                place = LOSSES.index(name)
                losses[f"{name}/t={t:g}"] = sums[place] / counts[place]
            for layer in layers if len(samples) > NEIGHBOURS else []:
                value = cknna(means.of(layer), features_BW)
                if not math.isnan(value):
                    alignment[f"layer {layer}/t={t:g}"] = value
        return losses, alignment

    def _visual_features(self, subject: Subject, opened: OpenModel, split: str) -> torch.Tensor:
        """[B, W]: of the held-out scenes, averaged over an image."""
        # One metaquery brings the pixels as the visual encoder reads them.
        make_sample = self._sample_maker(opened, metaqueries=1)
        features, _ = visual_features(subject, make_sample, self._held_out(make_sample, split))
        return torch.stack([tokens_TW.mean(dim=0) for tokens_TW in features])

    def _captions_right(self, opened: OpenModel, split: str) -> dict[str, dict[str, float]]:
        """{what is read: {kind: share of wholly right captions}}: clean latents, the visual
        encoder's view, and latents noised to each level."""
        asked = self._prompts(split, self.experiment.rows)
        scenes = [scene for _, scene in asked]
        pictures = [draw(scene, self.recipe.data.scenes.size) for scene in scenes]
        settings = CaptionSettings(max_tokens=CAPTION_TOKENS)
        parts = (opened.model, opened.codec, opened.tokenizer)
        found = {}
        for view in ("latents", "vit"):
            texts = caption(*parts, pictures, settings, None, view)
            found[view] = _right_by_kind(texts, scenes)
        for t in self.experiment.times:
            texts = caption_noised(*parts, pictures, settings, t)
            found[f"noised, t={t:g}"] = _right_by_kind(texts, scenes)
        return found


def _fingerprint(base: Path) -> list[Any]:
    """Name, size, and a digest of both ends of each file of weights: large ones are not read."""
    found = []
    for path in sorted(base.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(ENDS)
            stream.seek(max(0, size - ENDS))
            end = stream.read(ENDS)
        found.append([path.name, size, hashlib.sha256(start + end).hexdigest()])
    return found


def _encoded(picture: Image.Image) -> str:
    """PNG in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _right_by_kind(texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    judged: dict[str, list[bool]] = {}
    for text, scene in zip(texts, scenes, strict=True):
        judged.setdefault(scene["kind"], []).append(score_text(text, scene)["all"])
    return {kind: sum(right) / len(right) for kind, right in sorted(judged.items())}
