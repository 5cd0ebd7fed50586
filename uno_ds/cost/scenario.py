"""What a pack holds: the tokens of one sample by kind, and how many samples."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from uno_ds.data.images import largest_cell_count
from uno_ds.data.layouts import get_layout
from uno_ds.data.layouts.base import SampleSize
from uno_ds.sequence.composition import BOUNDARY
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
    of the image whose features are regressed, which are encoded but are no tokens; negative: a
    second, wrong caption."""

    prompt: int
    latents: int
    caption: int
    metaqueries: int
    samples: int
    vit: int = 0
    clean: int = 0
    target: int = 0
    negative: int = 0

    @property
    def context(self) -> int:
        """Understanding rows of the pack without a gradient."""
        return self.samples * (self.prompt + self.vit)

    @property
    def supervision(self) -> int:
        """Live understanding rows of the pack."""
        return self.samples * (self.caption + self.negative + self.metaqueries)

    @property
    def generation(self) -> int:
        return self.samples * (self.latents + self.clean)

    @property
    def tokens(self) -> int:
        return self.context + self.supervision + self.generation


def without_supervision(pack: Scenario) -> Scenario:
    """The same samples without captions and metaqueries."""
    return replace(pack, caption=0, negative=0, metaqueries=0, target=0)


def read_scenario(text: str) -> Scenario:
    """From `prompt=200,latents=4096,caption=200,metaqueries=256,samples=6[,vit=4096]`. Raises
    SettingsError."""
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
    if missing or not values["samples"]:
        raise SettingsError(
            "--scenario",
            f"lacks {', '.join(missing)}." if missing else "needs at least one sample.",
        )
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
    return Scenario(
        prompt=size.texts * text + size.image_boundaries,
        latents=size.latents,
        caption=size.captions * text,
        negative=size.negatives * text,
        metaqueries=size.metaqueries,
        samples=samples,
        vit=size.vit,
        clean=size.clean,
        target=size.target,
    )
