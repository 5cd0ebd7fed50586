"""Composing a sample from segments: RoPE ids, noise level, noise, and which samples get
supervision.

Which segments a sample has, and in which order, is the business of its layout (data/layouts).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uno_ds.sequence.schedule import WeightByT, weight_at
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import SettingsError, printable, setting

BOUNDARY = 2  # tokens: bos and eos of a text, start and end of an image


@dataclass(frozen=True)
class SequenceSettings:
    token_budget: int = setting(
        doc="Tokens of one micro-batch of one rank. Samples are packed until it is full; none is "
        "ever cut.",
        minimum=1,
        maximum=10**8,
    )
    max_text_tokens: int = setting(
        256,
        doc="Longest prompt, caption, instruction or answer, in tokens; a row with a longer one is "
        "skipped and counted.",
        minimum=1,
        maximum=10**6,
    )
    metaquery_grid: list[int] | int = setting(
        8,
        doc="Metaqueries per side of the g x g grid that is laid over the image, or a list of "
        "several grids at once, the finest first, each with its own embeddings. 0: none.",
        minimum=0,
        maximum=256,
    )
    supervised_fraction: float = setting(
        1.0,
        doc="Share of the samples with noised latents that get caption and metaqueries.",
        minimum=0,
        maximum=1,
    )
    supervision_window: list[float] = setting(
        factory=lambda: [0.0, 1.0],
        minimum=0,
        maximum=1,
        doc="[low, high]: understanding losses apply only at noise levels t in this window (0 "
        "clean, 1 noise).",
    )
    timestep_shift: float = setting(
        1.0,
        doc="Shift s of t = s*u/(1+(s-1)*u), u = sigmoid of a standard normal; above 1 favours "
        "noise.",
        minimum=1e-3,
        maximum=1e3,
    )
    drop_text: float = setting(
        0.1,
        doc="Probability that the prompt or instruction of a sample is left out, or a text of an "
        "interleaved sample that no trained text reads.",
        minimum=0,
        maximum=1,
    )
    drop_vit: float = setting(
        0.3,
        doc="Probability that the visual-encoder view of an edit's source image is left out, or "
        "that of each condition image of an interleaved sample.",
        minimum=0,
        maximum=1,
    )
    drop_latent: float = setting(
        0.3,
        doc="Probability that the clean latents of an edit's source image are left out, or those "
        "of each condition image of an interleaved sample.",
        minimum=0,
        maximum=1,
    )
    conversation_images: str = setting(
        "vit",
        choices=("vit", "latents", "both", "random"),
        doc="How images enter question-answer samples: through the visual encoder, as clean "
        "latents, both, or one of the two at random.",
    )
    context_gradient: str = setting(
        "stop",
        choices=("stop", "flow"),
        doc="stop: prompts, instructions and condition images of a frozen understanding expert are "
        "constants; flow: the exact gradient goes through them.",
    )

    def __post_init__(self) -> None:
        window = self.supervision_window
        if len(window) != 2 or window[0] > window[1]:
            raise SettingsError(
                "supervision_window",
                f"must be [low, high] with low <= high, got {printable(self.supervision_window)}.",
            )
        sides = self.metaquery_grids
        is_list = isinstance(self.metaquery_grid, list)
        if is_list and (not sides or 0 in sides or list(sides) != sorted(set(sides))[::-1]):
            raise SettingsError(
                "metaquery_grid",
                "must be a number, or a list of different numbers above 0, the finest grid first, "
                f"got {printable(self.metaquery_grid)}.",
            )

    @property
    def metaquery_grids(self) -> tuple[int, ...]:
        """Side of each grid; none: no metaqueries."""
        return grids_of(self.metaquery_grid)

    @property
    def metaqueries(self) -> int:
        """Metaqueries of one supervised image."""
        return queries_of(self.metaquery_grids)


def grids_of(metaquery_grid: list[int] | int) -> tuple[int, ...]:
    """Sides of the grids of a value of sequence.metaquery_grid."""
    if isinstance(metaquery_grid, int):
        return (metaquery_grid,) if metaquery_grid else ()
    return tuple(metaquery_grid)


def queries_of(grids: Sequence[int]) -> int:
    """Cells of all grids."""
    return sum(side**2 for side in grids)


@dataclass(frozen=True)
class Geometry:
    """Sizes that the model fixes. Strides are pixels per token side; sides are rows and columns of
    the position tables."""

    latent_stride: int
    latent_values: int
    latent_side: int
    vit_stride: int
    vit_side: int


@dataclass(frozen=True)
class SpecialTokens:
    bos: int
    eos: int
    start_of_image: int
    end_of_image: int


@dataclass(frozen=True, eq=False)
class Encoded:
    """An image that was encoded earlier. `values`, float32: a latent [channels, h, w] or regression
    targets [metaqueries, width]; `grid`: the image's tokens (rows, columns) in that encoder."""

    values: np.ndarray
    grid: tuple[int, int]


View = np.ndarray | Encoded


@dataclass(frozen=True, eq=False)
class ImageViews:
    """One image as the two encoders read it: pixels, float32 [3, h, w] in [-1, 1], sides multiples
    of the strides; or, if it was prepared, their output. None: a view that nothing reads."""

    latent: View | None = None
    vit: View | None = None


class SampleComposer:
    """Makes a `SampleBuilder` for each sample. `captions`, `metaqueries`: whether those losses are
    on at all; `caption_weight_by_t`, `regression_weight_by_t`: how much they count at which noise
    level; `negative_source`: where negative captions come from, "" without them."""

    def __init__(
        self,
        settings: SequenceSettings,
        geometry: Geometry,
        tokens: SpecialTokens,
        captions: bool,
        metaqueries: bool,
        caption_weight_by_t: WeightByT = (),
        regression_weight_by_t: WeightByT = (),
        negative_source: str = "",
    ):
        self.settings = settings
        self.geometry = geometry
        self.tokens = tokens
        self.captions = captions
        self.metaqueries = metaqueries and settings.metaqueries > 0
        self.caption_weight_by_t = caption_weight_by_t
        self.regression_weight_by_t = regression_weight_by_t
        self.negative_source = negative_source if captions else ""

    def unsupervised(self) -> "SampleComposer":
        """Makes the samples of plain flow matching."""
        return SampleComposer(self.settings, self.geometry, self.tokens, False, False)

    @property
    def queries(self) -> int:
        """Metaqueries of one supervised sample."""
        return self.settings.metaqueries if self.metaqueries else 0

    @property
    def reads_negatives(self) -> bool:
        """Whether negative captions come from data rows."""
        return self.negative_source == "column"

    def negatives(self, has_column: bool = False) -> int:
        """Negative captions of one supervised sample at most; has_column: its layout reads them
        from data rows."""
        match self.negative_source:
            case "":
                return 0
            case "column":
                return int(has_column)
            case "pack":
                return 1
            case unknown:
                raise ValueError(f"Unknown source of negative captions {unknown!r}.")

    def builder(self) -> "SampleBuilder":
        return SampleBuilder(self)

    def draw_timestep(self, rng: np.random.Generator) -> float:
        shift = self.settings.timestep_shift
        s = 1.0 / (1.0 + np.exp(-rng.standard_normal()))
        return float(shift * s / (1.0 + (shift - 1.0) * s))


class SampleBuilder:
    """Appends segments and keeps the RoPE id: a text advances it by its length, an image by one;
    caption and metaqueries both start at the id after their image."""

    def __init__(self, composer: SampleComposer):
        self.composer = composer
        self.segments: list[Segment] = []
        self.rope_id = 0

    def sample(self, key: str) -> Sample:
        return Sample(key, self.segments)

    def text(self, ids: list[int], answer: bool = False) -> None:
        """`ids` without bos and eos. `answer`: its tokens are trained by cross entropy."""
        self._causal(Kind.TEXT, ids, answer=answer)
        self.rope_id += len(ids) + BOUNDARY

    def vit(self, view: View) -> None:
        """A condition image for the visual encoder, which reads pixels."""
        assert isinstance(view, np.ndarray), "conditions are prepared as pixels"
        grid, content = _content(view, self.composer.geometry.vit_stride, "")
        self._image(Kind.VIT, grid, **content)

    def clean(self, view: View) -> None:
        """A condition image as clean latents."""
        grid, content = _content(view, self.composer.geometry.latent_stride, "latent")
        self._image(Kind.CLEAN, grid, **content)

    def generated(
        self,
        image: ImageViews,
        caption: list[int] | None,
        rng: np.random.Generator,
        negatives: Sequence[list[int]] = (),
    ) -> None:
        """The image that is to be generated, as noised latents, followed by the supervision that
        reads them: its caption, if it has one, one of its negatives where they are wanted, and
        metaqueries for its view of the visual encoder."""
        settings = self.composer.settings
        low, high = settings.supervision_window
        timestep = self.composer.draw_timestep(rng)
        # Drawn whether used or not, so that the noise does not depend on the losses that are on.
        chosen = rng.random() < settings.supervised_fraction
        assert image.latent is not None, "a target has a view of the codec"
        noised = self._noised(image.latent, timestep, rng)
        if not (chosen and low <= timestep <= high):
            return
        caption_weight = weight_at(self.composer.caption_weight_by_t, timestep)
        if self.composer.captions and caption is not None and caption_weight:
            read: dict[str, Any] = {"supervises": noised, "weight": caption_weight}
            self._causal(Kind.CAPTION, caption, **read)
            others = [ids for ids in negatives if ids != caption]
            if self.composer.reads_negatives and others:
                # Drawn last, so that conditions and noise do not depend on it.
                negative = others[int(rng.integers(len(others)))]
                self._causal(Kind.CAPTION, negative, negative=True, **read)
        regression_weight = weight_at(self.composer.regression_weight_by_t, timestep)
        if self.composer.metaqueries and regression_weight:
            assert image.vit is not None, "metaqueries need a view of the visual encoder"
            self._metaqueries(image.vit, noised, regression_weight)

    def _noised(self, view: View, timestep: float, rng: np.random.Generator) -> int:
        """Returns the segment's index in the sample."""
        geometry = self.composer.geometry
        grid, content = _content(view, geometry.latent_stride, "latent")
        shape = (grid[0] * grid[1], geometry.latent_values)
        noise = rng.standard_normal(shape, dtype=np.float32)
        self._image(Kind.NOISED, grid, timestep=timestep, noise=noise, **content)
        return len(self.segments) - 1

    def _metaqueries(self, view: View, noised: int, weight: float) -> None:
        settings = self.composer.settings
        grid, content = _content(view, self.composer.geometry.vit_stride, "target")
        self._full(
            Kind.METAQUERY,
            settings.metaqueries,
            grid=grid,
            sides=settings.metaquery_grids,
            supervises=noised,
            weight=weight,
            **content,
        )

    def _causal(self, kind: Kind, ids: list[int], **fields) -> None:
        tokens = self.composer.tokens
        token_ids = np.array([tokens.bos, *ids, tokens.eos], dtype=np.int64)
        rope_ids = self.rope_id + np.arange(len(token_ids))
        self.segments.append(Segment(kind, rope_ids, token_ids=token_ids, **fields))

    def _image(self, kind: Kind, grid: tuple[int, int], **fields) -> None:
        self._full(kind, grid[0] * grid[1] + BOUNDARY, grid=grid, **fields)
        self.rope_id += 1

    def _full(self, kind: Kind, length: int, **fields) -> None:
        self.segments.append(Segment(kind, np.full(length, self.rope_id), **fields))


def _content(
    view: View, stride: int, encoded: str
) -> tuple[tuple[int, int], dict[str, np.ndarray]]:
    """(tokens of the image, the field that holds its content): `pixels`, or the field named
    `encoded` for an image that was encoded earlier."""
    if isinstance(view, Encoded):
        return view.grid, {encoded: view.values}
    return (view.shape[1] // stride, view.shape[2] // stride), {"pixels": view}
