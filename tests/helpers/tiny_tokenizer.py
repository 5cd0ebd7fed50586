"""How the tokenizer of the tiny models, which is in the package, was made."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from uno_ds.data import scene_language
from uno_ds.data.scene_drawing import COLOURS, PLACES, RELATIONS, SHAPES, Scene, Thing
from uno_ds.data.text import BOS, EOS, SPECIAL_TOKENS

TINY_VOCABULARY = 512
COMMON_WORDS = (
    "with without white brown grey orange pink small large little big dark light photo image "
    "person people man woman child dog "
    "cat bird horse house street table chair window water grass tree flower mountain cloud "
    "standing sitting holding looking "
    "walking near behind under over front another background"
)


def build_tiny(folder: str | Path) -> None:
    """Trains the byte-level BPE of the tiny models on the sentences of the scenes and writes it
    into `folder`.

    512 ids: the 4 special tokens, 256 bytes (so that any text can be written) and 252 merges.
    Deterministic."""
    words = sorted({word for sentence in corpus() for word in sentence.strip("?.").split(" ")})
    opening = sorted({sentence.strip("?.").split(" ")[0] for sentence in corpus()})
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
    )
    # The words and not the sentences: every word weighs the same, so that each becomes one token,
    # the rare ones too. What merges remain go to words that open a sentence, and then to common
    # words of captions of photographs.
    lines = (
        [" " + word for word in words] * 100
        + opening * 10
        + [" " + word for word in COMMON_WORDS.split()]
    )
    tokenizer.train_from_iterator(lines, trainer)
    assert tokenizer.get_vocab_size() == TINY_VOCABULARY, tokenizer.get_vocab_size()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n")
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration, indent=2) + "\n")


def corpus() -> Iterator[str]:
    """Every kind of sentence of the embedded set, in a fixed order: what the tiny tokenizer is
    trained on."""
    yield "describe the picture."
    for scene in _every_scene():
        yield from scene_language.captions(scene)
        for question, answer in scene_language.questions(scene):
            yield question
            yield answer
        for thing in scene["objects"]:
            for colour, shape in zip(COLOURS, itertools.cycle(SHAPES)):
                yield from scene_language.recolour_instructions(scene, thing, colour)
                yield from scene_language.reshape_instructions(scene, thing, shape)
            if scene["kind"] == "pair":
                yield from scene_language.remove_instructions(scene, thing)
        if scene["kind"] == "pair":
            yield from scene_language.add_instructions(scene, 0)
            yield from scene_language.add_instructions(scene, 1)


def _every_scene() -> Iterator[Scene]:
    def thing(shape: str, colour: str) -> Thing:
        return Thing(shape=shape, colour=colour, x=0.5, y=0.5, size=0.4)

    looks = [thing(shape, colour) for shape, colour in itertools.product(SHAPES, COLOURS)]
    for look in looks:
        yield from (
            Scene(kind="one", objects=[look], place=place, relation=None) for place in PLACES
        )
        yield from (
            Scene(kind="count", objects=[look] * number, place=None, relation=None)
            for number in (2, 3)
        )
    for index, (first, second) in enumerate(itertools.permutations(looks, 2)):
        if (
            index % 7 == 0
            and first["shape"] != second["shape"]
            and first["colour"] != second["colour"]
        ):
            yield from (
                Scene(kind="pair", objects=[first, second], place=None, relation=relation)
                for relation in RELATIONS
            )
