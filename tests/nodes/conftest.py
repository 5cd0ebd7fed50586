"""Hosts of namespaces. Without root or the packages all tests are skipped, with the reason."""

from collections.abc import Callable, Iterator

import pytest
from cluster import Cluster
from hosts import Hosts, missing

REASON = missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "nodes" not in item.path.parts:
            continue
        item.add_marker(pytest.mark.nodes)
        if REASON:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def make_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Hosts]]:
    """make_hosts(n): n hosts, made once."""
    made: dict[int, Hosts] = {}

    def of_count(count: int) -> Hosts:
        if count not in made:
            made[count] = Hosts(count, tmp_path_factory.mktemp(f"hosts{count}"))
        return made[count]

    yield of_count
    for hosts in made.values():
        hosts.close()


@pytest.fixture(scope="session")
def cluster(
    make_hosts: Callable[[int], Hosts], tmp_path_factory: pytest.TempPathFactory
) -> Cluster:
    return Cluster(make_hosts(2), tmp_path_factory.mktemp("cluster"))


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: links are up and no process is left on the two hosts."""
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        for host in cluster.hosts.hosts:
            host.plug()
        cluster.hosts.wait_until_nothing_runs()
