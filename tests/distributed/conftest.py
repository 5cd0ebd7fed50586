"""Processes that live as long as the test session (see ranks.py), and the table of faults."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict

import pytest
from fault_table import TABLE, Survived, lines
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The rows that a test wrote travel with its report: from a worker of xdist to the process that
    prints."""
    report = yield
    if report.when == "call":
        report.user_properties += [("fault", asdict(row)) for row in TABLE]
        TABLE.clear()
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            rows += [Survived(**row) for name, row in report.user_properties if name == "fault"]
    if rows:
        terminalreporter.section("faults (seconds without imports)")
        for line in lines(rows):
            terminalreporter.write_line(line)
