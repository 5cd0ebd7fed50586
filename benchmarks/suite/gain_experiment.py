"""An experiment: arms that post-train one base by one recipe, and what is measured of them."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uno_ds.data.scene_drawing import KINDS
from uno_ds.data.scenes import ScenesSettings
from uno_ds.files_on_disk import read_regular
from uno_ds.model.weights import IncompleteBase
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.settings import SettingsError, build, printable, setting, to_plain
from uno_ds.yaml_text import LONGEST, read_yaml

FOLDER = Path(__file__).resolve().parents[1] / "experiments"
# What the command decides itself, beginning of a key.
DECIDED = ("name", "output", "seed", "checkpoint", "engine.cpu_threads", "hardware.peak_flops")
# What is the same for all arms, beginning of a key: pictures are drawn alike.
SHARED = ("samples",)
# Stands for the base where arms are named.
BASE = "base"
# Of the held-out contents, [low, high) as shares of `data.scenes.held_out`, and the seed of the
# prompts.
SPLITS = {"validation": (0.0, 0.5, 11), "test": (0.5, 1.0, 12)}
# FLOP of a step are kept in metrics.jsonl as a share of this rate.
REFERENCE_FLOPS = 1e12
# More than any run has: all checkpoints are kept until their pictures are drawn.
ALL_CHECKPOINTS = 10**9


@dataclass(frozen=True)
class Experiment:
    name: str = setting(doc="Name of the experiment; its result is in results/gain-NAME.")
    recipe: str = setting(
        doc="Recipe of all arms: a name, or a file, relative to this file or to the present folder."
    )
    overrides: list[str] = setting(factory=list, doc="KEY=VALUE for all arms.")
    base_from: str | None = setting(
        None, doc="The command that makes the base, for the message where it is missing."
    )
    arms: dict[str, list[str]] = setting(doc="Name of an arm: KEY=VALUE that make it.")
    baseline: str = setting("flow", doc="The arm that the others are compared with.")
    seeds: int = setting(5, minimum=1, maximum=1000, doc="Runs of each arm.")
    arm_seeds: dict[str, int] = setting(
        factory=dict, minimum=1, maximum=1000, doc="Runs of an arm that has another number."
    )
    first_seed: int = setting(
        0, minimum=0, maximum=10**6, doc="Seed of the first run of each arm; others count on."
    )
    steps: int = setting(1000, minimum=1, maximum=10**9, doc="Steps at which arms are compared.")
    curve: int = setting(4, minimum=1, maximum=100, doc="Points of the learning curve.")
    kinds: dict[str, float] = setting(
        factory=lambda: {"pair": 1.0, "triple": 1.0},
        minimum=1e-9,
        maximum=1e6,
        doc="Relative frequency of the kinds of scenes among the prompts.",
    )
    curve_prompts: int = setting(
        128, minimum=2, maximum=10**6, doc="Validation prompts at a point of the learning curve."
    )
    prompts: int = setting(
        512, minimum=2, maximum=10**6, doc="Prompts where arms are compared, of either set."
    )
    rows: int = setting(
        128, minimum=1, maximum=10**6, doc="Held-out scenes whose losses are computed."
    )
    times: list[float] = setting(
        factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9], minimum=0, maximum=1, doc="Noise levels."
    )
    batch: int = setting(64, minimum=1, maximum=10_000, doc="Pictures drawn together.")

    def __post_init__(self) -> None:
        if self.baseline not in self.arms:
            known = ", ".join(self.arms) or "none"
            raise SettingsError("baseline", f"'{self.baseline}' is no arm; arms are {known}.")
        for arm in self.arms:
            if not arm.replace("_", "").replace("+", "").replace(".", "").isalnum():
                message = "a name consists of letters, digits and any of _ + ."
                raise SettingsError(f"arms.{printable(arm)}", message)
        if BASE in self.arms:
            message = "is the name of what the arms start from; give the arm another."
            raise SettingsError(f"arms.{BASE}", message)
        if self.steps_of(self.baseline) != self.steps:
            raise SettingsError(
                f"arms.{self.baseline}",
                f"sets steps={self.steps_of(self.baseline)}, but the others are compared with the "
                f"baseline after {self.steps} steps; leave it out.",
            )
        if not self.times:
            raise SettingsError("times", "is empty; give at least one noise level.")
        for arm in self.arm_seeds:
            if arm not in self.arms:
                raise SettingsError(f"arm_seeds.{printable(arm)}", "is no arm of `arms`.")
        for kind in self.kinds:
            if kind not in KINDS:
                message = f"unknown kind of scene; allowed are {', '.join(KINDS)}."
                raise SettingsError(f"kinds.{printable(kind)}", message)
        if self.steps % self.curve:
            message = f"is {self.steps}, which does not divide into {self.curve} points (curve)."
            raise SettingsError("steps", message)
        decided = "which the command decides itself."
        _check_not_set("overrides", self.overrides, DECIDED, decided)
        for arm, given in self.arms.items():
            _check_not_set(f"arms.{arm}", given, DECIDED, decided)
            shared = "which is the same for all arms: set it in `overrides`."
            _check_not_set(f"arms.{arm}", given, SHARED, shared)

    def seeds_of(self, arm: str) -> range:
        return range(self.first_seed, self.first_seed + self.arm_seeds.get(arm, self.seeds))

    def overrides_of(self, arm: str) -> list[str]:
        return [*self.overrides, *self.arms[arm]]

    def steps_of(self, arm: str) -> int:
        """`steps`, unless the arm sets its own number."""
        own = [given.partition("=")[2] for given in self.arms[arm] if given.startswith("steps=")]
        if not own:
            return self.steps
        if not own[-1].isdigit() or not int(own[-1]):
            raise SettingsError(f"arms.{arm}", f"steps={printable(own[-1])} is no whole number.")
        return int(own[-1])

    def curve_steps(self, arm: str) -> list[int]:
        """The points of the learning curve, the last one at `steps_of`."""
        every = self.steps // self.curve
        last = self.steps_of(arm)
        return [*range(every, last, every), last]

    def drawn_from(self, scenes: ScenesSettings) -> ScenesSettings:
        """The settings of the prompts, from those of the training data."""
        plain = to_plain(scenes) | {"kinds": self.kinds}
        return build(ScenesSettings, plain)

    def part(self, split: str, held_out: float) -> tuple[float, float]:
        low, high, _ = SPLITS[split]
        return low * held_out, high * held_out

    def measured_by(self) -> dict[str, Any]:
        """The settings that decide what a measurement is."""
        names = ("kinds", "curve_prompts", "prompts", "rows", "times")
        return {name: to_plain(getattr(self, name)) for name in names}


def read_experiment(name_or_file: str) -> Experiment:
    """Raises SettingsError, one line that names the key or the file."""
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = FOLDER / f"{name_or_file}.yaml" if name_or_file in known else Path(name_or_file)
    try:
        tree = read_yaml(read_regular(path, LONGEST).decode("utf-8-sig"))
    except FileNotFoundError:
        message = f"is neither a file nor one of {', '.join(known)}."
        raise SettingsError(printable(name_or_file), message) from None
    except OSError as error:
        raise SettingsError(str(path), f"is not readable: {error.strerror}.") from None
    except ValueError as error:
        raise SettingsError(str(path), f"is not readable YAML: {printable(error)}.") from None
    experiment = build(Experiment, tree)
    # A file beside the experiment's, else a name or a path as elsewhere.
    beside = path.parent / experiment.recipe
    if beside.suffix and beside.is_file():
        experiment = dataclasses.replace(experiment, recipe=str(beside.resolve()))
    return experiment


def recipe_of(experiment: Experiment, arm: str) -> Recipe:
    """Checked: of an experiment all arms must be comparable. Raises SettingsError."""
    try:
        recipe = load_recipe(experiment.recipe, experiment.overrides_of(arm))
    except IncompleteBase as error:
        if experiment.base_from is None:
            raise
        message = f"{error.message} It is made by: {experiment.base_from}"
        raise SettingsError(error.key, message) from None
    if recipe.base is None:
        raise SettingsError("recipe", f"{experiment.recipe} has no model.base to post-train.")
    if recipe.optimizer.schedule != "constant":
        raise SettingsError(
            "optimizer.schedule",
            "must be constant in an experiment: the baseline trains on beyond the steps of the "
            "others, and a schedule over more steps would be another one from the start.",
        )
    ends_at = recipe.supervised_steps
    if arm == experiment.baseline and ends_at < recipe.steps:
        raise SettingsError(
            f"arms.{arm}",
            f"has an objective.supervise_until of {recipe.objective.supervise_until:g}: the "
            "baseline trains on beyond the steps of the others, and its supervision would end "
            "later from the start; leave it out.",
        )
    if not recipe.data.scenes.held_out > 0:
        raise SettingsError(
            "data.scenes.held_out",
            "must be above 0: the prompts are of contents that no training scene has.",
        )
    return recipe


def identity(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _check_not_set(key: str, overrides: Sequence[str], fixed: Sequence[str], why: str) -> None:
    for given in overrides:
        name = given.partition("=")[0].strip()
        if any(name == start or name.startswith(f"{start}.") for start in fixed):
            raise SettingsError(key, f"sets {printable(name)}, {why}")
