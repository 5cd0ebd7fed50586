"""Which segments a sample of each task has, and the random choices (noise level, dropped conditions, supervision)."""

from dataclasses import dataclass

import numpy as np

from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import SettingsError, printable, setting


@dataclass(frozen=True)
class SequenceSettings:
    token_budget: int = setting(
        doc="Tokens of one micro-batch of one rank. Samples are packed until it is full; none is ever cut.",
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
    metaquery_grid: int = setting(
        8,
        doc="Metaqueries per side of the g x g grid that is laid over the image. 0: none.",
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
        doc="Shift s of t = s*u/(1+(s-1)*u), u = sigmoid of a standard normal; above 1 favours noise.",
        minimum=1e-3,
        maximum=1e3,
    )
    drop_text: float = setting(
        0.1,
        doc="Probability that the prompt or instruction of a sample is left out.",
        minimum=0,
        maximum=1,
    )
    drop_vit: float = setting(
        0.3,
        doc="Probability that the visual-encoder view of an edit's source image is left out.",
        minimum=0,
        maximum=1,
    )
    drop_latent: float = setting(
        0.3,
        doc="Probability that the clean latents of an edit's source image are left out.",
        minimum=0,
        maximum=1,
    )
    conversation_images: str = setting(
        "vit",
        choices=("vit", "latents", "both", "random"),
        doc="How images enter question-answer samples: through the visual encoder, as clean latents, "
        "both, or one of the two at random.",
    )
    context_gradient: str = setting(
        "stop",
        choices=("stop", "flow"),
        doc="stop: prompts, instructions and condition images of a frozen understanding expert are "
        "constants; flow: the exact gradient goes through them.",
    )

    def __post_init__(self) -> None:
        if (
            len(self.supervision_window) != 2
            or self.supervision_window[0] > self.supervision_window[1]
        ):
            raise SettingsError(
                "supervision_window",
                f"must be [low, high] with low <= high, got {printable(self.supervision_window)}.",
            )


@dataclass(frozen=True)
class Geometry:
    """Sizes that the model fixes. Strides are pixels per token side, sides are rows of the position tables."""

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
    """What an encoder made of an image earlier: a latent [channels, h, w] or regression targets [side * side, width], float32;
    `grid`: the image's tokens (rows, columns) in that encoder."""

    values: np.ndarray
    grid: tuple[int, int]


View = np.ndarray | Encoded


@dataclass(frozen=True, eq=False)
class ImageViews:
    """One image as the two encoders take it: float32 [3, h, w] in [-1, 1], sides multiples of the strides; or, where it was
    prepared, as they gave it. A view that no one reads is None."""

    latent: View | None = None
    vit: View | None = None


class Layout:
    """Turns the content of a sample into its segments. `captions`, `metaqueries`: whether those losses are on at all."""

    def __init__(
        self,
        settings: SequenceSettings,
        geometry: Geometry,
        tokens: SpecialTokens,
        captions: bool,
        metaqueries: bool,
    ):
        self.settings, self.geometry, self.tokens = settings, geometry, tokens
        self.captions, self.metaqueries = captions, metaqueries and settings.metaquery_grid > 0

    def text_to_image(
        self,
        key: str,
        prompt: list[int],
        caption: list[int] | None,
        image: ImageViews,
        rng: np.random.Generator,
    ) -> Sample:
        builder = _Builder(self)
        if rng.random() >= self.settings.drop_text:
            builder.text(prompt)
        self._noised_with_supervision(builder, caption, image, rng)
        return Sample(key, builder.segments)

    def edit(
        self,
        key: str,
        source: ImageViews,
        instruction: list[int],
        caption: list[int] | None,
        target: ImageViews,
        rng: np.random.Generator,
    ) -> Sample:
        """Clean latents and visual-encoder view of the source, the instruction, and the noised target."""
        builder, settings = _Builder(self), self.settings
        keep_latent, keep_vit, keep_text = rng.random(3) >= (
            settings.drop_latent,
            settings.drop_vit,
            settings.drop_text,
        )
        if keep_latent:
            builder.clean(source.latent)
        if keep_vit:
            builder.vit(source.vit)
        if keep_text:
            builder.text(instruction)
        self._noised_with_supervision(builder, caption, target, rng)
        return Sample(key, builder.segments)

    def conversation(
        self,
        key: str,
        turns: list[tuple[bool, list[list[int] | ImageViews]]],
        rng: np.random.Generator,
    ) -> Sample:
        """`turns`: (is an answer, parts); a part is a text's ids or an image. Answers are trained, questions are not."""
        builder = _Builder(self)
        for answer, parts in turns:
            for part in parts:
                if not isinstance(part, ImageViews):
                    builder.text(part, answer)
                    continue
                if part.latent is not None:
                    builder.clean(part.latent)
                if part.vit is not None:
                    builder.vit(part.vit)
        return Sample(key, builder.segments)

    def conversation_views(self, rng: np.random.Generator) -> tuple[bool, bool]:
        """(latents, vit): the views in which this question-answer sample shows its images."""
        how = self.settings.conversation_images
        if how == "random":
            how = ("vit", "latents")[int(rng.integers(2))]
        return how != "vit", how != "latents"

    def largest_sample(self, task: str, latent_cells: int, vit_cells: int) -> int:
        """Most tokens that a sample of `task` with one image per side and the longest texts can have."""
        text, latents, vit = self.settings.max_text_tokens + 2, latent_cells + 2, vit_cells + 2
        supervision = text * self.captions + self.settings.metaquery_grid**2 * self.metaqueries
        conversation = {
            "vit": vit,
            "latents": latents,
            "both": vit + latents,
            "random": max(vit, latents),
        }
        return {
            "t2i": text + latents + supervision,
            "edit": latents + vit + text + latents + supervision,
            "vlm": conversation[self.settings.conversation_images] + 2 * text,
        }[task]

    def draw_timestep(self, rng: np.random.Generator) -> float:
        shift = self.settings.timestep_shift
        s = 1.0 / (1.0 + np.exp(-rng.standard_normal()))
        return float(shift * s / (1.0 + (shift - 1.0) * s))

    def _noised_with_supervision(
        self,
        builder: "_Builder",
        caption: list[int] | None,
        image: ImageViews,
        rng: np.random.Generator,
    ) -> None:
        low, high = self.settings.supervision_window
        timestep = self.draw_timestep(rng)
        # Drawn whether used or not, so that the noise of a sample does not depend on the losses that are on.
        supervised = rng.random() < self.settings.supervised_fraction and low <= timestep <= high
        noised = builder.noised(image.latent, timestep, rng)
        if not supervised:
            return
        if self.captions and caption is not None:
            builder.caption(caption, noised)
        if self.metaqueries:
            builder.metaqueries(image.vit, noised)


class _Builder:
    """Appends segments and keeps the RoPE id: text advances by its length, an image by one; both supervisions start
    at the id after their image."""

    def __init__(self, layout: Layout):
        self.layout, self.segments, self.rope_id = layout, [], 0

    def text(self, ids: list[int], answer: bool = False) -> None:
        self._causal(Kind.TEXT, ids, answer=answer)
        self.rope_id += len(ids) + 2

    def vit(self, pixels: np.ndarray) -> None:
        grid, _ = self._content(pixels, self.layout.geometry.vit_stride, "")
        self._full(Kind.VIT, grid[0] * grid[1] + 2, pixels=pixels, grid=grid)
        self.rope_id += 1

    def clean(self, view: View) -> None:
        grid, content = self._content(view, self.layout.geometry.latent_stride, "latent")
        self._full(Kind.CLEAN, grid[0] * grid[1] + 2, grid=grid, **content)
        self.rope_id += 1

    def noised(self, view: View, timestep: float, rng: np.random.Generator) -> int:
        grid, content = self._content(view, self.layout.geometry.latent_stride, "latent")
        noise = rng.standard_normal(
            (grid[0] * grid[1], self.layout.geometry.latent_values), dtype=np.float32
        )
        self._full(
            Kind.NOISED, grid[0] * grid[1] + 2, grid=grid, timestep=timestep, noise=noise, **content
        )
        self.rope_id += 1
        return len(self.segments) - 1

    def caption(self, ids: list[int], noised: int) -> None:
        self._causal(Kind.CAPTION, ids, supervises=noised)

    def metaqueries(self, view: View, noised: int) -> None:
        side = self.layout.settings.metaquery_grid
        grid, content = self._content(view, self.layout.geometry.vit_stride, "target")
        self._full(Kind.METAQUERY, side * side, grid=grid, side=side, supervises=noised, **content)

    def _causal(self, kind: Kind, ids: list[int], **fields) -> None:
        tokens = self.layout.tokens
        token_ids = np.array([tokens.bos, *ids, tokens.eos], dtype=np.int64)
        rope_ids = self.rope_id + np.arange(len(token_ids))
        self.segments.append(Segment(kind, rope_ids, token_ids=token_ids, **fields))

    def _full(self, kind: Kind, length: int, **fields) -> None:
        self.segments.append(Segment(kind, np.full(length, self.rope_id), **fields))

    @staticmethod
    def _content(
        view: View, stride: int, encoded: str
    ) -> tuple[tuple[int, int], dict[str, np.ndarray]]:
        """(tokens of the image, what the segment holds of it): pixels, or what the field `encoded` is for."""
        if isinstance(view, Encoded):
            return view.grid, {encoded: view.values}
        return (view.shape[1] // stride, view.shape[2] // stride), {"pixels": view}
