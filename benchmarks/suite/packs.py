"""The packs that are measured, from a recipe's data or drawn for a scenario, and what each mode
keeps of them."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np

from uno_ds.cost.scenario import Scenario
from uno_ds.data.layouts.edit import edit_sample
from uno_ds.data.layouts.interleaved import ImagePiece, TextPiece, interleaved_sample
from uno_ds.data.layouts.text_to_image import text_to_image_sample
from uno_ds.recipe import Recipe
from uno_ds.run import Run
from uno_ds.sequence.composition import Encoded, ImageViews
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import SettingsError

# The supervision that each mode keeps of a sample. The naive modes run naive code on the same
# samples, the lora modes train adapters in place of what the recipe trains.
SUPERVISION = {
    "flow": (),
    "flow+caption": (Kind.CAPTION,),
    "flow+regression": (Kind.METAQUERY,),
    "uno": (Kind.CAPTION, Kind.METAQUERY),
    "naive flow": (),
    "naive uno": (Kind.CAPTION, Kind.METAQUERY),
    "flow-lora": (),
    "uno-lora": (Kind.CAPTION, Kind.METAQUERY),
}
BOUNDARY = 2


def is_naive(mode: str) -> bool:
    return mode.startswith("naive")


def is_adapted(mode: str) -> bool:
    return mode.endswith("-lora")


# The lora modes hold a second model.
DEFAULT_MODES = tuple(mode for mode in SUPERVISION if not is_adapted(mode))


def as_mode(samples: list[Sample], mode: str) -> list[Sample]:
    """The same samples with the same noise, without the supervision that the mode does not have."""
    dropped = {Kind.CAPTION, Kind.METAQUERY} - set(SUPERVISION[mode])

    def without_dropped(sample: Sample) -> Sample:
        places: dict[int, int] = {}
        kept: list[Segment] = []
        for place, segment in enumerate(sample.segments):
            if segment.kind in dropped:
                continue
            places[place] = len(kept)
            if segment.supervises >= 0:
                # Supervision of an earlier image may be gone.
                segment = dataclasses.replace(segment, supervises=places[segment.supervises])
            kept.append(segment)
        return Sample(sample.key, kept)

    return [without_dropped(sample) for sample in samples]


def images_of(samples: list[Sample]) -> int:
    """Number of noised images, which are learned."""
    segments = chain.from_iterable(sample.segments for sample in samples)
    return sum(segment.kind == Kind.NOISED for segment in segments)


def packs_of_data(run: Run, rank: int, world_size: int) -> Iterator[list[Sample]]:
    """This rank's packs from the recipe's own sources, endless."""
    lanes = run.stream(rank, world_size).lanes
    while True:
        for lane in lanes:
            yield lane.next_pack()


def settled(recipe: Recipe, scenario: Scenario) -> Recipe:
    """The recipe for packs of the scenario: nothing is dropped at random, all samples are
    supervised. Raises SettingsError if the metaqueries are no square grid."""
    grid = math.isqrt(scenario.metaqueries)
    if grid**2 != scenario.metaqueries:
        message = f"{scenario.metaqueries} metaqueries are no square grid."
        raise SettingsError("--scenarios", message)
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
    """`scenario.samples` samples with random images and texts. Tokens of prompt and caption include
    bos and eos; an image has its number of patch tokens, on a grid as square as possible, and two
    boundary tokens more. `encoded`: latents are given, so that no autoencoder runs."""
    draw = _Draw(recipe, np.random.default_rng(seed))
    composer = recipe.composer(None)
    composer = type(composer)(
        recipe.sequence,
        recipe.architecture.geometry,
        composer.tokens,
        captions=scenario.caption > 0,
        metaqueries=scenario.metaqueries > 0,
    )

    def latent_view(tokens: int) -> np.ndarray | Encoded:
        return draw.latent(tokens) if encoded else draw.latent_pixels(tokens)

    samples = []
    for number in range(scenario.samples):
        key = f"drawn:{number}"
        if scenario.images > 1:
            pieces = list(_pieces(draw, scenario, latent_view))
            samples.append(interleaved_sample(composer, key, pieces, draw.rng))
            continue
        latent = latent_view(scenario.latents)
        target = draw.target(scenario.latents) if scenario.metaqueries else None
        image = ImageViews(latent=latent, vit=target)
        caption = draw.text(scenario.caption) if scenario.caption else None
        if not (scenario.vit or scenario.clean):
            prompt = draw.text(scenario.prompt)
            samples.append(text_to_image_sample(composer, key, prompt, caption, image, draw.rng))
            continue
        source = ImageViews(
            latent=latent_view(scenario.clean) if scenario.clean else None,
            vit=draw.vit_pixels(scenario.vit) if scenario.vit else None,
        )
        prompt = draw.text(scenario.prompt)
        samples.append(edit_sample(composer, key, source, prompt, caption, image, draw.rng))
    return samples


def _pieces(
    draw: "_Draw", scenario: Scenario, latent_view: Callable[[int], np.ndarray | Encoded]
) -> Iterator[TextPiece | ImagePiece]:
    """The source image, and for each generated image a text and the image, which is the source of
    the next one."""

    def vit() -> np.ndarray | None:
        return draw.vit_pixels(scenario.vit) if scenario.vit else None

    if scenario.vit or scenario.clean:
        clean = latent_view(scenario.clean) if scenario.clean else None
        yield ImagePiece(ImageViews(latent=clean, vit=vit()))
    for _ in range(scenario.images):
        yield TextPiece(draw.text(scenario.prompt))
        latent = latent_view(scenario.latents)
        target = draw.target(scenario.latents) if scenario.metaqueries else None
        caption = draw.text(scenario.caption) if scenario.caption else None
        shown = ImageViews(latent=latent if scenario.clean else None, vit=vit())
        yield ImagePiece(shown, ImageViews(latent=latent, vit=target), caption)


class _Draw:
    """Random texts and images for a recipe's model."""

    def __init__(self, recipe: Recipe, rng: np.random.Generator):
        self.architecture = recipe.architecture
        self.geometry = recipe.architecture.geometry
        self.rng = rng

    def text(self, tokens: int) -> list[int]:
        length = max(0, tokens - BOUNDARY)
        return self.rng.integers(4, self.architecture.vocabulary, size=length).tolist()

    def latent_pixels(self, tokens: int) -> np.ndarray:
        """(3, height, width)"""
        return self._pixels(grid_of(tokens), self.geometry.latent_stride)

    def vit_pixels(self, tokens: int) -> np.ndarray:
        """(3, height, width)"""
        return self._pixels(grid_of(tokens), self.geometry.vit_stride)

    def latent(self, tokens: int) -> Encoded:
        rows, columns = grid_of(tokens)
        patch = self.architecture.latent_patch
        shape = (self.architecture.latent_channels, rows * patch, columns * patch)
        return Encoded(self.rng.standard_normal(shape).astype(np.float32), (rows, columns))

    def target(self, latents: int) -> np.ndarray:
        """The noised image for the visual encoder: as many pixels as the latents represent, at most
        as many patches as the position table has."""
        geometry = self.geometry
        sides = [side * geometry.latent_stride // geometry.vit_stride for side in grid_of(latents)]
        rows, columns = (min(geometry.vit_side, side) for side in sides)
        return self._pixels((rows, columns), geometry.vit_stride)

    def _pixels(self, grid: tuple[int, int], stride: int) -> np.ndarray:
        rows, columns = grid
        shape = (3, rows * stride, columns * stride)
        return self.rng.uniform(-1, 1, size=shape).astype(np.float32)


def grid_of(tokens: int) -> tuple[int, int]:
    """Rows and columns of an image with this number of tokens, as square as possible."""
    rows = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return rows, tokens // rows
