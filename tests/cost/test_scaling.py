"""The modelled step on many GPUs: its parts by hand, what bounds it, and the command."""

import dataclasses
import json
from pathlib import Path

import pytest

from uno_ds.commands import estimate
from uno_ds.cost.fit import sharding_of
from uno_ds.cost.parameters import Parameter, parameters_of
from uno_ds.cost.scaling import (
    COMPUTING,
    LINK,
    MEMORY,
    NETWORK,
    Links,
    Part,
    bound_of,
    parts_of_step,
    scaling,
)
from uno_ds.cost.scenario import read_scenario
from uno_ds.cost.step_flops import Passes
from uno_ds.cost.traffic import traffic
from uno_ds.recipe import Recipe, load_recipe

FLOP = Passes(forward=2 * 10**12, input_gradient=10**12, weight_gradient=10**12, recompute=10**12)
PACK = "prompt=200,latents=4096,caption=200,metaqueries=256,samples=6"
# 100 GB/s in a host of 4, 50 GB/s of a host to others, of which half is reached.
LINKS = Links(100e9, 50e9, 4, 0.5)


@pytest.fixture(scope="module")
def bagel() -> Recipe:
    return load_recipe("bagel_7b_uno", absent=[])


def test_a_ring_leaves_each_host_once():
    assert LINKS.ring(4) == (50e9, LINK) and LINKS.ring(8) == (25e9, NETWORK)
    assert dataclasses.replace(LINKS, across=200e9).ring(8) == (50e9, LINK)


def test_the_parts_of_a_step_by_hand(bagel: Recipe):
    """One trained weight of 10^9 values in bf16, ZeRO-2 on 8 ranks, one pack: 7/8 of 2 GB are
    gathered after the step and sent twice by an all-reduce in backward, at 25 GB/s."""
    engine = dataclasses.replace(bagel.engine, deepspeed="zero2", packs_per_step=8)
    sharding = sharding_of(dataclasses.replace(bagel, engine=engine), 8)
    weight = Parameter("model.vae2llm.weight", "latent interface", (10**9,), True)
    forward, backward, update = parts_of_step(
        [weight], sharding, True, FLOP, 10e12, LINKS, overlaps=True
    )
    assert (forward.computing, forward.sending) == (0.2, 0)
    assert (backward.computing, backward.sending) == pytest.approx((0.3, 0.14))
    assert (update.computing, update.sending) == pytest.approx((0, 0.07))
    seconds = [part.seconds for part in (forward, backward, update)]
    assert seconds == pytest.approx([0.2, 0.3, 0.07])
    exposed = dataclasses.replace(backward, overlaps=False)
    assert exposed.seconds == pytest.approx(0.44)


@pytest.mark.parametrize(
    ("computing", "everywhere", "within", "overlaps", "bound"),
    [
        (3, 2, 0, True, COMPUTING),
        (3, 4, 0, True, NETWORK),
        (3, 2, 3, True, LINK),
        (3, 2, 0, False, COMPUTING),
        (3, 4, 0, False, NETWORK),
    ],
)
def test_what_bounds_a_step_takes_most_of_its_time(
    computing: float, everywhere: float, within: float, overlaps: bool, bound: str
):
    parts = [Part("backward", computing, everywhere, within, overlaps)]
    assert bound_of(parts, NETWORK) == bound


@pytest.mark.parametrize("configuration", ["zero1", "zero2", "zero3", "zero3_multinode"])
def test_what_the_parts_send_is_what_a_step_sends(configuration: str):
    recipe = load_recipe("tiny", ["engine.packs_per_step=32", f"engine.deepspeed={configuration}"])
    sharding, parameters = sharding_of(recipe, 16), parameters_of(recipe)
    same = Links(1.0, 1.0, 16, 1.0)
    parts = parts_of_step(parameters, sharding, True, FLOP, 1e12, same, True)
    sent = traffic(parameters, sharding, True).total
    assert sent > 0 and sum(part.sending for part in parts) == pytest.approx(sent, abs=4)


def test_points_are_bound_by_memory_network_or_computing(bagel: Recipe):
    pack = read_scenario(PACK)
    links = Links(450e9, 15e9, 8, 0.8)
    found = scaling(bagel, pack, 400e12, links, 80 * 10**9, (64,))
    points = {point.configuration: point for point in found}
    assert len(points) == len(found) == 4
    assert points["zero1"].bound == MEMORY and points["zero1"].peak > 80 * 10**9
    assert points["zero2"].bound == COMPUTING and points["zero3"].bound == NETWORK
    # hpZ gathers within a host in backward.
    assert points["zero3_multinode"].seconds < points["zero3"].seconds
    assert points["zero3_multinode"].peak > points["zero3"].peak
    for point in found:
        assert point.gpu_hours == pytest.approx(1000 * point.seconds / 3600)
        assert point.exposed == pytest.approx(point.seconds - point.computing)


def run(*flags: str) -> int:
    return estimate.main(["--recipe", "bagel_7b_uno", "--scenario", PACK, *flags])


def test_the_command_prints_the_step_and_the_table_and_draws_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("uno_ds.cost.scaling.scaling.__defaults__", ((16,),))
    png = tmp_path / "scaling.png"
    flags = ("--world-size", "16", "--nodes", "4", "--network", "5", "--rate", "400")
    assert run(*flags, "--scaling", str(png)) == 0
    printed = capsys.readouterr().out
    assert "most of it is network between hosts" in printed and "4 GPUs" not in printed
    assert "within a node of 4, 1.25 GB/s per GPU to other nodes (as given)" in printed
    assert "zero3_multinode      16" in printed and png.read_bytes()[1:4] == b"PNG"
    assert run(*flags, "--json") == 0
    time = json.loads(capsys.readouterr().out)["time"]
    low, high = time["step_seconds"]
    assert low * 0.999 <= time["overlapped_seconds"] <= high * 1.001
    assert time["bound"] == NETWORK and [part["name"] for part in time["parts"]] == [
        "forward",
        "backward",
        "update",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--nodes", "2"), "--nodes goes with --rate"),
        (("--network", "1"), "--network goes with --rate"),
        (("--rate", "1", "--nodes", "0"), "--nodes must be at least 1, got 0"),
        (("--rate", "1", "--network", "-1"), "--network must be above 0 and at most 1,000,000"),
        (
            ("--rate", "1", "--world-size", "8", "--nodes", "3"),
            "--nodes: is 3, which does not divide 8 rank(s).",
        ),
        (
            ("--rate", "1", "--scaling", "/nowhere/at/all.png"),
            "--scaling: /nowhere/at/all.png cannot be written: No such file or directory.",
        ),
    ],
)
def test_flags_that_say_nothing_are_refused(
    flags: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("uno_ds.cost.scaling.scaling.__defaults__", ((8,),))
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_recipe_without_a_gpu_needs_its_links(capsys: pytest.CaptureFixture):
    tiny = ["--recipe", "tiny", "--set", "engine.packs_per_step=4", "--world-size", "4"]
    rate = ["--rate", "0.1", "--nodes", "2"]
    assert estimate.main([*tiny, *rate]) == 2
    assert "or --link and --network." in capsys.readouterr().err
    assert estimate.main([*tiny, *rate, "--link", "1"]) == 2
    assert "--network: is needed: 4 ranks are on 2 hosts." in capsys.readouterr().err
    assert estimate.main([*tiny, *rate, "--link", "1", "--network", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert "a device does 0.1 TFLOP/s in a step (an assumption" in printed
    assert "most of it is network between hosts" in printed
