"""A run that nothing happens to, made once: the files of this folder compare theirs with it."""

import pytest
from ranks import ForkServer
from runs import EVERY, Place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Place:
    return Place(tmp_path_factory.mktemp("faults"), server)


@pytest.fixture(scope="session")
def whole(place: Place) -> str:
    """The run that nothing happens to; every rank's operations of its saves are written down."""
    place.run(
        "whole",
        fault={"kind": "save", "record": str(place.folder / "operations")},
        checkpoint={"keep_every": EVERY, "keep_last": 1},
    )
    return "whole"
