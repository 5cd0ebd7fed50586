"""What a pack holds: the tokens of one sample by kind, and how many samples."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from uno_ds.data.images import largest_cell_count
from uno_ds.data.layouts import get_layout
from uno_ds.data.layouts.base import SampleSize
from uno_ds.objectives.regression_target import get_regression_target
from uno_ds.sequence.composition import BOUNDARY
from uno_ds.sequence.segments import Kind
from uno_ds.settings import SettingsError, printable

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

MOST_DIGITS = 9
# After the name of a layout: its pack in the steps after supervision ended.
UNSUPERVISED = ", unsupervised"


@dataclass(frozen=True)
class Scenario:
    """Tokens of one sample and the samples of a pack. prompt: text of the context; latents: noised;
    clean: latents of an edit's source; vit: visual-encoder tokens of the context; target: patches
    of the image whose features are regressed, which are encoded but are no tokens; own_target: such
    patches for an encoder that is no part of the model; negative: a second, wrong caption.

    images: generated images of a sample, one after the other. Each has `prompt`, `latents`,
    `caption`, `metaqueries`, `negative` and targets of its own, and is the source of the next one:
    with `vit` tokens and, if `clean` is not 0, its latents."""

    prompt: int
    latents: int
    caption: int
    metaqueries: int
    samples: int
    vit: int = 0
    clean: int = 0
    target: int = 0
    own_target: int = 0
    negative: int = 0
    images: int = 1

    @property
    def segments(self) -> list[tuple[Kind, int]]:
        """(kind, tokens) of the segments of one sample in their order, without those that have
        none."""
        source = [(Kind.CLEAN, self.clean), (Kind.VIT, self.vit)]
        again = [(Kind.CLEAN, self.latents if self.clean else 0), (Kind.VIT, self.vit)]
        generated = [
            (Kind.TEXT, self.prompt),
            (Kind.NOISED, self.latents),
            (Kind.CAPTION, self.caption),
            (Kind.METAQUERY, self.metaqueries),
            (Kind.CAPTION, self.negative),
        ]
        segments = source + generated + (again + generated) * (self.images - 1)
        return [(kind, tokens) for kind, tokens in segments if tokens]

    def rows(self, *kinds: Kind) -> int:
        """Rows of segments of these kinds in the pack."""
        return self.samples * sum(tokens for kind, tokens in self.segments if kind in kinds)

    @property
    def context(self) -> int:
        """Understanding rows of the pack without a gradient."""
        return self.rows(Kind.TEXT, Kind.VIT)

    @property
    def supervision(self) -> int:
        """Live understanding rows of the pack."""
        return self.rows(Kind.CAPTION, Kind.METAQUERY)

    @property
    def generation(self) -> int:
        return self.rows(Kind.NOISED, Kind.CLEAN)

    @property
    def tokens(self) -> int:
        return self.context + self.supervision + self.generation

    @property
    def targets(self) -> int:
        """Patches of the pack that are encoded for the regression's targets."""
        return self.samples * self.images * self.target


def without_supervision(pack: Scenario) -> Scenario:
    """The same samples without captions and metaqueries."""
    return replace(pack, caption=0, negative=0, metaqueries=0, target=0, own_target=0)


def read_scenario(text: str) -> Scenario:
    """From `prompt=200,latents=4096,caption=200,metaqueries=256,samples=6[,vit=4096][,images=3]`.
    Raises SettingsError."""
    known, values = [field.name for field in fields(Scenario)], {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        if (
            name not in known
            or name in values
            or not equals
            or not (number.isascii() and number.isdigit())
            or len(number) > MOST_DIGITS
        ):
            raise SettingsError(
                "--scenario",
                f"expects NAME=NUMBER for each of {', '.join(known)} at most once, with a "
                f"number of at most {MOST_DIGITS} digits, got '{printable(part.strip())}'.",
            )
        values[name] = int(number)
    missing = [name for name in known[:5] if name not in values]
    if missing:
        raise SettingsError("--scenario", f"lacks {', '.join(missing)}.")
    if not values["samples"] or not values.get("images", 1):
        raise SettingsError("--scenario", "needs at least one sample with one image.")
    return Scenario(**values)


def fullest_packs(recipe: "Recipe", layouts: Iterable[str]) -> dict[str, Scenario]:
    """For each layout of a source the pack that costs most: as many samples with images of full
    size as the budget holds, and texts as long as they can then be."""
    geometry = recipe.architecture.geometry
    composer = recipe.composer(None)
    latent_cells = largest_cell_count(geometry.latent_stride, recipe.data.latent_image)
    vit_cells = largest_cell_count(geometry.vit_stride, recipe.data.vit_image)
    packs = {}
    for name in dict.fromkeys(layouts):
        size = get_layout(name).sample_size(composer, latent_cells, vit_cells)
        packs[name] = _fullest_pack(size, recipe)
    return packs


def packs_of_run(recipe: "Recipe", layouts: Iterable[str]) -> dict[str, Scenario]:
    """The fullest packs, and those of the steps after supervision ended, if it ends."""
    layouts = list(layouts)
    packs = fullest_packs(recipe, layouts)
    if recipe.supervised_steps < recipe.steps:
        later = fullest_packs(recipe.unsupervised(), layouts)
        packs |= {name + UNSUPERVISED: pack for name, pack in later.items()}
    return packs


def _fullest_pack(size: SampleSize, recipe: "Recipe") -> Scenario:
    budget = recipe.sequence.token_budget
    shortest_text = BOUNDARY + 1
    longest_text = recipe.sequence.max_text_tokens + BOUNDARY
    samples = max(1, budget // size.tokens(shortest_text))
    free = budget // samples - size.tokens_without_texts
    text = max(1, min(longest_text, free // (size.texts + size.captions + size.negatives)))
    target = get_regression_target(recipe.objective.regression_target)
    return Scenario(
        prompt=size.texts * text + size.image_boundaries,
        latents=size.latents,
        caption=size.captions * text,
        negative=size.negatives * text,
        metaqueries=size.metaqueries,
        samples=samples,
        vit=size.vit,
        clean=size.clean,
        target=size.target if target.reads_vision else 0,
        own_target=size.target if target.own_encoder else 0,
    )
