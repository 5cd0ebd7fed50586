"""scripts/data.py: what a source is read as, as text, JSON and a page; and its rows as parquet."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_runs import encoded, picture, t2i_row, write_t2i

from uno_ds.commands.data import main
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.data.survey import histogram
from uno_ds.settings import build


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(tmp_path) -> Path:
    """Six usable rows and two that are not."""
    good = [t2i_row(seed=seed) for seed in range(6)]
    bad = [t2i_row(image=b"no image"), t2i_row(captions="{}")]
    write_t2i(tmp_path / "rows/a.parquet", [*good[:3], *bad, *good[3:]])
    return tmp_path / "rows"


def write_parts(folder: Path, rows: list) -> Path:
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(encoded(picture(seed=seed), "PNG"))
    path = folder / "parts.jsonl"
    path.write_text("\n".join(json.dumps({"parts": parts}) for parts in rows))
    return path


EDIT = [
    {"image": "0.png"},
    {"text": "make it <b>red</b>"},
    {"image": "1.png", "generate": True, "captions": ["a red cup"]},
    {"text": ["turn it", "rotate it"]},
    {"image": "2.png", "generate": True},
]
NOTHING_DROPPED = [f"--set=sequence.drop_{what}=0" for what in ("text", "vit", "latent")]


def test_a_source_is_described_as_text(rows, capsys):
    assert main(["look", str(rows), "--n", "2"]) == 0
    printed = capsys.readouterr().out
    assert (
        "is read as 8 rows of layout t2i; image = image; captions = captions; first te" in printed
    )
    assert "8 of 8 rows tried, 6 can be used" in printed
    assert "undecodable_image 1: the first is row 3 of" in printed and "no_caption 1" in printed
    assert printed.count("tokens; images 40x30") == 2 and "by the recipe tiny" in printed


def test_the_same_as_json(rows, capsys):
    assert main(["look", str(rows), "--json", "--rows", "4", "--n", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["rows_tried"], found["rows_usable"]) == (8, 4, 3)
    assert found["skipped"] == {"no_caption": 1}
    assert found["columns"] == {"image": ["image"], "captions": ["captions"]}
    (sample,) = found["samples"]
    assert sample["tokens"] == sum(segment["tokens"] for segment in sample["segments"])
    assert sum(count for _, _, count in found["lengths"]) == 3
    assert all(0 < share <= 1 for share in found["pack_fill"])


def test_a_page_with_pictures_texts_and_who_sees_whom(tmp_path, capsys):
    path = write_parts(tmp_path, [EDIT])
    out = tmp_path / "page.html"
    arguments = ["look", str(path), "--html", str(out), "--set=sequence.supervised_fraction=1"]
    assert main([*arguments, *NOTHING_DROPPED]) == 0
    printed, page = capsys.readouterr().out, out.read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and "make it &lt;b&gt;red" in page
    assert "http" not in page and "a red cup" in page
    # Eleven segments: condition in two views, text, noised latents with two supervisions, the same
    # image in two views, text, noised latents, metaqueries.
    assert page.count("<td class=") == page.count('class="n"') + 11 * 11
    lines = [line.split() for line in printed.splitlines()]
    masks = {
        words[0]: words[2] for words in lines if len(words) == 3 and set(words[2]) <= set("#/.")
    }
    assert masks["3"] == "####......." and masks["4"] == "...#/......"
    assert masks["9"] == "###...####." and masks["10"] == ".........##"


def test_bad_parts_are_counted_by_cause_and_the_first_of_each_is_named(tmp_path, capsys):
    only_conditions = [{"image": "0.png"}, {"text": "a"}, {"image": "1.png"}]
    bad = [
        [{"image": "9.png", "generate": True}],
        [{"text": "a", "role": "tool"}],
        only_conditions,
        only_conditions,
        [{"text": "a", "role": "assistant", "image": "0.png"}],
    ]
    path = write_parts(tmp_path, [EDIT, *bad])
    assert main(["look", str(path), "--n", "0"]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 rows tried, 1 can be used" in printed
    for count, cause, row in (
        (1, "missing_image", 1),
        (1, "unknown_role", 2),
        (2, "no_target", 3),
        (1, "bad_part", 5),
    ):
        assert f"  {cause} {count}: the first is row {row} of" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["look", "nowhere"], "path: source 'nowhere' at 'nowhere': there is no parquet"),
        (["look", "x", "--n", "-1"], "--n must be 0 to 200; got -1"),
        (["look", "x", "--source", "colums=1"], "colums: unknown key; did you mean 'columns'?"),
        (["look", "x", "--source", "columns={image: }"], "columns.image: must be of type str"),
        (["look", "x", "--recipe", "nobody"], "nobody"),
        (["look"], "command line: the following arguments are required: PATH"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_source_without_a_usable_row_is_exit_code_1(tmp_path, capsys):
    write_t2i(tmp_path / "a.parquet", [t2i_row(image=b"")])
    assert main(["look", str(tmp_path / "a.parquet")]) == 1
    assert "1 of 1 rows tried, 0 can be used" in capsys.readouterr().out
    assert main(["look", str(tmp_path / "a.parquet"), "--layout", "edit"]) == 1
    printed = capsys.readouterr().out
    assert (
        "its columns are image, captions\nedit needs {image_list, instruction_list} or" in printed
    )
    assert main(["convert", str(tmp_path / "a.parquet"), str(tmp_path / "out")]) == 1


def opened(path: Path) -> Source:
    return Source(build(SourceSettings, {"path": str(path)}))


TURNS = [
    {"from": "human", "value": "<image>What is it?"},
    {"from": "gpt", "value": "A cup."},
]


@pytest.mark.parametrize("layout", ["t2i", "edit", "vlm", "interleaved"])
def test_converted_rows_read_as_the_rows_of_the_source(tmp_path, layout, capsys):
    folder = tmp_path / "raw"
    folder.mkdir()
    write_parts(folder, [EDIT, [{"image": "9.png", "generate": True}], EDIT, EDIT])
    lines = {
        "t2i": {"jpg": "0.png", "prompt": "a cup", "recaption": "a white cup"},
        "edit": {"src_img": "0.png", "edited_img": "1.png", "edited_prompt_list": ["a", "b"]},
        "vlm": {"image": "0.png", "conversations": TURNS},
    }
    path = folder / "parts.jsonl"
    if layout in lines:
        bad = {**lines[layout], "jpg": "9.png", "src_img": "9.png", "image": "9.png"}
        bad = {key: value for key, value in bad.items() if key in lines[layout]}
        rows = [lines[layout], bad, lines[layout], lines[layout]]
        path.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    assert main(["convert", str(path), str(out), "--rows-per-file", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"3 rows of layout {layout} in 2 files" in printed
    assert "left out: missing_image 1; the first is row 1 of" in printed
    raw, converted = opened(path), opened(out)
    assert (len(converted), converted.layout) == (3, layout)
    for before, after in ((0, 0), (2, 1), (3, 2)):
        examples = [
            source.read(row, np.random.default_rng(0))
            for source, row in ((raw, before), (converted, after))
        ]
        first, second = (vars(example) | {"key": ""} for example in examples)
        assert first == second
    assert main(["convert", str(path), str(out)]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err


def test_a_histogram_counts_every_value_once():
    values = [1, 2, 2, 9]
    counted = histogram(values, bins=4)
    assert sum(count for _, _, count in counted) == 4
    assert (counted[0][0], counted[-1][1]) == (1, 9)
    assert histogram([3, 3]) == [(3, 3, 2)] and histogram([]) == []
