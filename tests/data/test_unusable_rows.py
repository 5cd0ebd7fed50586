"""Rows that cannot be used: found in bounded time, and shown to the user with their place and their
fault."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_runs import encoded, picture, t2i_row, tree, write_t2i
from tokenizers import models, normalizers, pre_tokenizers

from uno_ds.commands.train import main
from uno_ds.data import source_checks
from uno_ds.data.images import BadRow
from uno_ds.data.layouts.text_to_image import TextToImage
from uno_ds.data.source_checks import BadExample, check_usable
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.data.text import Tokenizer
from uno_ds.recipe import RECIPES
from uno_ds.run import prepare
from uno_ds.settings import SettingsError, build
from uno_ds.training import straggler_monitor
from uno_ds.training.report import environment, summarise, write_summary
from uno_ds.training.straggler_monitor import StragglerMonitor


def talk() -> dict:
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "A cup."}]
    return {"conversations": turns}


def written(path: Path, lines: list[str]) -> Source:
    path.write_text("\n".join(lines))
    return Source(build(SourceSettings, {"path": str(path), "layout": "vlm", "name": "chat"}))


def counted(source: Source, monkeypatch) -> list[int]:
    """The indices that will have been read of `source`."""
    seen, read = [], source.read

    def recorded(index: int, rng: np.random.Generator):
        seen.append(index)
        return read(index, rng)

    monkeypatch.setattr(source, "read", recorded)
    return seen


def test_a_source_without_a_usable_row_shows_the_first_rows_fault_and_the_columns(tmp_path):
    lines = [json.dumps({"conversations": [], "picture": "x"}), "{"]
    source = written(tmp_path / "chat.jsonl", lines)
    with pytest.raises(SettingsError) as caught:
        check_usable(source, lambda example: None)
    text = str(caught.value)
    assert "none of its 2 rows can be used (no_conversation 1, bad_json 1)" in text
    assert f"row 0 of '{tmp_path}/chat.jsonl': conversations must be a list of turns" in text
    assert text.endswith("its columns are conversations, picture.")


def test_a_usable_row_is_looked_for_in_bounded_many_rows_spread_over_the_source(
    tmp_path, monkeypatch
):
    bad = written(tmp_path / "bad.jsonl", ["{"] * 200_000)
    seen, reported = counted(bad, monkeypatch), []
    monkeypatch.setattr(source_checks, "SECONDS_BETWEEN_LINES", -1.0)
    with pytest.raises(SettingsError) as caught:
        check_usable(bad, lambda example: None, reported.append)
    assert len(seen) == len(set(seen)) == 10_000 and seen[:1000] == list(range(1000))
    # Spread: no stretch of the source is passed over that is longer than its share.
    assert max(np.diff(seen)) <= -(-199_000 // 9_000) and 200_000 - seen[-1] <= 23
    assert "none of 10000 rows looked at among its 200000 can be used (bad_json 10000)" in str(
        caught.value
    )
    assert reported[499] == (
        "source 'chat': looking for a usable row, 500 of 10,000 tried (bad_json 500)"
    )


@pytest.mark.parametrize("bad, rows", [(3, 5), (999, 20_000), (5_000, 30_000)])
def test_a_usable_row_is_found_behind_bad_ones(tmp_path, monkeypatch, bad, rows):
    source = written(tmp_path / "a.jsonl", ["{"] * bad + [json.dumps(talk())] * (rows - bad))
    seen = counted(source, monkeypatch)
    check_usable(source, lambda example: None)
    assert seen[-1] >= bad > seen[-2] and (bad >= 1000 or seen == list(range(bad + 1)))


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        t2i_row(seed=1),
        t2i_row(encoded(picture(300, 200))[:2000]),
        t2i_row(captions='{"a": '),
        t2i_row(captions="{"),
    ]
    write_t2i(tmp_path / "t2i/a.parquet", rows)
    path = tmp_path / "recipe.json"
    plain = tree(tmp_path, [tmp_path / "t2i"], engine={"packs_per_step": 2})
    path.write_text(json.dumps(plain))
    return path


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stream_keeps_one_row_of_each_cause_the_same_for_any_number_of_ranks(
    recipe, tmp_path, ranks
):
    run = prepare(str(recipe))
    lanes = {}
    for rank in range(ranks):
        stream = run.stream(rank, ranks)
        batches = iter(stream)
        for _ in range(8):
            next(batches)
        stream.close()
        lanes |= stream.skipped_examples()
    file = str(tmp_path / "t2i/a.parquet")
    assert lanes
    for examples in lanes.values():
        assert set(examples) == {"undecodable_image", "bad_json"}
        assert examples["undecodable_image"].row == 1 and examples["bad_json"].row in (2, 3)
        assert {example.file for example in examples.values()} == {file}
        assert all(example.detail for example in examples.values())
    # Whichever rank has lane 0: the row is the lane's own.
    (first,) = run.stream(0, 2).lanes
    bad = None
    while bad is None:
        first.next_pack()
        bad = first.examples.get("bad_json")
    assert lanes[0]["bad_json"] == bad


def test_causes_without_a_count_have_no_example(recipe):
    """Batches that were prepared ahead and not handed out may have met more than the summary
    counts."""
    stream = prepare(str(recipe)).stream(0, 1)
    assert stream.skipped_examples() == {0: {}, 1: {}}
    for lane in stream.lanes:
        lane.examples["bad_json"] = BadExample("a", "a.parquet", 0, "")
    assert stream.skipped_examples() == {0: {}, 1: {}}


def test_the_summary_shows_an_example_beside_each_count(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    examples = {
        "bad_json": {"source": "a", "file": "a`.parquet", "row": 7, "detail": "it `breaks` off"}
    }
    summary = {
        **environment(),
        **summarise(tmp_path / "metrics.jsonl"),
        "parameters": {"trainable": 1, "frozen": 1},
        "checksums": {"frozen_start": "a", "frozen_end": "a"},
        "skipped_samples": {"bad_json": 12, "empty_image": 3},
        "skipped_examples": examples,
        "command": "train.py --recipe \udcff.yaml",
        "exit": "completed",
    }
    write_summary(tmp_path, summary)
    assert json.loads((tmp_path / "summary.json").read_text())["skipped_examples"] == examples
    lines = (tmp_path / "summary.md").read_text(encoding="utf-8").splitlines()
    assert "- bad_json: 12; one is row 7 of `a'.parquet`: `it 'breaks' off`" in lines
    assert "- empty_image: 3" in lines and "skipped_examples" not in "\n".join(lines)
    assert "- command: train.py --recipe \\udcff.yaml" in lines


def test_what_a_row_says_is_printable_wherever_it_is_shown(tmp_path):
    nasty = "a\x1b[31m\udcff\n\u202eb" + "c" * 5000
    error = BadRow("bad_row", nasty)
    assert error.detail.isprintable() and len(error.detail) <= 400 and "\\x1b" not in repr(error)
    assert str(error).startswith("bad_row: a\\u001b[31m\\udcff \\u202eb")
    # A recipe cannot name it, but it may lie in a folder that one names.
    (tmp_path / "a\x1b\udcff.jsonl").write_text("{\n")
    source = Source(build(SourceSettings, {"path": str(tmp_path), "layout": "vlm"}))
    assert source.name.isprintable()
    example = BadExample.of(source, 0, error)
    assert str(example).isprintable() and example.file.endswith("a\\u001b\\udcff.jsonl")
    with pytest.raises(SettingsError) as caught:
        check_usable(source, lambda example: None)
    assert str(caught.value).isprintable()


def test_a_lost_file_is_named_in_a_line_that_can_be_printed(monkeypatch):
    monkeypatch.setattr(straggler_monitor, "gather_objects", lambda own: [own])
    source = SimpleNamespace(lost_files={"a\x1b\udcff.tar": "it is gone"})
    engine = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    stream, collectives = SimpleNamespace(waited=0.0), SimpleNamespace(blocked=0.0)
    (line,) = StragglerMonitor(engine, collectives, stream, [source], every=1).after_step(1, 1.0)
    assert line.startswith("warning: the data file a\\u001b\\udcff.tar is lost: it is gone")


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer(RECIPES / "tiny_base")


@pytest.fixture(scope="module")
def composing(tmp_path_factory) -> Tokenizer:
    """A byte-level BPE like that of Qwen: it composes characters and splits by a pattern."""
    folder = tmp_path_factory.mktemp("composing")
    state = json.loads((RECIPES / "tiny_base" / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "NFC"}
    pattern = {
        "type": "Split",
        "pattern": {"Regex": "\\s+|\\w+"},
        "behavior": "Isolated",
        "invert": False,
    }
    state["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [pattern, state["pre_tokenizer"]],
    }
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return Tokenizer(folder)


# Jamo and combining marks that compose, words of the vocabulary, and anything at all.
PIECES = st.one_of(
    st.sampled_from(
        ["\u1112\u1161\u11ab", "\u03b1\u0313\u0300\u0345", " square", "e\u0301", "\ud800"]
    ),
    st.text(max_size=5),
)


@pytest.mark.parametrize("name", ["tiny", "composing"])
@given(pieces=st.lists(PIECES, max_size=40))
@hypothesis_settings(max_examples=150, deadline=None)
def test_no_text_has_more_characters_than_its_tokens_allow(request, name, pieces):
    tokenizer, text = request.getfixturevalue(name), "".join(pieces)
    assert len(text) <= tokenizer.most_characters(len(tokenizer.encode(text)))


def test_the_bound_is_that_of_the_longest_token(tiny, composing):
    longest = max(tiny._full.get_vocab(with_added_tokens=False), key=len)
    assert tiny.most_characters(3) == 3 * len(longest)
    assert composing.most_characters(3) == 4 * 3 * len(longest)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Replace("a", "")])},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": pre_tokenizers.Split(" ", "removed")},
        {"model": models.WordLevel({"a": 0}, unk_token="a")},
    ],
    ids=["strip", "replace", "whitespace", "removed", "words"],
)
def test_a_tokenizer_that_may_drop_characters_has_no_bound(tiny, change):
    changed = tokenizers.Tokenizer.from_str(tiny._plain.to_str())
    for name, value in change.items():
        setattr(changed, name, value)
    tokenizer = Tokenizer(tiny.folder)
    tokenizer._plain = changed
    assert tokenizer.most_characters(3) is None


def test_a_long_caption_is_refused_or_passed_over_without_being_tokenised(recipe, monkeypatch):
    make = prepare(str(recipe)).make_sample
    lengths: Counter[int] = Counter()
    encode = make.encoder.tokenizer.encode

    def recorded(text: str) -> list[int]:
        lengths[len(text)] += 1
        return encode(text)

    monkeypatch.setattr(make.encoder.tokenizer, "encode", recorded)
    long, picked = "a cup " * 2_000_000, []
    for seed in range(8):
        example = TextToImage("key", picture(), [long, "a cup", "a white cup"])
        sample = make(example, np.random.default_rng(seed))
        picked.append(
            sum(
                len(segment.token_ids)
                for segment in sample.segments
                if segment.token_ids is not None
            )
        )
    assert max(lengths) < 20 and max(picked) < 60
    with pytest.raises(BadRow, match="12,000,000 characters are more than the 48 tokens") as caught:
        make(TextToImage("key", picture(), [long]), np.random.default_rng(0))
    assert caught.value.cause == "text_too_long"


def test_the_error_of_a_start_names_row_fault_and_columns(recipe, tmp_path, capsys):
    write_t2i(tmp_path / "t2i/a.parquet", [t2i_row(image=b""), t2i_row(captions="{")])
    assert main(["--recipe", str(recipe)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "none of its 2 rows can be used (empty_image 1, bad_json 1); row 0 of "
        f"'{tmp_path}/t2i/a.parquet': no bytes; its columns are image, captions."
    )
