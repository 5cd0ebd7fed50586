"""`auto` on a GPU: the fastest backend that is right, chosen once for a machine and kept. The
device is faked; stand-ins take the place of backends."""

import contextlib
import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import stand_ins
import torch
import torch.distributed as dist

from uno_ds.cost.scenario import Scenario
from uno_ds.cost.scenario_plan import live_plan
from uno_ds.kernels import backends, self_check
from uno_ds.kernels.check_cases import case_of
from uno_ds.kernels.self_check import Finding, Shapes, examine, fastest
from uno_ds.recipe import load_recipe
from uno_ds.training import check_processes, gpu_machine, kernel_choice
from uno_ds.training.choice_cache import ChoiceCache

CPU = torch.device("cpu")
PACK = Scenario(prompt=5, latents=36, caption=5, metaqueries=4, samples=2)
SHAPES = Shapes("fp32", 4, 2, 16, 2, 8, 64, 96, 128, 24, "cosine", 18, 76, 10, 8)
MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "memory": str(80 * 10**9), "driver": "580.1"}


@pytest.fixture
def attention(monkeypatch):
    """Call it with the names of the stand-ins that are candidates."""

    def use(*names: str) -> None:
        monkeypatch.setitem(backends.KERNELS, "attention", stand_ins.kernel(*names))

    return use


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)


def examined(name: str, kernel: str = "attention") -> Finding:
    case = case_of(kernel, SHAPES, live_plan(PACK), CPU)
    return examine(case, name, SHAPES, CPU)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("right", None),
        ("slow", None),
        ("wrong", "is wrong: the "),
        ("wrong_backward", "is wrong: the gradient of v is off by"),
        ("nothing_but_nan", "is wrong: the output is off by nan"),
        ("raising", "raises RuntimeError: no kernel image is available for this device"),
        ("too_large", "does not fit"),
    ],
)
def test_each_kind_of_backend_is_found_out(name, reason, attention):
    attention(name)
    finding = examined(name)
    assert (finding.reason is None) == (reason is None)
    assert finding.reason is None or finding.reason.startswith(reason), finding.reason
    assert finding.reason is not None or finding.error < finding.allowed and finding.ms > 0
    assert "\n" not in str(finding.reason)


def test_the_fastest_of_the_right_ones_is_chosen(attention):
    attention("slow", "wrong", "right")
    findings = [examined(name) for name in ("slow", "wrong", "right")]
    assert fastest("attention", findings) == "right"
    assert fastest("attention", findings[:2]) == "slow"
    assert fastest("attention", findings[1:2]) is None


@pytest.mark.parametrize("kernel", backends.KERNELS)
def test_the_backends_that_run_on_this_machine_are_right(kernel, monkeypatch):
    # Interpreted kernels are slow.
    monkeypatch.setattr(self_check, "WARMUP", 0)
    monkeypatch.setattr(self_check, "REPEATS", 1)
    found = [examined(name, kernel) for name in backends.KERNELS[kernel].backends]
    names = {finding.backend for finding in found if finding.reason is None}
    assert backends.KERNELS[kernel].reference in names
    for finding in found:
        assert finding.reason is None or finding.reason.startswith("cannot run here")


def test_only_timed_calls_keep_other_candidates_waiting(monkeypatch):
    """What compiles for long or hangs does so before its process asks for the device alone."""
    calls: list[tuple[str, bool]] = []
    holds_lock = False

    @contextlib.contextmanager
    def alone():
        nonlocal holds_lock
        holds_lock = True
        yield
        holds_lock = False

    def timing(backend: str) -> self_check.Timing:
        return self_check.Timing(
            lambda: calls.append(("forward", holds_lock)),
            lambda: calls.append(("both", holds_lock)),
        )

    monkeypatch.setattr(self_check, "WARMUP", 1)
    monkeypatch.setattr(self_check, "REPEATS", 2)
    check = case_of("attention", SHAPES, live_plan(PACK), CPU).checks
    case = self_check.Case("attention", check, timing)
    assert examine(case, "sdpa", SHAPES, CPU, alone).reason is None
    assert calls == [
        ("forward", False),
        ("both", False),
        *[("forward", True)] * 2,
        *[("both", True)] * 2,
    ]


def test_a_process_that_ends_costs_one_candidate_its_row(attention):
    names = ("crashing", "right", "wrong")
    attention(*names)
    setup = functools.partial(stand_ins.register, *names)
    found = check_processes.check(["attention"], SHAPES, PACK, CPU, limit=300.0, setup=setup)
    reasons = {finding.backend: finding.reason for finding in found["attention"]}
    assert reasons["crashing"] == "ended the process of the check (exit code 41)"
    assert reasons["right"] is None and reasons["wrong"].startswith("is wrong")


def test_a_backend_that_hangs_is_stopped_when_the_time_is_over(attention):
    attention("hanging", "right")
    setup = functools.partial(stand_ins.register, "hanging", "right")
    found = check_processes.check(["attention"], SHAPES, PACK, CPU, limit=2.0, setup=setup)
    assert [finding.reason for finding in found["attention"]] == [
        "was stopped: the time of the check was over",
        "was not checked: the 2 s of the check were over",
    ]
    assert [finding.cut_off for finding in found["attention"]] == [1, 1]


def test_candidates_that_the_time_does_not_reach_are_listed(attention):
    attention("right", "slow")
    found = check_processes.check(["attention"], SHAPES, PACK, CPU, limit=0.0)
    assert [finding.reason for finding in found["attention"]] == [
        "was not checked: the 0 s of the check were over"
    ] * 2
    assert [finding.cut_off for finding in found["attention"]] == [1, 1]
    only = {"attention": ["slow"]}
    found = check_processes.check(["attention"], SHAPES, PACK, CPU, limit=0.0, names=only)
    assert [finding.backend for finding in found["attention"]] == ["slow"]


def recipe_with(tmp_path, **kernels):
    recipe = load_recipe("tiny", [f"output={tmp_path}"])
    settings = replace(recipe.kernels, cache=str(tmp_path / "cache"), **kernels)
    return replace(recipe, kernels=settings)


@pytest.fixture
def faked(monkeypatch, one_rank, attention):
    """A machine with a GPU whose checks run in this process; gives how often it was checked."""
    attention("slow", "wrong", "right")
    monkeypatch.setattr(kernel_choice, "gpu_machine", lambda device: MACHINE)
    times = SimpleNamespace(checked=0)

    def check(kernels, shapes, pack, device, limit, names=None):
        times.checked += 1
        times.names = names
        found = {
            kernel: [
                Finding(name, forward_ms=1.0 + number, backward_ms=2.0)
                for number, name in enumerate(backends.KERNELS[kernel].candidates)
            ]
            for kernel in kernels
        }
        if names is not None:
            return times.again
        if "attention" in kernels:
            found["attention"] = [
                Finding("slow", forward_ms=9.0, backward_ms=9.0),
                Finding("wrong", "is wrong: the output is off by nan", float("nan"), 0.1),
                Finding("right", forward_ms=1.0, backward_ms=2.0),
            ]
        return found

    monkeypatch.setattr(kernel_choice, "check", check)
    return times


def test_auto_on_a_gpu_is_chosen_once_logged_and_kept(faked, tmp_path):
    recipe = recipe_with(tmp_path)
    choice = kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    assert choice.settings.attention == "right"
    first = next(line for line in choice.lines if line.startswith("kernels.attention"))
    assert "auto is right (checked now in" in first and "; wrong is wrong: the " in first
    again = kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    assert faked.checked == 1 and again.settings == choice.settings
    assert f"(checked before, {tmp_path}/cache/kernels.json)" in again.lines[0]
    plain = choice.plain()
    assert plain["backends"]["attention"] == "right"
    assert [row["backend"] for row in plain["findings"]["attention"]] == ["slow", "wrong", "right"]
    json.dumps(plain)


def test_what_was_kept_without_a_candidate_of_today_is_checked_anew(faked, tmp_path):
    recipe = recipe_with(tmp_path)
    kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    file = tmp_path / "cache/kernels.json"
    (entry,) = kept = json.loads(file.read_text())
    del entry["findings"]["attention"][0]
    file.write_text(json.dumps(kept))
    choice = kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    assert faked.checked == 2 and choice.source.startswith("checked now")
    kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    assert faked.checked == 2


CUT_OFF = Finding("slow", "was stopped: the time of the check was over", cut_off=1)


def cut_off_at_first(faked, monkeypatch) -> None:
    """The first check does not get to `slow`."""
    first = kernel_choice.check

    def check(*given, names=None):
        found = first(*given, names=names)
        if names is None:
            found["attention"][0] = CUT_OFF
        return found

    monkeypatch.setattr(kernel_choice, "check", check)


def test_a_candidate_that_the_limit_cut_off_is_tried_again_at_the_next_start(
    faked, tmp_path, monkeypatch
):
    cut_off_at_first(faked, monkeypatch)
    recipe = recipe_with(tmp_path)
    assert kernel_choice.choose_kernels(recipe, ["t2i"], CPU).settings.attention == "right"
    faked.again = {"attention": [Finding("slow", forward_ms=0.1, backward_ms=0.1)]}
    choice = kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    assert faked.names == {"attention": ["slow"]} and choice.settings.attention == "slow"
    assert "attention slow tried again in" in choice.lines[0]
    # The others keep what was found of them, and nothing is checked a third time.
    assert [row["backend"] for row in choice.plain()["findings"]["attention"]] == [
        "slow",
        "wrong",
        "right",
    ]
    assert kernel_choice.choose_kernels(recipe, ["t2i"], CPU).settings == choice.settings
    assert faked.checked == 2


def test_a_candidate_that_is_cut_off_at_every_start_is_tried_a_bounded_number_of_times(
    faked, tmp_path, monkeypatch
):
    cut_off_at_first(faked, monkeypatch)
    faked.again = {"attention": [CUT_OFF]}
    recipe = recipe_with(tmp_path)
    for _ in range(5):
        choice = kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    assert faked.checked == self_check.MOST_TRIES == 3
    assert choice.settings.attention == "right"
    reason = choice.findings["attention"][0].reason
    assert reason == "was stopped: the time of the check was over (3 of 3 tries)"


def test_a_named_backend_is_neither_checked_nor_changed(faked, tmp_path):
    recipe = recipe_with(tmp_path, attention="slow")
    choice = kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    assert choice.settings.attention == "slow" and "attention" not in choice.findings


def test_self_check_false_and_a_cpu_take_the_fixed_order(faked, tmp_path, monkeypatch):
    recipe = recipe_with(tmp_path, self_check=False)
    choice = kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    assert choice.source == "fixed order" and not choice.lines and not faked.checked
    monkeypatch.setattr(kernel_choice, "gpu_machine", gpu_machine.gpu_machine)
    recipe = recipe_with(tmp_path)
    choice = kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    assert choice.settings == recipe.kernels.resolved() and not faked.checked


def test_a_check_that_fails_is_a_line_and_the_fixed_order(faked, tmp_path, monkeypatch):
    def check(*_):
        raise RuntimeError("no process\ncan be started")

    monkeypatch.setattr(kernel_choice, "check", check)
    recipe = recipe_with(tmp_path)
    choice = kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    assert choice.settings == recipe.kernels.resolved(recipe.kernel_demands)
    assert len(choice.lines) == 1 and "the check failed: " in choice.lines[0]
    assert "\n" not in choice.lines[0]


def test_what_does_not_fit_is_judged_at_every_start(faked, tmp_path, monkeypatch):
    """By the number of ranks, for one, which is no part of what the cache knows."""
    recipe = recipe_with(tmp_path)
    chosen = []
    for too_large in ({"right": "does not fit: 99 GB"}, {}, {"right": "does not fit: 99 GB"}):
        monkeypatch.setattr(kernel_choice, "too_large_for", lambda *_, found=too_large: found)
        choice = kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
        chosen.append(choice.settings.attention)
    assert chosen == ["slow", "right", "slow"] and faked.checked == 1
    assert choice.findings["attention"][2].reason == "does not fit: 99 GB"


def test_a_check_in_which_nothing_was_right_is_not_kept(faked, tmp_path, monkeypatch):
    first = kernel_choice.check

    def check(*given, names=None):
        found = first(*given, names=names)
        failing = [replace(finding, reason="does not fit") for finding in found["attention"]]
        return found | {"attention": failing}

    recipe = recipe_with(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(kernel_choice, "check", check)
        choice = kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    assert choice.source.endswith("not kept: no backend of attention was found right")
    assert choice.settings.attention == recipe.kernels.resolved().attention
    again = kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    assert faked.checked == 2 and again.settings.attention == "right"


def test_another_driver_or_pack_is_checked_again_and_null_keeps_nothing(
    faked, tmp_path, monkeypatch
):
    recipe = recipe_with(tmp_path)
    kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    monkeypatch.setattr(kernel_choice, "gpu_machine", lambda device: MACHINE | {"driver": "2"})
    kernel_choice.choose_kernels(recipe, ["t2i"], CPU)
    sequence = replace(recipe.sequence, token_budget=recipe.sequence.token_budget * 2)
    kernel_choice.choose_kernels(replace(recipe, sequence=sequence), ["t2i"], CPU)
    assert faked.checked == 3
    nothing = replace(recipe, kernels=replace(recipe.kernels, cache=None))
    for _ in range(2):
        kernel_choice.choose_kernels(nothing, ["t2i"], CPU)
    assert faked.checked == 5


@pytest.mark.parametrize("text", ["", "{", "[]", '[{"key": {}, "findings": 3}]', '["x"]'])
def test_a_damaged_cache_is_checked_anew_and_replaced(text, tmp_path):
    cache = ChoiceCache(str(tmp_path))
    cache.file.write_text(text)
    assert cache.read({"a": (1, 2)}) is None
    assert cache.write({"a": (1, 2)}, {"attention": []}) is None
    assert ChoiceCache(str(tmp_path)).read({"a": (1, 2)}) == {"attention": []}


def test_a_cache_that_cannot_be_written_is_a_sentence_and_no_failure(tmp_path):
    (tmp_path / "file").write_text("")
    problem = ChoiceCache(str(tmp_path / "file")).write({}, {})
    assert problem.endswith("kernels.json cannot be written: File exists")


def test_what_does_not_fit_by_the_cost_model_is_listed_unless_nothing_is_left():
    findings = [
        Finding("sdpa", forward_ms=1.0, backward_ms=1.0),
        Finding("flash", forward_ms=2.0, backward_ms=2.0),
    ]
    too_large = {"sdpa": "does not fit: by the cost model a step needs 99 GB"}
    marked = kernel_choice.without_too_large(findings, too_large)
    assert fastest("attention", marked) == "flash" and marked[0].reason == too_large["sdpa"]
    everything = too_large | {"flash": "does not fit"}
    assert kernel_choice.without_too_large(findings, everything) == findings


def test_the_cost_model_says_what_does_not_fit(one_rank):
    recipe = load_recipe("tiny")
    few = kernel_choice.too_large_for(recipe, PACK, 10**9)
    assert set(few) == {"flash", "sdpa", "triton", "triton_ahead", "flex"}
    assert few["flash"].startswith("does not fit: by the cost model a step needs")
    assert not kernel_choice.too_large_for(recipe, PACK, 10**12)


def test_the_driver_is_read_where_it_is_and_unknown_elsewhere(tmp_path, monkeypatch):
    file = tmp_path / "version"
    monkeypatch.setattr(gpu_machine, "DRIVER_FILE", file)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_machine.driver_version() == "unknown"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release")
    assert gpu_machine.driver_version() == "580.159.04"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12")
    assert gpu_machine.driver_version() == "535.183.01"
