"""What is kept of a model's forward passes over a chunk of images at one noise level: sums and
small pooled features, never the hidden states of all tokens.

Shape suffixes: docs/notation.md."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from uno_ds.data.samples import SampleMaker
from uno_ds.inspection.alignment import spatial_measures
from uno_ds.inspection.hidden_states import hidden_states
from uno_ds.inspection.images import (
    ImageSet,
    at_noise_level,
    foreground,
    metaquery_segment,
    noised_segment,
    picture_of,
    sample_maker,
)
from uno_ds.inspection.reading import HeadOutputs, by_sample, read_captions
from uno_ds.inspection.subject import Subject
from uno_ds.model.codec import rows_to_latents
from uno_ds.objectives.flow_matching import noise_latents
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.composition import grids_of
from uno_ds.sequence.segments import Sample

# Hidden states are averaged over each cell of this grid, so that probes can tell places apart.
CELLS = 2

Record = tuple[dict[str, np.ndarray], dict[str, Any]]


class Collector:
    """Looks at chunks of images with one model. `layers`: whose outputs are looked at, 1: the
    first; `shown`: images whose hidden states are kept whole, for maps."""

    def __init__(self, subject: Subject, images: ImageSet, layers: Sequence[int], shown: int):
        self.subject, self.images, self.layers, self.shown = subject, images, layers, shown
        self.make_sample = self._maker(subject.metaqueries)
        self._collate = subject.collator()

    def _maker(self, metaqueries: list[int] | int) -> SampleMaker:
        subject = self.subject
        geometry = subject.objective.model.shape.geometry
        return sample_maker(
            self.images.composition, geometry, subject.tokenizer, subject.tokens, metaqueries
        )

    def samples(self, numbers: Sequence[int], t: float) -> list[Sample]:
        return [at_noise_level(s, t) for s in self.images.samples(numbers, self.make_sample)]

    def states(self, numbers: Sequence[int], t: float) -> Record:
        """Of a forward pass of training:

        pooled [B, layers, 4, H]  hidden states averaged over quarters of the image, row by row
        spatial [B, layers, 4]    spatial measures
        caption [B, 2]            sum of the caption's cross entropies, tokens
        cosine [B, M]             cosine of prediction and target at each metaquery, if there are
                                  any
        tokens_NUMBER [layers, T, H]    hidden states of a shown image
        noised_NUMBER [h, w, 3]         the shown image at this noise level, decoded
        """
        samples = self.samples(numbers, t)
        batch = self._collate(samples).to(self.subject.device)
        with HeadOutputs(self.subject) as heads:
            states, losses = hidden_states(self.subject.objective, batch, self.layers)
        grids = [noised_segment(sample).grid for sample in samples]
        lengths = [rows * columns for rows, columns in grids]
        by_layer = [states[layer].float().split(lengths) for layer in self.layers]
        pooled, spatial = [], []
        for place, (grid, number) in enumerate(zip(grids, numbers, strict=True)):
            tokens = [images[place] for images in by_layer]
            pooled.append(torch.stack([pool(tokens_TH, grid) for tokens_TH in tokens]))
            inside_T = foreground(self.images.scene(number), grid)
            measures = [spatial_measures(tokens_TH, grid, inside_T) for tokens_TH in tokens]
            spatial.append(torch.stack(measures))
        arrays = {
            "pooled": torch.stack(pooled).cpu().numpy(),
            "spatial": torch.stack(spatial).cpu().numpy(),
            "caption": np.array(heads.entropies(samples)),
        }
        if heads.cosine_M is not None:
            arrays["cosine"] = torch.stack(by_sample(heads.cosine_M, samples)).numpy()
        shown = [(place, number) for place, number in enumerate(numbers) if number < self.shown]
        noised = self._noised_pictures(batch, grids) if shown else []
        for place, number in shown:
            whole = torch.stack([images[place] for images in by_layer])
            # fp16 has a largest value, and some channels of large models exceed it.
            arrays[f"tokens_{number}"] = whole.cpu().numpy()
            arrays[f"noised_{number}"] = noised[place]
        sums = dict(zip(self.subject.objective.losses, losses.tolist(), strict=True))
        metaqueries = list(grids_of(self.subject.metaqueries))
        values = {"sums": sums, "counts": batch.loss_counts, "grids": grids}
        return arrays, values | {"metaquery_grids": metaqueries}

    def _noised_pictures(
        self, batch: PackedBatch, grids: Sequence[tuple[int, int]]
    ) -> list[np.ndarray]:
        objective = self.subject.objective
        patch = objective.model.shape.latent_patch
        with torch.no_grad():
            latents_GC, _ = noise_latents(objective.latent_rows(batch), batch.latents)
            rows_XC = latents_GC[batch.latents.noised_X]
            rows_of_images = rows_XC.split([h * w for h, w in grids])
            pictures = [
                objective.codec.decode(rows_to_latents(rows, grid, patch))[0].float()
                for rows, grid in zip(rows_of_images, grids, strict=True)
            ]
        return [np.asarray(picture_of(pixels.cpu().numpy())) for pixels in pictures]

    def captions(self, numbers: Sequence[int], t: float, most_tokens: int) -> Record:
        """The texts that are read from the noised latents."""
        texts = read_captions(self.subject, self.samples(numbers, t), most_tokens)
        return {}, {"texts": texts}

    def features(self, numbers: Sequence[int]) -> Record:
        """The model's own visual encoder on the clean images:

        pooled [B, W]   features averaged over the image
        spatial [B, 4]  spatial measures
        """
        # Any grid: the segment has the pixels as the encoder reads them.
        samples = self.images.samples(numbers, self._maker(metaqueries=1))
        features, grids = visual_features(self.subject, self.make_sample, samples)
        scenes = [self.images.scene(number) for number in numbers]
        return summary_of(features, grids, scenes), {}


def visual_features(
    subject: Subject, make_sample: SampleMaker, samples: Sequence[Sample]
) -> tuple[Sequence[torch.Tensor], list[tuple[int, int]]]:
    """(features [T, W] by the model's own visual encoder, grid) of the clean image of each sample,
    which has metaqueries."""
    composer = make_sample.encoder.composer
    pictures = []
    for sample in samples:
        builder = composer.builder()
        builder.vit(metaquery_segment(sample).image)
        pictures.append(builder.sample(sample.key))
    vision = subject.collator()(pictures).to(subject.device).vision
    model = subject.objective.model
    with torch.no_grad():
        features_PW = model.vit(
            vision.patches_PC.to(model.lm_head.weight.dtype),
            vision.positions_P,
            vision.plan,
            vision.lengths,
        )
    grids = [picture.segments[0].grid for picture in pictures]
    return features_PW.float().split(vision.lengths), grids


def summary_of(
    images: Sequence[torch.Tensor], grids: Sequence[tuple[int, int]], scenes: Sequence[Any]
) -> dict[str, np.ndarray]:
    """`pooled` and `spatial` of features [T, W] of images. `scenes`: their ground truth, None where
    there is none."""
    spatial = [
        spatial_measures(x_TW, grid, foreground(scene, grid))
        for x_TW, grid, scene in zip(images, grids, scenes, strict=True)
    ]
    return {
        "pooled": torch.stack([x_TW.mean(dim=0) for x_TW in images]).cpu().numpy(),
        "spatial": torch.stack(spatial).cpu().numpy(),
    }


def pool(tokens_TH: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[CELLS * CELLS, H]: means over the cells of an image; cells of an odd grid overlap."""
    image = tokens_TH.T.reshape(1, -1, *grid)
    return F.adaptive_avg_pool2d(image, CELLS)[0].flatten(1).T
