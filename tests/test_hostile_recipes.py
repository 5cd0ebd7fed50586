"""Recipes and DeepSpeed files that hang, grow or crash a reader end in one line, in bounded time
and memory."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from uno_ds.json_text import read_json
from uno_ds.recipe import load_recipe
from uno_ds.recipe_file import read_tree
from uno_ds.settings import LONGEST_MESSAGE, SettingsError, override
from uno_ds.yaml_text import read_yaml

# Reading the longest text that is accepted takes 2 s on a 2020 core of 25 GFLOP/s; a machine may be
# four times slower, and it may run other things. What is not bounded takes minutes, or for ever.
BOUND = 20.0


def bomb(first: str, item: str) -> str:
    """9^30 values in 30 lines."""
    lines = [f"a0: &a0 {first}"]
    for number in range(1, 30):
        aliases = ", ".join([f"*a{number - 1}"] * 9)
        lines.append(f"a{number}: &a{number} {item.format(aliases)}")
    return "\n".join(lines)


TEXTS = {
    "list of a million": "[" + "1," * 400_000 + "]",
    "deep list": "[" * 100_000,
    "deep mapping": "{a: " * 100_000,
    "deep block": "- " * 100_000,
    "deep and closed": "[" * 900 + "]" * 900,
    "alias bomb": bomb("[x]", "[{0}]"),
    "merge bomb": bomb("{x: 1}", "{{<<: [{0}]}}"),
    "list within itself": "name: &a [*a]",
    "mapping within itself": "name: &a {b: {c: *a}}",
    "unknown alias": "name: *" + "a" * 100_000,
    "5,000 digits": "steps: " + "9" * 5_000,
    "digits in hexadecimal": "steps: 0x" + "f" * 900_000,
    "digits in base 60": "steps: " + ":".join(["1"] * 200_000),
    "digits after a point": "steps: 1." + "1" * 900_000,
    "too long": "# " + "x" * 1_100_000,
    "open string": "name: '" + "x" * 900_000,
    "repeated name": "name: a\nsteps: 1\nname: b",
    "repeated nested name": "model:\n  base: a\n  base: b",
    "repeated merge": "<<: {a: 1}\n<<: {b: 1}",
    "name that is a list": "{[a]: 1}",
    "no such date": "name: 2001-99-99",
    "no truth value": "name: !!bool x",
    "tag of another language": "name: !!python/object/apply:os.system [ls]",
    "control character": "name: \x1b[2J",
    "two documents": "a: 1\n---\nb: 1",
}


def refusal(text: str | bytes, folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    start = time.process_time()
    with pytest.raises(SettingsError) as caught:
        read_tree(str(path))
    assert time.process_time() - start < BOUND
    message = str(caught.value)
    assert message.isprintable() and len(message) <= LONGEST_MESSAGE
    assert message.startswith("--recipe: ") and str(path) in message
    return message


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_hostile_recipe_is_refused_in_one_line_and_bounded_time(text: str, tmp_path: Path):
    refusal(text, tmp_path)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xff\xfe" + "name: x".encode("utf-16-le"), "codec can't decode"),
        (b"name: \xed\xa0\x80", "codec can't decode"),
        (bytes(range(256)), "is not readable YAML"),
        (b"\x00" * 1000, "is not readable YAML"),
        (b"3", "must hold a mapping"),
        (b"[1]", "must hold a mapping"),
        (b"", "must hold a mapping"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(content: bytes, words: str, tmp_path: Path):
    assert words in refusal(content, tmp_path)


def test_a_repeated_name_is_refused_with_its_lines(tmp_path: Path):
    message = refusal(TEXTS["repeated name"], tmp_path)
    assert "'name' occurs twice, in line 1 and in line 3" in message
    repeated = '{"a": {"x": 1,\n "y": [2],\n "\\u0078": 3}}'
    with pytest.raises(ValueError, match="'x' occurs twice in it, in lines 1 and 3"):
        read_json(repeated)


def test_names_that_differ_or_stand_in_different_mappings_are_no_repetition():
    assert read_yaml("a: {x: 1}\nb: {x: 1}\nx: 1\n") == {"a": {"x": 1}, "b": {"x": 1}, "x": 1}
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")["b"] == {"x": 3, "y": 2}
    text = '{"a": {"x": "}{:"}, "b": [{"x": 1}, {"x": "\\""}], "x": 1}'
    assert read_json(text) == json.loads(text)


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbfname: x\n")
    assert read_tree(str(tmp_path / "recipe.yaml")) == {"name": "x"}


def test_overriding_at_an_alias_changes_that_place_alone(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("a: &a {x: [1]}\nb: *a\n")
    tree = read_tree(str(tmp_path / "recipe.yaml"))
    override(tree, "a.x.0=2")
    assert tree == {"a": {"x": [2]}, "b": {"x": [1]}}


def test_a_named_pipe_or_a_device_is_not_waited_for(tmp_path: Path):
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    (tmp_path / "above.yaml").write_text("extends: pipe.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    for path, key in (
        ("pipe.yaml", "--recipe"),
        ("above.yaml", "extends"),
        ("device.yaml", "--recipe"),
    ):
        with pytest.raises(SettingsError, match="not a regular file") as caught:
            read_tree(str(tmp_path / path))
        assert caught.value.key == key
    json_pipe = tmp_path / "pipe.json"
    os.mkfifo(json_pipe)
    with pytest.raises(SettingsError, match="not a regular file"):
        load_recipe("tiny", [f"engine.deepspeed={json_pipe}"]).deepspeed_config()


def test_recipes_that_extend_one_another_end(tmp_path: Path):
    for number in range(30):
        text = f"extends: {number + 1}.yaml"
        (tmp_path / f"{number}.yaml").write_text(text)
    with pytest.raises(SettingsError, match="more than 20 recipes extend one another"):
        read_tree(str(tmp_path / "0.yaml"))
    (tmp_path / "2.yaml").write_text(f"extends: {tmp_path}/../{tmp_path.name}/0.yaml")
    with pytest.raises(SettingsError, match="0.yaml extends itself"):
        read_tree(str(tmp_path / "0.yaml"))


@pytest.mark.parametrize(
    "value", ["[x]", "{a: b}", "3", "null", "x" * 100_000, '"\\0"', '"\\e[2J"']
)
def test_extends_must_name_a_recipe(value: str, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(f"extends: {value}")
    with pytest.raises(SettingsError) as caught:
        read_tree(str(tmp_path / "recipe.yaml"))
    assert caught.value.key == "extends" and str(caught.value).isprintable()
    assert len(str(caught.value)) <= LONGEST_MESSAGE


JSONS = {
    "deep": "[" * 100_000,
    "deep mapping": '{"a":' * 100_000,
    "deep and closed": '{"a":' * 300 + "1" + "}" * 300,
    "5,000 digits": '{"train_batch_size": ' + "9" * 5_000 + "}",
    "beyond 64 bits": '{"zero_optimization": {"sub_group_size": 9223372036854775808}}',
    "infinite": '{"zero_optimization": {"sub_group_size": 1e999}}',
    "not a number": '{"a": [1, {"b": NaN}]}',
    "repeated": '{"zero_optimization": {"stage": 3},\n"zero_optimization": {"stage": 1}}',
    "truth value as a stage": '{"zero_optimization": {"stage": true}}',
    "stage of half": '{"zero_optimization": {"stage": 2.0}}',
    "huge name": '{"' + "x" * 900_000 + '": NaN}',
    "too long": " " * 1_100_000,
    "open string": '{"\\"' + '\\"' * 400_000,
    "binary": "\x00\x01",
    "lone surrogate": '{"\\ud800": NaN}',
}


@pytest.mark.parametrize("text", JSONS.values(), ids=JSONS)
def test_a_hostile_deepspeed_file_is_refused_in_one_line_and_bounded_time(
    text: str, tmp_path: Path
):
    path = tmp_path / "hostile.json"
    path.write_text(text)
    start = time.process_time()
    recipe = load_recipe("tiny", [f"engine.deepspeed={path}"])
    with pytest.raises(SettingsError) as caught:
        recipe.check_world(1)
    assert time.process_time() - start < BOUND
    message = str(caught.value)
    assert message.startswith("engine.deepspeed: ") and str(path) in message
    assert message.isprintable() and len(message) <= LONGEST_MESSAGE


ASSIGNMENTS = [
    "a." * 100_000 + "a=1",
    "objective.answer_weight." + "a." * 100_000 + "a=1",
    "steps." * 25 + "a=1",
    "=",
    "=1",
    " =1",
    ".=1",
    "a..b=1",
    ".a=1",
    "a.=1",
    "steps",
    "",
    "\x1b[2J=1",
    "\ud800=1",
    "\u202ename=1",
    "a\nb.c\rd=1",
    "steps=\x1b[2J",
    "steps=\ud800",
    "steps='\\e[2J'",
    "steps=" + "9" * 5_000,
    "steps=" + "[" * 100_000,
    "steps=&a [*a]",
    "steps={a: 1, a: 2}",
    "steps=" + "x" * 2_000_000,
    "x" * 1_000_000 + "=1",
    "data.sources." + "9" * 5_000 + ".path=x",
    "data.sources.-1.path=x",
    "data.sources.0x0.path=x",
    "data.sources.\u0661.path=x",
    "steps.a=1",
    "1=2",
    "? a=1",
    "null=1",
]


@pytest.mark.parametrize("assignment", ASSIGNMENTS, ids=lambda text: ascii(text)[:30])
def test_a_hostile_assignment_is_refused_in_one_line_and_bounded_time(assignment: str):
    start = time.process_time()
    with pytest.raises(SettingsError) as caught:
        load_recipe("tiny", [assignment])
    assert time.process_time() - start < BOUND
    message = str(caught.value)
    assert message.isprintable() and len(message) <= LONGEST_MESSAGE


def test_the_longest_recipe_that_is_read_may_have_a_thousand_sources(tmp_path: Path):
    sources = [
        {"path": f"data/{number}", "weight": 1.0, "name": str(number)} for number in range(1000)
    ]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": {"sources": sources}}))
    assert read_tree(str(tmp_path / "recipe.yaml"))["data"]["sources"] == sources
