"""Recipes, a base and data files that are small enough for a test, in the layouts of real ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from uno_ds.model.architecture import Architecture, write_architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.weights import write_weights
from uno_ds.recipe import RECIPES, merge
from uno_ds.settings import build

ARCHITECTURE = {
    "hidden": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "mlp": 64,
    "vocabulary": 512,
    "vit_hidden": 24,
    "vit_layers": 1,
    "vit_heads": 2,
    "vit_mlp": 48,
    "vit_patch": 8,
    "vit_side": 4,
    "codec": "pixel",
    "codec_downsample": 2,
    "latent_channels": 12,
    "latent_patch": 2,
    "latent_side": 8,
}
IMAGES = {"max_side": 32, "min_side": 16, "max_pixels": 1024}
CAPTIONS = ("a cup on a table", "a white cup stands on a wooden table.", "portrait of a cup")


def tree(folder: Path, sources: Sequence[Path | str], **changes: Any) -> dict[str, Any]:
    """A recipe from scratch over `sources` whose run and whose drawn data are kept below
    `folder`."""
    plain = {
        "name": "small",
        "output": str(folder / "runs"),
        "steps": 2,
        "model": {"architecture": dict(ARCHITECTURE), "tokenizer": "tiny_base"},
        "objective": {"caption_weight": 0.1, "regression_weight": 0.2},
        "sequence": {"token_budget": 640, "max_text_tokens": 48, "metaquery_grid": 2},
        "data": {
            "folder": str(folder / "drawn"),
            "scenes": {"rows": 24},
            "latent_image": dict(IMAGES),
            "vit_image": dict(IMAGES),
            "sources": [{"path": str(path)} for path in sources],
        },
        "engine": {"precision": "fp32"},
        "logging": {"tensorboard": False},
    }
    return merge(plain, changes)


def random_base(folder: Path, **changes: Any) -> Path:
    """A base folder with random weights and the tokenizer that ships with the project; `changes` to
    its architecture.
    """
    shape = build(Architecture, ARCHITECTURE | changes)
    torch.manual_seed(0)
    parameters = dict(Bagel(shape).named_parameters())
    write_weights(folder, parameters, parameters.__getitem__)
    write_architecture(shape, folder)
    return copy_tokenizer(folder)


def copy_tokenizer(folder: Path) -> Path:
    """The tokenizer that ships with the project, into `folder`."""
    for file in (RECIPES / "tiny_base").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Smooth random colours, as of a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    return pictures.encoded(image, kind, **options)


def t2i_row(
    image: bytes | None = None, captions: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Captions are numbered by the seed, so that no two rows have the same."""
    texts = {
        name: f"{caption} {seed}" for name, caption in zip(("short", "detailed", "alt"), CAPTIONS)
    }
    return {
        "image": encoded(picture(seed=seed)) if image is None else image,
        "captions": json.dumps(texts) if captions is None else captions,
    }


def edit_row(images: list[bytes] | None = None, seed: int = 0) -> dict[str, Any]:
    given = images or [
        encoded(picture(seed=seed)),
        encoded(picture(seed=seed).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    ]
    return {
        "image_list": given,
        "instruction_list": [[f"flip the picture {seed}", "mirror the image"]] * (len(given) - 1),
    }


def write_t2i(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_rows(path, rows, pa.schema([("image", pa.binary()), ("captions", pa.string())]))


def write_edit(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_rows(
        path,
        rows,
        pa.schema(
            [
                ("image_list", pa.list_(pa.binary())),
                ("instruction_list", pa.list_(pa.list_(pa.string()))),
            ]
        ),
    )


def write_vlm(
    folder: Path, names: Sequence[str], extra: Sequence[str] = (), missing: Sequence[str] = ()
) -> Path:
    """conversations.jsonl about images in images/, with `extra` lines and lines about images that
    are `missing`."""
    (folder / "images").mkdir(parents=True)
    for seed, name in enumerate(names):
        (folder / "images" / name).write_bytes(encoded(picture(seed=seed)))
    lines = [
        json.dumps(
            {
                "image": name,
                "conversations": [
                    {"from": "human", "value": "<image>\nDescribe the picture."},
                    {"from": "gpt", "value": f"A cup, {name}."},
                ],
            }
        )
        for name in (*names, *missing)
    ]
    path = folder / "conversations.jsonl"
    path.write_text("\n".join([*lines, *extra]) + "\n")
    return path


def write_photos(folder: Path) -> dict[str, Path]:
    """{layout: folder} of small sets in the three layouts: two files of t2i, an edit with a
    sequence of three images, conversations."""
    write_t2i(folder / "t2i/00000.parquet", [t2i_row(seed=seed) for seed in range(6)])
    write_t2i(folder / "t2i/00001.parquet", [t2i_row(seed=seed) for seed in range(6, 12)])
    three = [encoded(picture(seed=seed)) for seed in (20, 21, 22)]
    write_edit(
        folder / "edit/00000.parquet",
        [edit_row(three, seed=20), *(edit_row(seed=seed) for seed in range(30, 38))],
    )
    write_vlm(folder / "vlm", [f"{number}.jpg" for number in range(6)])
    return {layout: folder / layout for layout in ("t2i", "edit", "vlm")}


def write_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path
