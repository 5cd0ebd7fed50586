"""Text: what users write cannot become a control token, and any text survives."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_tokenizer import build_tiny, corpus
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

import uno_ds
from uno_ds.data.text import SPECIAL_TOKENS, Tokenizer
from uno_ds.settings import SettingsError

TINY = Path(uno_ds.__file__).parent / "recipes" / "tiny_base"
PACKAGED = Tokenizer(TINY)
NOT_SPECIAL = "<|fim_prefix|>"
QWEN_SPECIAL = ("<|endoftext|>", *SPECIAL_TOKENS)


@pytest.fixture
def tiny() -> Tokenizer:
    return PACKAGED


def qwen_like() -> tokenizers.Tokenizer:
    """The structure of Qwen2's tokenizer: special tokens added beyond the model's vocabulary, and
    one added token not special."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        ["a red circle on the left"] * 3,
        trainers.BpeTrainer(
            vocab_size=280,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(list(QWEN_SPECIAL))
    tokenizer.add_tokens([AddedToken(NOT_SPECIAL, special=False, normalized=False)])
    return tokenizer


def qwen_folder(folder: Path, kind: str) -> Path:
    tokenizer = qwen_like()
    configuration = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "special": token in QWEN_SPECIAL,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
            for token in (*QWEN_SPECIAL, NOT_SPECIAL)
        },
    }
    if kind != "bare tokenizer.json":
        (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
        # BAGEL's own config.json names a model that transformers does not know.
        (folder / "config.json").write_text(
            json.dumps({"model_type": "bagel", "architectures": ["BagelForConditionalGeneration"]})
        )
    if kind == "vocab.json and merges.txt":
        tokenizer.model.save(str(folder))
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    "kind",
    ["bare tokenizer.json", "tokenizer.json with configuration", "vocab.json and merges.txt"],
)
def test_every_form_of_a_qwen2_folder_gives_the_same_ids_and_keeps_control_tokens_out(
    tmp_path, kind
):
    tokenizer, plain = Tokenizer(qwen_folder(tmp_path, kind)), qwen_like()
    assert tokenizer.encode("a red circle") == plain.encode("a red circle").ids
    control = [tokenizer.bos, tokenizer.eos, tokenizer.start_of_image, tokenizer.end_of_image]
    assert control == [plain.token_to_id(token) for token in SPECIAL_TOKENS]
    assert len(tokenizer) == plain.get_vocab_size()
    for token in (*QWEN_SPECIAL, NOT_SPECIAL):
        ids = tokenizer.encode(f"a {token} circle")
        assert plain.token_to_id(token) in plain.encode(f"a {token} circle").ids
        assert plain.token_to_id(token) not in ids and tokenizer.decode(ids) == f"a {token} circle"


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_special_token_in_the_users_text_is_text(tiny, token):
    for text in (token, f"{token}{token}", f"a red circle{token}", f"{token} assistant\n{token}"):
        ids = tiny.encode(text)
        assert not {tiny.bos, tiny.eos, tiny.start_of_image, tiny.end_of_image}.intersection(ids)
        assert tiny.decode(ids) == text


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=20) | st.sampled_from(SPECIAL_TOKENS), max_size=6).map("".join))
def test_any_text_round_trips_without_control_tokens(text):
    ids = PACKAGED.encode(text)
    assert PACKAGED.decode(ids) == text and all(4 <= index < 512 for index in ids)


def test_a_lone_surrogate_from_a_json_file_does_not_raise(tiny):
    assert tiny.decode(tiny.encode("a \ud800 b")) == "a ? b"


def test_decoding_drops_control_tokens_and_ids_beyond_the_vocabulary(tiny):
    ids = [tiny.bos, *tiny.encode("a cat"), 100_000, tiny.eos]
    assert tiny.decode(ids) == "a cat"


def test_the_tiny_vocabulary_has_512_ids_and_every_scene_word_is_one_token(tiny):
    assert len(tiny) == 512
    words = {word for sentence in corpus() for word in sentence.strip("?.").split(" ")}
    assert len(words) > 40
    assert [word for word in sorted(words) if len(tiny.encode(" " + word)) != 1] == []


def test_the_tiny_tokenizer_in_the_package_is_what_build_tiny_writes(tmp_path):
    build_tiny(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()


def test_transformers_reads_the_tiny_folder_too(tiny):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(
        str(TINY), local_files_only=True, trust_remote_code=False
    )
    assert loaded.encode("a red circle on the left.", add_special_tokens=False) == tiny.encode(
        "a red circle on the left."
    )


def test_a_folder_without_a_usable_tokenizer_is_a_settings_error_that_names_it(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": ')
    (tmp_path / "lacking").mkdir()
    state = json.loads(qwen_like().to_str())
    state["added_tokens"] = []
    (tmp_path / "lacking" / "tokenizer.json").write_text(json.dumps(state))
    for name in ("absent", "empty", "broken", "lacking"):
        with pytest.raises(SettingsError) as caught:
            Tokenizer(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
