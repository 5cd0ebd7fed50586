"""What a user's own process is: one that no launcher started."""

import os

import pytest

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def remove_launcher(patch: pytest.MonkeyPatch) -> None:
    """This process is none of a launcher's."""
    for name in VARIABLES:
        patch.delenv(name, raising=False)


def environment_without_launcher() -> dict[str, str]:
    """This process's environment, for one that it starts."""
    return {name: value for name, value in os.environ.items() if name not in VARIABLES}
