"""Damaged pictures and captions, by the thousand, through everything between a file and a pack: no
row breaks the stream, and every drawn row is either in a pack or counted under its cause."""

import json
import random
from pathlib import Path

import pytest
import yaml
from small_runs import encoded, picture, t2i_row, tree, write_t2i

from uno_ds.data.stream import skipped_samples
from uno_ds.run import prepare

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
PIECES = (
    "a cup",
    "<|im_start|>",
    "<|vision_end|>",
    "\x00",
    "\ud800",
    "\u202e",
    "é",
    "\U0001f3fa",
    " ",
    "\n",
    "{",
    "}",
    '"',
    "\\",
    "<image>",
    "word " * 60,
)


def damaged_image(rng: random.Random) -> bytes:
    content = bytearray(
        encoded(
            picture(rng.randint(1, 90), rng.randint(1, 90), rng.randint(0, 9)), rng.choice(KINDS)
        )
    )
    for _ in range(rng.choice((0, 0, 1, 3, 30))):
        content[rng.choice((rng.randrange(len(content)), rng.randrange(min(64, len(content)))))] = (
            rng.randrange(256)
        )
    return (
        bytes(
            content[
                : rng.choice((len(content), len(content), rng.randrange(len(content) + 1))) or None
            ]
        )
        if rng.random() > 0.05
        else rng.randbytes(99)
    )


def damaged_captions(rng: random.Random) -> str:
    text = (
        "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 6)))
        .encode("utf-8", "replace")
        .decode()
    )
    whole = json.dumps(
        rng.choice(
            (
                {"a": text, "b": "a cup"},
                {"a": text},
                [text],
                text,
                {"a": [text, None, 3]},
                {"a": {"b": text}},
                None,
                7,
            )
        )
    )
    return (
        whole
        if rng.random() < 0.7
        else whole[: rng.randrange(len(whole) + 1)] + rng.choice(PIECES[:3])
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rows", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_pictures_and_captions_are_packed_or_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = random.Random(0)
    # The first row is a good one, for the look at start-up.
    damaged = [
        {"image": damaged_image(rng), "captions": damaged_captions(rng)} for _ in range(rows)
    ]
    path = write_t2i(tmp_path / "t2i" / "a.parquet", [t2i_row(), *damaged])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            tree(tmp_path, [path.parent], data={"prefetch": 0}, engine={"packs_per_step": 1})
        )
    )
    run = prepare(str(recipe), world_size=1)
    stream = run.stream(0, 1)
    (lane,) = stream.lanes
    batches, packed = iter(stream), 0
    while lane.draws <= rows:
        (batch,) = next(batches)
        packed += len(batch.keys)
    skipped = skipped_samples(stream.state)
    # One drawn row may wait for the next pack.
    assert lane.draws - packed - sum(skipped.values()) == (lane.waiting is not None)
    assert packed > rows / 20 and sum(skipped.values()) > rows / 10 and len(skipped) >= 6
    assert set(skipped) <= {
        "undecodable_image",
        "empty_image",
        "bad_json",
        "no_caption",
        "text_too_long",
        "image_too_small",
        "aspect_ratio",
        "image_too_large",
    }
