"""What of the regression weights and shapes do not say: stored in checkpoints, so that a run does
not continue with another target."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from uno_ds.objectives.regression_target import get_regression_target, vision_folder_of
from uno_ds.settings import SettingsError, printable

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


def regression_identity(recipe: "Recipe") -> dict[str, Any]:
    """For the manifest; empty for one grid of metaqueries and targets of the model's own encoder as
    they are. `encoder`: hash of the files of regression_encoder; `norm`: regression_target_norm and
    regression_mean_share."""
    if not recipe.regresses:
        return {}
    objective = recipe.objective
    target = get_regression_target(objective.regression_target)
    identity: dict[str, Any] = {}
    if len(recipe.sequence.metaquery_grids) > 1:
        identity["grids"] = list(recipe.sequence.metaquery_grids)
    if not target.reads_vision:
        identity["target"] = objective.regression_target
    if target.own_encoder:
        identity["encoder"] = vision_folder_of(objective).digest()
    if objective.regression_target_norm != "none":
        norm = [objective.regression_target_norm, objective.regression_mean_share]
        identity["norm"] = norm
    return identity


def foreign_weights(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """{weight of a base: what it was trained for} for those that do not serve this run, though
    their shapes may be the same. `saved`, `ours`: identities."""
    found = {}
    if saved.get("grids") != ours.get("grids"):
        found["metaqueries.weight"] = "other grids"
    if any(saved.get(key) != ours.get(key) for key in ("target", "encoder", "norm")):
        found["regression.weight"] = "another regression target"
    return found


def check_identity(checkpoint: str, saved: Any, ours: dict[str, Any]) -> None:
    """Raises SettingsError if a checkpoint was trained with another regression than this run's.
    `saved`: of its manifest."""
    if saved == ours:
        return
    raise SettingsError(
        "--resume",
        f"{checkpoint} was trained with another regression: {_shown(saved)} there, {_shown(ours)} "
        "in this run; give the sequence.metaquery_grid, objective.regression_target, its norm and "
        "mean share, and files of objective.regression_encoder that it was trained with.",
    )


def _shown(identity: Any) -> str:
    if not identity:
        return "one grid and a target of the model's own encoder, not normalised"
    return printable(json.dumps(identity), 200)
