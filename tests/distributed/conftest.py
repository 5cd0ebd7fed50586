"""Processes that live as long as the test session: see ranks.py."""

from collections.abc import Callable, Iterator

import pytest
from fault_table import TABLE, lines
from ranks import ForkServer, Ranks


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Forks the ranks of all tests."""
    process = ForkServer(tmp_path_factory.mktemp("server"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def ranks(
    tmp_path_factory: pytest.TempPathFactory, server: ForkServer
) -> Iterator[Callable[[int], Ranks]]:
    """ranks(n): n ranks, started once."""
    groups: dict[int, Ranks] = {}

    def of_size(size: int) -> Ranks:
        if size not in groups:
            groups[size] = Ranks(server, size, tmp_path_factory.mktemp(f"ranks{size}"))
        return groups[size]

    yield of_size
    for group in groups.values():
        group.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker(pytest.mark.distributed)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE:
        terminalreporter.section("faults (seconds without imports)")
        for line in lines():
            terminalreporter.write_line(line)
