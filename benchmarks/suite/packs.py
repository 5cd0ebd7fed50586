"""The packs that are measured: of a recipe's data, or drawn to a scenario; and the same pack as each mode has it."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from uno_ds.cost.scenario import Scenario
from uno_ds.recipe import Recipe
from uno_ds.run import Run
from uno_ds.sequence.segments import Kind, Sample
from uno_ds.sequence.tasks import Encoded, ImageViews
from uno_ds.settings import SettingsError

# What each mode keeps of a sample's supervision. The naive ones are spelled otherwise, on the same samples.
SUPERVISION = {
    "flow": (),
    "flow+caption": (Kind.CAPTION,),
    "flow+regression": (Kind.METAQUERY,),
    "uno": (Kind.CAPTION, Kind.METAQUERY),
    "naive flow": (),
    "naive uno": (Kind.CAPTION, Kind.METAQUERY),
}
BOUNDARY = 2
# The scenarios of docs: prompt, latents, caption, metaqueries; samples; tokens of a condition image in the visual encoder.
SCENARIOS = {
    "A": Scenario(200, 4096, 200, 256, 6),
    "B": Scenario(200, 4096, 200, 1024, 5),
    "C": Scenario(200, 1024, 200, 64, 22),
    "D": Scenario(200, 1024, 200, 256, 19),
    "E": Scenario(300, 1024, 300, 1024, 12),
    "F": Scenario(100, 4096, 200, 256, 3, vit=4096),
}


def is_naive(mode: str) -> bool:
    return mode.startswith("naive")


def as_mode(samples: list[Sample], mode: str) -> list[Sample]:
    """The same samples, noise and all, with the supervision that the mode has."""
    kept = SUPERVISION[mode]
    return [
        Sample(
            sample.key,
            [
                segment
                for segment in sample.segments
                if segment.kind not in (Kind.CAPTION, Kind.METAQUERY) or segment.kind in kept
            ],
        )
        for sample in samples
    ]


def images_of(samples: list[Sample]) -> int:
    """Pictures that are being learnt."""
    return sum(segment.kind == Kind.NOISED for sample in samples for segment in sample.segments)


def packs_of_data(run: Run, rank: int, world_size: int) -> Iterator[list[Sample]]:
    """This rank's packs from the recipe's own sources, endless."""
    lanes = run.stream(rank, world_size).lanes
    while True:
        for lane in lanes:
            yield lane.next_pack()


def settled(recipe: Recipe, scenario: Scenario) -> Recipe:
    """The recipe as the scenario needs it: nothing dropped by chance, all samples supervised, metaqueries on a square grid."""
    grid = math.isqrt(scenario.metaqueries)
    if grid**2 != scenario.metaqueries:
        raise SettingsError(
            "--scenarios", f"{scenario.metaqueries} metaqueries are no square grid."
        )
    sequence = dataclasses.replace(
        recipe.sequence,
        metaquery_grid=max(1, grid),
        drop_text=0.0,
        drop_vit=0.0 if scenario.vit else 1.0,
        drop_latent=0.0 if scenario.clean else 1.0,
        supervised_fraction=1.0,
        supervision_window=[0.0, 1.0],
    )
    return dataclasses.replace(recipe, sequence=sequence)


def drawn_samples(
    recipe: Recipe, scenario: Scenario, seed: int, encoded: bool = False
) -> list[Sample]:
    """`scenario.samples` samples with random pictures and texts. prompt and caption count bos and eos; an image of n tokens is as
    square as n allows, and has a start and an end beside. `encoded`: latents are given, so that no autoencoder runs."""
    geometry, layout = recipe.architecture.geometry, recipe.layout(None)
    rng = np.random.default_rng(seed)
    layout = type(layout)(
        recipe.sequence,
        geometry,
        layout.tokens,
        captions=scenario.caption > 0,
        metaqueries=scenario.metaqueries > 0,
    )

    def text(tokens: int) -> list[int]:
        return rng.integers(
            4, recipe.architecture.vocabulary, size=max(0, tokens - BOUNDARY)
        ).tolist()

    def pixels(tokens: int, stride: int) -> np.ndarray:
        rows, columns = grid_of(tokens)
        return rng.uniform(-1, 1, size=(3, rows * stride, columns * stride)).astype(np.float32)

    def latent(tokens: int) -> np.ndarray | Encoded:
        if not encoded:
            return pixels(tokens, geometry.latent_stride)
        patch = recipe.architecture.latent_patch
        rows, columns = grid_of(tokens)
        return Encoded(
            rng.standard_normal(
                (recipe.architecture.latent_channels, rows * patch, columns * patch)
            ).astype(np.float32),
            (rows, columns),
        )

    def target() -> np.ndarray:
        """The picture as the visual encoder takes it: of the pixels that the latents have, cut to its position table."""
        rows, columns = (
            min(geometry.vit_side, side * geometry.latent_stride // geometry.vit_stride)
            for side in grid_of(scenario.latents)
        )
        return rng.uniform(
            -1, 1, size=(3, rows * geometry.vit_stride, columns * geometry.vit_stride)
        ).astype(np.float32)

    samples = []
    for number in range(scenario.samples):
        image = ImageViews(
            latent=latent(scenario.latents), vit=target() if scenario.metaqueries else None
        )
        caption = text(scenario.caption) if scenario.caption else None
        if scenario.vit or scenario.clean:
            source = ImageViews(
                latent=latent(scenario.clean) if scenario.clean else None,
                vit=pixels(scenario.vit, geometry.vit_stride) if scenario.vit else None,
            )
            samples.append(
                layout.edit(f"drawn:{number}", source, text(scenario.prompt), caption, image, rng)
            )
        else:
            samples.append(
                layout.text_to_image(f"drawn:{number}", text(scenario.prompt), caption, image, rng)
            )
    return samples


def grid_of(tokens: int) -> tuple[int, int]:
    """Rows and columns of an image of so many tokens, as square as can be."""
    rows = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return rows, tokens // rows
