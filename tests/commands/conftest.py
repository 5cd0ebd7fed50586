"""Prepared folders, made once for all files that read them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from no_launcher import remove_launcher
from preparation_case import Place, write_sources
from small_runs import random_base


@contextmanager
def own_environment(place: Place) -> Iterator[None]:
    """No launcher, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(place.folder / "cache"))
        remove_launcher(patch)
        yield


@pytest.fixture(scope="session")
def place_of_session(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("prepare")
    random_base(folder / "base")
    return Place(folder, write_sources(folder / "data"))


@pytest.fixture(scope="module")
def place(place_of_session: Place) -> Iterator[Place]:
    with own_environment(place_of_session):
        yield place_of_session


@pytest.fixture(scope="session")
def prepared(place_of_session: Place) -> dict[str, Path]:
    """The prepared folders by layout. Each process of pytest-xdist that runs one of these files
    prepares once."""
    with own_environment(place_of_session):
        return place_of_session.prepare("out")
