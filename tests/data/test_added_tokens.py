"""Added tokens of a tokenizer that text does not reach are named by every command that reads it."""

import json
from pathlib import Path

import pytest
import yaml
from small_runs import copy_tokenizer, random_base, t2i_row, tree, write_t2i
from tokenizers import AddedToken
from tokenizers import Tokenizer as LibraryTokenizer

from uno_ds.commands import sample, train, weights
from uno_ds.data.text import Tokenizer

# As Qwen2.5 and Qwen3 have them, the last two not special.
OF_QWEN = ("<|endoftext|>", "<|vision_pad|>", "<|fim_prefix|>", "<tool_call>", "</think>")


def with_added(folder: Path, *tokens: str) -> Path:
    """The folder's tokenizer with `tokens` added, not special, as transformers' add_tokens does."""
    path = folder / "tokenizer.json"
    tokenizer = LibraryTokenizer.from_file(str(path))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    tokenizer.save(str(path))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_tokenizer(tmp_path)


def test_an_added_word_is_spelt_in_pieces_and_said_to_be(folder):
    tokenizer = Tokenizer(with_added(folder, "sks", "Zürich", " kumquat", "<new>"))
    assert len(tokenizer.encode("a sks")) > len(tokenizer.encode("a")) + 1
    (warning,) = tokenizer.warnings()
    assert str(folder) in warning and "sks, Zürich,  kumquat and 1 more" in warning
    assert "spelt in pieces" in warning


def test_control_tokens_of_qwen_and_words_that_stay_whole_are_no_warning(folder):
    tokenizer = Tokenizer(with_added(folder, *OF_QWEN))
    assert tokenizer.warnings() == []
    state = json.loads((folder / "tokenizer.json").read_text())
    # An id of the vocabulary, which the merges make of the text.
    word = next(word for word in state["model"]["vocab"] if word == "circle")
    state["added_tokens"].append(
        state["added_tokens"][0]
        | {"id": state["model"]["vocab"][word], "content": word, "special": False}
    )
    (folder / "tokenizer.json").write_text(json.dumps(state))
    whole = Tokenizer(folder)
    assert whole.encode("circle") == [state["model"]["vocab"][word]]
    assert whole.warnings() == []


def test_every_command_that_reads_the_tokenizer_says_it(tmp_path, capsys, monkeypatch):
    base = random_base(tmp_path / "base", vocabulary=520)
    with_added(base, "sks")
    assert weights.main(["import", str(base), str(tmp_path / "out")]) == 0
    assert "warning: the tokenizer in " in capsys.readouterr().err
    write_t2i(tmp_path / "t2i" / "a.parquet", [t2i_row()])
    plain = tree(tmp_path, [tmp_path / "t2i"], model={"base": str(base)})
    del plain["model"]["architecture"], plain["model"]["tokenizer"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    recipe = ["--recipe", str(tmp_path / "recipe.yaml")]
    assert train.main([*recipe, "--dry-run", "--json"]) == 0
    assert "adds sks," in json.loads(capsys.readouterr().out)["warnings"][0]
    monkeypatch.setattr("uno_ds.training.loop.train", lambda *arguments: 0)
    assert train.main(recipe) == 0
    assert "warning: the tokenizer in " in capsys.readouterr().out
    drawing = ["generate", "--checkpoint", str(base), "--prompt", "x", "--steps", "1"]
    assert sample.main([*drawing, "--out", str(tmp_path / "drawn")]) == 0
    assert "warning: the tokenizer in " in capsys.readouterr().err
