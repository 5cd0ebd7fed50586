"""Settings of the losses that contradict each other, or have no effect together."""

from typing import TYPE_CHECKING

from uno_ds.objectives.regression_target import (
    ENCODER_KEY,
    REGRESSION_TARGETS,
    vision_folder_of,
)
from uno_ds.objectives.uno import ObjectiveSettings
from uno_ds.objectives.visual_regression import CONTRASTIVE
from uno_ds.sequence.schedule import largest_weight
from uno_ds.settings import SettingsError

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


# Switches of losses that need noised latents.
_OF_LATENTS = (
    "flow_contrast",
    "regression_target",
    "regression_target_norm",
    "regression_loss",
    "negative_weight",
    "caption_weight_by_t",
    "regression_weight_by_t",
    "supervise_until",
    "balance",
)


def check_supervision(recipe: "Recipe") -> None:
    """Raises SettingsError if the caption or the regression loss has a weight above 0 and no sample
    can ever have its tokens."""
    objective, sequence = recipe.objective, recipe.sequence
    if objective.regression_weight and not sequence.metaqueries:
        raise SettingsError(
            "sequence.metaquery_grid",
            "is 0, but objective.regression_weight is above 0; give a grid of at least 1 or "
            "set the weight to 0.",
        )
    if objective.flow_contrast and not objective.flow_weight:
        raise SettingsError(
            "objective.flow_contrast",
            f"is {objective.flow_contrast:g}, but objective.flow_weight is 0, of which it is a "
            "share; raise the weight, or set flow_contrast to 0.",
        )
    from_the_pack = {
        "flow_contrast": objective.flow_contrast > 0,
        "negative_source": objective.used_negative_source == "pack",
    }
    for key, reads_others in from_the_pack.items():
        if reads_others and recipe.data.max_samples_per_pack == 1:
            raise SettingsError(
                f"objective.{key}",
                f"is {getattr(objective, key)}, which needs other samples in a pack, but "
                "data.max_samples_per_pack is 1; raise it.",
            )
    if objective.negative_weight and not objective.caption_weight:
        raise SettingsError(
            "objective.negative_weight",
            "is above 0, but objective.caption_weight is 0: there is no caption that a negative "
            "could be compared with; raise it, or set negative_weight to 0.",
        )
    _check_schedule(recipe)
    supervised = objective.caption_weight or objective.regression_weight
    if objective.balance != "none" and not (objective.flow_weight and supervised):
        raise SettingsError(
            "objective.balance",
            f"is {objective.balance}, which needs flow matching and an understanding loss, but "
            "objective.flow_weight or both objective.caption_weight and "
            "objective.regression_weight are 0; raise them, or set balance to none.",
        )
    if not objective.caption_weight and not objective.regression_weight:
        return
    zero = "set objective.caption_weight and objective.regression_weight to 0."
    if not sequence.supervised_fraction:
        raise SettingsError(
            "sequence.supervised_fraction",
            "is 0, so that no sample gets a caption or metaqueries, but the weight of one of "
            f"them is above 0; raise it, or {zero}",
        )
    low, high = sequence.supervision_window
    if low == high:
        raise SettingsError(
            "sequence.supervision_window",
            f"[{low}, {high}] is empty, so that no sample gets a caption or metaqueries, but the "
            f"weight of one of them is above 0; widen it, or {zero}",
        )


def check_regression(recipe: "Recipe") -> None:
    """Raises SettingsError for settings of the regression that contradict each other."""
    objective, sequence = recipe.objective, recipe.sequence
    _check_target(objective)
    contrastive = objective.regression_loss == CONTRASTIVE
    if contrastive and not objective.regression_weight:
        raise SettingsError(
            "objective.regression_loss",
            "is contrastive, but objective.regression_weight is 0, so that nothing is regressed; "
            "raise the weight, or leave the loss out.",
        )
    if objective.regression_negatives != "pack" and not contrastive:
        raise SettingsError(
            "objective.regression_negatives",
            f"is {objective.regression_negatives}, but objective.regression_loss is "
            f"{objective.regression_loss}, which has no negatives; set it to contrastive.",
        )
    spatial = objective.regression_target_norm != "none"
    if spatial and not objective.regression_weight:
        raise SettingsError(
            "objective.regression_target_norm",
            f"is {objective.regression_target_norm}, but objective.regression_weight is 0, so that "
            "nothing is regressed; raise the weight, or set it to none.",
        )
    if spatial and objective.regression_mean_share == 1 and 1 in sequence.metaquery_grids:
        raise SettingsError(
            "objective.regression_mean_share",
            "is 1, but the one cell of a sequence.metaquery_grid of 1 is the image's mean, of "
            "which nothing is left; lower it, or give a finer grid.",
        )


def _check_target(objective: ObjectiveSettings) -> None:
    target = REGRESSION_TARGETS.get(objective.regression_target)
    if target is None:
        return
    name, encoder = objective.regression_target, objective.regression_encoder
    if encoder is not None and not target.own_encoder:
        raise SettingsError(
            ENCODER_KEY,
            f"is '{encoder}', but objective.regression_target is {name}, which does not read it; "
            "set regression_target=encoder, or leave it out.",
        )
    if not target.reads_vision and not objective.regression_weight:
        raise SettingsError(
            "objective.regression_target",
            f"is {name}, but objective.regression_weight is 0, so that nothing is regressed; raise "
            "the weight, or leave the target out.",
        )
    if target.own_encoder:
        vision_folder_of(objective)


def _check_schedule(recipe: "Recipe") -> None:
    """Raises SettingsError for a schedule of losses that the run does not have, or that leaves it
    without supervision, or without any loss."""
    objective = recipe.objective
    for name in ("caption", "regression"):
        key = f"{name}_weight_by_t"
        if getattr(objective, key) and not getattr(objective, f"{name}_weight"):
            raise SettingsError(
                f"objective.{key}",
                f"is set, but objective.{name}_weight is 0; raise it, or remove {key}.",
            )
        low, high = recipe.sequence.supervision_window
        if low < high and largest_weight(getattr(objective, key), low, high) == 0:
            raise SettingsError(
                f"objective.{key}",
                f"is 0 at every t of sequence.supervision_window, [{low}, {high}]; widen the "
                "window, or change the weights.",
            )
    until = objective.supervise_until
    if until == 1:
        if objective.supervision_decay != "none":
            raise SettingsError(
                "objective.supervision_decay",
                f"is {objective.supervision_decay}, but objective.supervise_until is 1, so that "
                "supervision does not end; give the share of steps at which it ends.",
            )
        return
    key = "objective.supervise_until"
    if not objective.caption_weight and not objective.regression_weight:
        raise SettingsError(
            key,
            f"is {until:g}, but objective.caption_weight and objective.regression_weight are 0: "
            "there is no supervision to end; raise one of them, or remove supervise_until.",
        )
    last = round(until * recipe.steps)
    if not last:
        raise SettingsError(
            key,
            f"is {until:g} of {recipe.steps} steps, which is no step; raise it, or set the weights "
            "of the understanding losses to 0.",
        )
    if not objective.flow_weight and last < recipe.steps:
        raise SettingsError(
            key,
            f"is {until:g}, but objective.flow_weight is 0: after step {last} nothing is left to "
            "train; raise the weight, or remove supervise_until.",
        )


def warnings_without_generation(objective: ObjectiveSettings) -> list[str]:
    """Of a run whose samples have no image to generate: a line about settings of the losses that
    read noised latents, as far as they are not those by default."""
    plain = ObjectiveSettings()
    given = [key for key in _OF_LATENTS if getattr(objective, key) != getattr(plain, key)]
    if not given:
        return []
    keys = ", ".join(f"objective.{key}" for key in given)
    return [f"no source has images to generate, without which nothing comes of {keys}."]


def warnings_of_objective(recipe: "Recipe") -> list[str]:
    """A line for each setting of the losses that has no effect."""
    objective = recipe.objective
    warnings = _warnings_of_regression(objective) + _warnings_of_parts_that_are_off(objective)
    if objective.supervise_until < 1 and recipe.supervised_steps == recipe.steps:
        warnings.append(
            f"objective.supervise_until is {objective.supervise_until:g} of {recipe.steps} steps, "
            "which are all of them: supervision does not end."
        )
    contrasts = objective.regression_weight > 0 and objective.regression_loss == CONTRASTIVE
    finest = max(recipe.sequence.metaquery_grids, default=0)
    patches = recipe.data.vit_image.max_side // recipe.architecture.geometry.vit_stride
    if contrasts and finest > patches:
        warnings.append(
            f"objective.regression_loss is contrastive, but sequence.metaquery_grid has {finest} "
            f"cells a side, and an image of data.vit_image at most {patches} patches a side: cells "
            "with the same target are each other's negatives."
        )
    is_alone = recipe.data.max_samples_per_pack == 1 and recipe.sequence.metaqueries == 1
    if contrasts and is_alone and not objective.gathers_negatives:
        warnings.append(
            "objective.regression_loss is contrastive, but data.max_samples_per_pack is 1 and an "
            "image has one metaquery: without another image in the sample nothing is contrasted, "
            "and the loss is 0."
        )
    return warnings


def _warnings_of_regression(objective: ObjectiveSettings) -> list[str]:
    warnings = []
    default = ObjectiveSettings.regression_temperature
    if objective.regression_loss != CONTRASTIVE and objective.regression_temperature != default:
        warnings.append(
            f"objective.regression_temperature is {objective.regression_temperature:g}, but "
            f"objective.regression_loss is {objective.regression_loss}, which has none."
        )
    if objective.regression_target_norm == "none" and objective.regression_mean_share != 1:
        warnings.append(
            f"objective.regression_mean_share is {objective.regression_mean_share:g}, but "
            "objective.regression_target_norm is none: nothing is subtracted."
        )
    return warnings


def _warnings_of_parts_that_are_off(objective: ObjectiveSettings) -> list[str]:
    """Of settings of a part that is off, which are not those by default."""
    plain = ObjectiveSettings()
    warnings: list[str] = []
    for switch, is_on, keys in (
        (
            "negative_weight",
            objective.negative_weight > 0,
            ("negative_source", "negative_margin", "negative_form"),
        ),
        ("balance", objective.balance != "none", ("balance_ratio", "balance_every")),
    ):
        given = [key for key in keys if getattr(objective, key) != getattr(plain, key)]
        if given and not is_on:
            warnings.append(
                f"objective.{given[0]} is {getattr(objective, given[0])}, but objective.{switch} "
                f"is {getattr(objective, switch)}: it has no effect."
            )
    return warnings
