"""Settings: what is right is built and written back, what is wrong is one line that names the key
and what is allowed."""

import copy
import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from uno_ds.recipe import RECIPES, Recipe, load_recipe, read_tree
from uno_ds.settings import SettingsError, build, describe, override, read_yaml, setting, to_plain
from uno_ds.settings_page import settings_table

THOROUGH = hypothesis_settings(max_examples=200, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Wheel:
    size: int = setting(doc="Inches.", minimum=10, maximum=30)
    tyre: str = setting("soft", doc="Rubber.", choices=("soft", "hard"))


@dataclass(frozen=True)
class Bicycle:
    name: str = setting(doc="Name | of it.")
    wheels: list[Wheel] = setting(doc="Two of them.")
    weight: float = setting(9.5, doc="Kilograms.", above=0)
    gears: list[float] = setting(factory=lambda: [1.0, 2.0], doc="Ratios.", minimum=0.5)
    bell: bool = setting(False, doc="Rings.")
    light: int | None = setting(None, doc="Watts.", minimum=1)
    spare: Wheel | None = setting(None, doc="One more.")
    bags: dict[str, float] = setting(factory=dict, doc="Litres.")

    def __post_init__(self) -> None:
        if len(self.wheels) != 2:
            raise SettingsError("wheels", f"must be two, got {len(self.wheels)}.")


def plain(**changes: Any) -> dict[str, Any]:
    return {"name": "blue", "wheels": [{"size": 28}, {"size": 26, "tyre": "hard"}], **changes}


def refusal(**changes: Any) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        build(Bicycle, plain(**changes))
    assert "\n" not in str(caught.value)
    assert str(caught.value) == f"{caught.value.key}: {caught.value.message}"
    return caught.value


def test_what_is_given_is_kept_and_what_is_not_has_its_default():
    bicycle = build(Bicycle, plain(weight=11, light=3, bags={"left": 4}, spare={"size": 20}))
    assert bicycle == Bicycle(
        name="blue",
        wheels=[Wheel(size=28), Wheel(size=26, tyre="hard")],
        weight=11.0,
        light=3,
        bags={"left": 4.0},
        spare=Wheel(size=20),
    )
    assert (
        isinstance(bicycle.weight, float) and bicycle.gears == [1.0, 2.0] and bicycle.bell is False
    )
    assert build(Bicycle, plain()).gears is not build(Bicycle, plain()).gears


@pytest.mark.parametrize(
    "changes, key, words",
    [
        ({"wieght": 3}, "wieght", "did you mean 'weight'?"),
        ({"zzz": 3}, "zzz", "allowed are name, wheels, weight, gears, bell, light, spare, bags."),
        ({3: 3}, "3", "unknown key"),
        ({"": 3}, "''", "unknown key"),
        ({"wheels": [{"size": 28}, {"sise": 28}]}, "wheels.1.sise", "did you mean 'size'?"),
        ({"wheels": [{"size": 28}, {"tyre": "soft"}]}, "wheels.1.size", "required"),
        ({"wheels": [{"size": 28}, 28]}, "wheels.1", "must be a mapping"),
        ({"wheels": {"size": 28}}, "wheels", "must be a list"),
        ({"wheels": [{"size": 28}]}, "wheels", "must be two, got 1"),
        ({"wheels": [{"size": 28}, {"size": 9}]}, "wheels.1.size", "at least 10, got 9"),
        ({"spare": {"size": 31}}, "spare.size", "at most 30, got 31"),
        (
            {"spare": {"size": 30, "tyre": "wet"}},
            "spare.tyre",
            "must be one of soft, hard; got 'wet'",
        ),
        ({"weight": 0}, "weight", "greater than 0, got 0"),
        ({"gears": [1, 0.4]}, "gears", "at least 0.5, got 0.4"),
        ({"gears": 1.5}, "gears", "must be a list"),
        ({"gears": [1, "x"]}, "gears.1", "must be a finite number, got 'x'"),
        ({"light": 0}, "light", "at least 1, got 0"),
        ({"light": 2.0}, "light", "must be of type int, got 2.0"),
        ({"light": "2"}, "light", "must be of type int, got '2'"),
        ({"bags": [1]}, "bags", "must be a mapping"),
        ({"bags": {"left": "big"}}, "bags.left", "must be a finite number"),
        ({"name": 5}, "name", "must be of type str, got 5"),
        ({"name": None}, "name", "must be of type str, got null"),
        ({"weight": None}, "weight", "must be a finite number, got null"),
        ({"name": "a\nb", "weight": "c\nd"}, "weight", "must be a finite number"),
        ({"a\nb": 1}, "a\nb", "unknown key"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key_and_what_is_allowed(changes, key, words):
    with pytest.raises(SettingsError) as caught:
        build(Bicycle, plain(**{k: v for k, v in changes.items() if isinstance(k, str)}) | changes)
    assert (
        caught.value.key == key
        and words in str(caught.value)
        and len(str(caught.value).splitlines()) == 1
    )


@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_number(value):
    assert (
        refusal(light=value).key == "light"
        and refusal(weight=value).key == "weight"
        and refusal(gears=[1, value]).key == "gears.1"
    )
    assert refusal(bell=int(value)).key == "bell" and refusal(bell=str(value).lower()).key == "bell"


def test_a_float_is_a_finite_number_and_nothing_else():
    for value in (
        math.nan,
        math.inf,
        -math.inf,
        "nan",
        "inf",
        "1e999",
        10**400,
        10**6000,
        b"1",
        [1],
        {},
    ):
        assert "finite number" in refusal(weight=value).message


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("2E3", 2000.0),
        ("1.5", 1.5),
        ("3", 3.0),
        ("1_000", 1000.0),
        ("1.0e-4", 1e-4),
    ],
)
def test_floats_are_read_as_people_write_them(text, value):
    assert build(Bicycle, plain(**yaml.safe_load(f"weight: {text}"))).weight == value
    tree = plain()
    override(tree, f"weight={text}")
    assert build(Bicycle, tree).weight == value


def test_null_means_no_value_only_where_that_is_allowed():
    bicycle = build(Bicycle, plain(light=None, spare=None))
    assert bicycle.light is None and bicycle.spare is None
    assert refusal(wheels=None).key == "wheels" and refusal(bell=None).key == "bell"


@dataclass(frozen=True)
class Tag:
    code: int | str = setting(doc="Either.")


def test_a_value_of_one_of_two_types_is_kept_and_another_is_refused():
    assert build(Tag, {"code": 3}) == Tag(code=3) and build(Tag, {"code": "3"}) == Tag(code="3")
    for value in (None, 3.5, True, [3]):
        with pytest.raises(SettingsError, match="^code: must be of type"):
            build(Tag, {"code": value})


@pytest.mark.parametrize("values", [None, [], "name: x", 3])
def test_what_is_no_mapping_is_refused(values):
    with pytest.raises(SettingsError, match="must be a mapping"):
        build(Bicycle, values)


wheels = st.builds(dict, size=st.integers(10, 30), tyre=st.sampled_from(["soft", "hard"]))
numbers = st.floats(1e-3, 1e6)
# What a file name and a tokenizer take; the rest is refused.
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
bicycles = st.fixed_dictionaries(
    {"name": words, "wheels": st.lists(wheels, min_size=2, max_size=2)},
    optional={
        "weight": numbers,
        "gears": st.lists(st.floats(0.5, 9)),
        "bell": st.booleans(),
        "light": st.none() | st.integers(1, 10**9),
        "spare": st.none() | wheels,
        "bags": st.dictionaries(st.text(), numbers),
    },
)


@THOROUGH
@given(bicycles)
def test_settings_written_as_yaml_build_the_same_settings(values):
    built = build(Bicycle, values)
    written = yaml.safe_dump(to_plain(built))
    assert build(Bicycle, yaml.safe_load(written)) == built
    assert build(Bicycle, to_plain(built)) == built


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=3)
    | st.dates()
)
keys = st.text(max_size=5) | st.integers()
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@THOROUGH
@given(st.sampled_from([field.name for field in fields(Bicycle)] + ["other"]), anything)
def test_any_value_at_any_key_is_built_or_refused_in_one_line(name, value):
    try:
        build(Bicycle, {**plain(), name: value})
    except SettingsError as error:
        assert (
            error.key.startswith(name)
            and len(str(error).splitlines()) == 1
            and len(str(error)) < 400
        )


def test_an_override_sets_one_value_at_any_depth_and_makes_the_mappings_on_its_way():
    tree = plain()
    for assignment in (
        "weight=7",
        "wheels.1.tyre=soft",
        "spare.size=20",
        "bags.left=1e1",
        "gears=[3, 4]",
        "gears.1=5",
        "light=",
        "name= red = blue",
    ):
        override(tree, assignment)
    assert tree == {
        "name": "red = blue",
        "weight": 7,
        "wheels": [{"size": 28}, {"size": 26, "tyre": "soft"}],
        "spare": {"size": 20},
        "bags": {"left": "1e1"},
        "gears": [3, 5],
        "light": None,
    }


@pytest.mark.parametrize(
    "assignment, key, words",
    [
        ("weight", "--set", "expects key.path=value, got 'weight'"),
        ("=3", "--set", "expects key.path=value"),
        ("a..b=3", "--set", "expects key.path=value"),
        (".a=3", "--set", "expects key.path=value"),
        ("weight=[1", "weight", "not valid YAML"),
        ("weight=2001-99-99", "weight", "not valid YAML"),
        ("weight=!!bool x", "weight", "not valid YAML"),
        ("weight=!!python/object:os.system x", "weight", "not valid YAML"),
        ("wheels.2.size=3", "wheels.2.size", "'2' is not an index of a list of 2"),
        ("wheels.-1.size=3", "wheels.-1.size", "not an index"),
        ("wheels.²=3", "wheels.²", "not an index"),
        ("wheels.x=3", "wheels.x", "not an index"),
        ("name.first=3", "name.first", "holds the single value 'blue'"),
        ("gears.0.x=3", "gears.0.x", "holds the single value 1.5"),
        ("gears.0.x.y=3", "gears.0.x.y", "holds the single value 1.5"),
    ],
)
def test_a_bad_override_names_its_key_and_changes_nothing(assignment, key, words):
    tree = plain(gears=[1.5])
    before = copy.deepcopy(tree)
    with pytest.raises(SettingsError) as caught:
        override(tree, assignment)
    assert caught.value.key == key and words in str(caught.value) and "\n" not in str(caught.value)
    assert tree == before


@THOROUGH
@given(st.text(max_size=30))
def test_any_text_is_read_as_yaml_or_refused(text):
    try:
        read_yaml(text)
    except ValueError:
        pass


@pytest.mark.parametrize(
    "text", ["[" * 5000, "9" * 5000, "0x_", "!!int ''", "!!timestamp x", "{a: 1", "\x00"]
)
def test_what_yaml_itself_does_not_catch_is_refused_too(text):
    with pytest.raises(ValueError):
        read_yaml(text)


def test_the_description_lists_every_key_with_its_bounds_and_default():
    assert list(describe(Bicycle)) == [
        ("name", "str", "required", "Name | of it."),
        ("wheels", "list", "required", "Two of them."),
        ("wheels[].size", "int, 10 to 30", "required", "Inches."),
        ("wheels[].tyre", "soft | hard", "soft", "Rubber."),
        ("weight", "float, above 0", "9.5", "Kilograms."),
        ("gears", "list of float, at least 0.5", "[1.0, 2.0]", "Ratios."),
        ("bell", "bool", "false", "Rings."),
        ("light", "int | null, at least 1", "null", "Watts."),
        ("spare", "mapping | null", "null", "One more."),
        ("spare.size", "int, 10 to 30", "required", "Inches."),
        ("spare.tyre", "soft | hard", "soft", "Rubber."),
        ("bags", "mapping of names to float", "{}", "Litres."),
    ]


def leaves(value: Any, path: str = "") -> set[str]:
    """Keys below a settings object, lists by []; a field that holds no settings is a leaf."""
    found: set[str] = set()
    for field in fields(value):
        if not field.init:
            continue
        item, where = getattr(value, field.name), f"{path}{field.name}"
        if is_dataclass(item):
            found |= leaves(item, f"{where}.")
        elif isinstance(item, list) and item and is_dataclass(item[0]):
            found |= leaves(item[0], f"{where}[].")
        else:
            found.add(where)
    return found


def test_the_table_of_recipe_keys_is_complete_and_well_formed():
    architecture = {
        "hidden": 32,
        "layers": 1,
        "heads": 2,
        "kv_heads": 2,
        "mlp": 8,
        "vocabulary": 512,
        "vit_hidden": 8,
        "vit_layers": 1,
        "vit_heads": 1,
        "vit_mlp": 8,
    }
    recipe = build(
        Recipe,
        {
            "name": "x",
            "steps": 1,
            "model": {"architecture": architecture, "tokenizer": "tiny_base"},
            "sequence": {"token_budget": 9},
            "data": {"sources": [{"path": "x"}]},
            "evaluate": {"sources": [{"path": "x"}]},
        },
    )
    lines = settings_table().splitlines()
    cells = [
        [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines
    ]
    assert {len(row) for row in cells} == {4} and all(all(row) for row in cells)
    listed = [row[0].strip("`") for row in cells[2:]]
    assert len(listed) == len(set(listed)) and set(listed) - leaves(recipe) == {
        "model.architecture",
        "data.sources",
        "evaluate.sources",
    }
    assert leaves(recipe) <= set(listed)
    assert all(
        row[2] == "required" or row[2].startswith("`") and row[2].endswith("`") for row in cells[2:]
    )


def test_the_packaged_recipes_are_valid_files():
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert names >= {"tiny", "tiny_base", "bagel_7b_uno"}
    assert {read_tree(name)["name"] for name in names} == names
    # The others need a base that is not here; their dry runs are tested.
    for name in ("tiny", "tiny_base"):
        assert load_recipe(name).name == name
