"""What a pack holds: the tokens of one sample by kind, and how many samples."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from uno_ds.data.images import largest_cell_count
from uno_ds.settings import SettingsError, printable

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

MOST_DIGITS = 9
BOUNDARY = 2  # start and end of a text or an image


@dataclass(frozen=True)
class Scenario:
    """Tokens of one sample and the samples of a pack. prompt: text of the context; latents: noised;
    clean: latents of an edit's source; vit: visual-encoder tokens of the context; target: patches
    of the image whose features are regressed, which are encoded but are no tokens."""

    prompt: int
    latents: int
    caption: int
    metaqueries: int
    samples: int
    vit: int = 0
    clean: int = 0
    target: int = 0

    @property
    def context(self) -> int:
        """Understanding rows of the pack without a gradient."""
        return self.samples * (self.prompt + self.vit)

    @property
    def supervision(self) -> int:
        """Live understanding rows of the pack."""
        return self.samples * (self.caption + self.metaqueries)

    @property
    def generation(self) -> int:
        return self.samples * (self.latents + self.clean)

    @property
    def tokens(self) -> int:
        return self.context + self.supervision + self.generation


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
                f"expects NAME=NUMBER for each of {', '.join(known)} at most once, with a number of at "
                f"most {MOST_DIGITS} digits, got '{printable(part.strip())}'.",
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
    geometry, data, settings, objective = (
        recipe.architecture.geometry,
        recipe.data,
        recipe.sequence,
        recipe.objective,
    )
    latents, patches = (
        largest_cell_count(geometry.latent_stride, data.latent_image),
        largest_cell_count(geometry.vit_stride, data.vit_image),
    )
    queries = settings.metaquery_grid**2 if objective.regression_weight else 0
    captions = 1 if objective.caption_weight else 0
    packs = {}
    for layout in dict.fromkeys(layouts):
        edit, conversation = layout == "edit", layout == "vlm"
        shown = settings.conversation_images
        vit = patches if edit or conversation and shown != "latents" else 0
        clean = latents if edit or conversation and shown in ("latents", "both", "random") else 0
        noised, asked, told = (0, 0, 0) if conversation else (latents, queries, captions)
        images = BOUNDARY * ((vit > 0) + (clean > 0) + (noised > 0))
        fixed, texts = vit + clean + noised + asked + images, (2 if conversation else 1) + told
        samples = max(1, recipe.sequence.token_budget // (fixed + texts * (BOUNDARY + 1)))
        text = max(
            1,
            min(
                settings.max_text_tokens + BOUNDARY,
                (recipe.sequence.token_budget // samples - fixed) // texts,
            ),
        )
        packs[layout] = Scenario(
            prompt=(texts - told) * text + images,
            latents=noised,
            caption=told * text,
            metaqueries=asked,
            samples=samples,
            vit=vit,
            clean=clean,
            target=patches if asked else 0,
        )
    return packs
