"""Recipes with anything for a value: either a recipe that can be planned, or one short printable
line, in bounded time."""

import copy
import random
import time
import tracemalloc
from typing import Any

import pytest

from uno_ds.commands.dry_run import estimate
from uno_ds.recipe import Recipe
from uno_ds.recipe_checks import warnings_of_recipe
from uno_ds.recipe_file import read_tree
from uno_ds.settings import LONGEST_MESSAGE, SettingsError, build, describe, override, printable

# A case takes 20 ms, the longest 0.5 s, on a core of 25 GFLOP/s, and a machine may be four times
# slower and do other things besides.
BOUND_SECONDS = 5.0
# What a case holds beside its own text: the plain tree and a narrow model's shapes, 1 MB as
# measured.
BOUND_BYTES = 50_000_000

NUMBERS = [
    *("0", "1", "-1", "2", "3", "0.5", "-0.0", "1e-9", "1.0e-9", "1.0e-300", "5.0e-324", "1.0e+30"),
    *("1.0e+308", "1.0e+999", ".inf", "-.inf", ".nan", "'nan'", "'inf'", "'1_0'", "' 7 '", "0x10"),
    *("0b1", "0o7", "1:30", "1_000", "1000000", "1000000000", "1000000000000000000"),
    *(
        "2147483648",
        "4294967296",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551616",
    ),
    *("-9223372036854775809", "9" * 300, "9" * 5000, "1." + "1" * 300, "1e400"),
]
OTHERS = [
    *(
        "",
        "~",
        "null",
        "true",
        "off",
        "yes",
        "''",
        "' '",
        "x",
        "'\\0'",
        '"\\0"',
        '"\\e[2J"',
        "'\ud800'",
    ),
    *(
        '"\\ud800"',
        "\u202e",
        "\u2028",
        "é",
        "\U0001f3fa",
        "a/b",
        "..",
        ".",
        "/",
        "~root",
        "~nobody_x",
    ),
    *("[]", "{}", "[1]", "[1, 2]", "[1, 0]", "[.nan, 1]", "[0, 1, 2]", "[[1]]", "{a: 1}", "{1: 2}"),
    *(
        "[null]",
        "{null: null}",
        "[{}]",
        "!!set {a}",
        "!!binary aGk=",
        "2001-01-01",
        "2001-01-01 1:2:3",
    ),
    *(
        "!!omap [a: 1]",
        "&a [*a]",
        "*a",
        "%",
        "@",
        "`",
        "[",
        "{",
        "]",
        "}",
        "- x",
        "? x",
        ": x",
        "# x",
    ),
    *(
        "x" * 100_000,
        "[" + "1," * 3_000 + "]",
        "[" * 1000,
        "{" + "a: {" * 40 + "}" * 41,
        "/" * 5000,
    ),
]
TREE = read_tree("tiny")
KEYS = [
    key.replace("[]", ".0")
    for key, *_ in describe(Recipe)
    # The sizes of a model are checked where it is described.
    if not key.startswith("model.architecture")
]


def judge(assignments: list[str]) -> SettingsError | None:
    """The refusal of the shipped recipe with these changes; None if it can be planned."""
    given: Any = None
    start = time.process_time()
    try:
        tree = copy.deepcopy(TREE)
        for assignment in assignments:
            override(tree, assignment)
        recipe = build(Recipe, tree)
        if recipe.engine.packs_per_step is not None:
            recipe.check_world(recipe.engine.packs_per_step)
        layouts = [source.layout.replace("auto", "t2i") for source in recipe.data.sources]
        recipe.check_data([(source.path, "t2i") for source in recipe.data.sources], None)
        assert all(line.isprintable() for line in warnings_of_recipe(recipe))
        estimate(recipe, recipe.engine.packs_per_step or 1, layouts)
    except SettingsError as error:
        given = error
    assert time.process_time() - start < BOUND_SECONDS
    if given is not None:
        message = str(given)
        assert message.isprintable() and len(message) <= LONGEST_MESSAGE, message
    return given


def names(error: SettingsError, assignments: list[str]) -> bool:
    """The message names a key that was changed, one that does not go with it, or what is wrong
    about the assignment."""
    known = {key for key, *_ in describe(Recipe)}
    known |= {part for key in known for part in (key, key.rsplit(".", 1)[0], key.split(".")[0])}
    keys = {assignment.partition("=")[0].strip() for assignment in assignments}
    key = str(error).partition(": ")[0]
    return key in known | {printable(k) for k in keys} | {"--set"} or key.split(".")[0] in known


def check(key: str, value: str) -> None:
    error = judge([f"{key}={value}"])
    assert error is None or names(error, [f"{key}={value}"]), f"{key}={value:.50}: {error}"


@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_a_key_makes_a_recipe_or_one_line(key: str):
    rng = random.Random(key)
    for value in [*rng.sample(NUMBERS, 2), *rng.sample(OTHERS, 2)]:
        check(key, value)


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_most_values_of_a_key_make_a_recipe_or_one_line(key: str):
    rng = random.Random(key)
    for value in [*rng.sample(NUMBERS, 25), *rng.sample(OTHERS, 25)]:
        check(key, value)


@pytest.mark.parametrize("key", ["model.base", "model.tokenizer"])
# Too long as a name, and as a path once a file of the folder is appended.
@pytest.mark.parametrize("path", ["x" * 20_000, "/".join(["x" * 203] * 20)], ids=["name", "path"])
def test_a_path_that_is_too_long_is_one_line(key: str, path: str):
    error = judge([f"{key}={path}", *(["model.architecture="] if key == "model.base" else [])])
    assert error is not None and str(error).startswith(f"{key}: '")


def test_several_changes_make_a_recipe_or_one_line():
    rng, right = random.Random(0), 0
    for _ in range(30):
        keys = rng.sample(KEYS, 5)
        right += judge([f"{key}={rng.choice(NUMBERS + OTHERS)}" for key in keys]) is None
    # Five random values seldom fit; where all do, the recipe was planned.
    assert right < 15


ALIAS_BOMB = (
    "[&a [x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]"
)


@pytest.mark.parametrize(
    "value",
    [
        ALIAS_BOMB + ", &d [*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]]",
        ALIAS_BOMB + "]",
        "[" * 20_000,
        "9" * 20_000,
        "x" * 100_000,
        '"' + "\\U000f0000" * 10_000 + '"',
        "1000000000000",
    ],
    ids=lambda value: f"{len(value)} {value[:10]}",
)
def test_a_refusal_takes_no_memory(value: str):
    tracemalloc.start()
    judge([f"data.prefetch={value}"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < BOUND_BYTES
