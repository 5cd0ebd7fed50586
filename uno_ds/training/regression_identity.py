"""What of the regression weights and shapes do not say: stored in checkpoints, so that a run does
not continue with another target."""

import json
from typing import TYPE_CHECKING, Any

from uno_ds.objectives.regression_target import get_regression_target, vision_folder_of
from uno_ds.settings import SettingsError, printable

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


def regression_identity(recipe: "Recipe") -> dict[str, Any]:
    """For the manifest; empty for targets of the model's own encoder. `encoder`: hash of the files
    of regression_encoder."""
    if not recipe.regresses:
        return {}
    objective = recipe.objective
    target = get_regression_target(objective.regression_target)
    identity: dict[str, Any] = {}
    if not target.reads_vision:
        identity["target"] = objective.regression_target
    if target.own_encoder:
        identity["encoder"] = vision_folder_of(objective).digest()
    return identity


def check_identity(checkpoint: str, saved: Any, ours: dict[str, Any]) -> None:
    """Raises SettingsError if a checkpoint was trained with another regression than this run's.
    `saved`: of its manifest."""
    if saved == ours:
        return
    raise SettingsError(
        "--resume",
        f"{checkpoint} was trained with another regression target: {_shown(saved)} there, "
        f"{_shown(ours)} in this run; give the regression_target and the files of "
        "regression_encoder that it was trained with.",
    )


def _shown(identity: Any) -> str:
    return printable(json.dumps(identity), 200) if identity else "that of the model's own encoder"
