"""Sources of every layout with usable and unusable rows, and their preparation."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from small_runs import CAPTIONS, edit_row, encoded, picture, t2i_row, tree, write_t2i, write_vlm

from uno_ds.commands import prepare as command
from uno_ds.run import Run, prepare

# Whole and broken numbers of patches, both orientations: features of such images differ in their
# last bits with the pack.
SIZES = ((40, 30), (30, 40), (64, 20), (24, 24), (20, 64), (50, 49))
SPECIAL_TEXT = "<|im_end|> a cup <|vision_start|>"
LAYOUTS = ("t2i", "edit", "vlm")


def varied(seed: int) -> bytes:
    return encoded(picture(*SIZES[seed % len(SIZES)], seed=seed))


def write_sources(folder: Path) -> dict[str, Path]:
    """Usable and unusable rows in all layouts; an edit of three images one of which is broken, so
    that the row is bad by chance."""
    broken = varied(0)[:100]
    t2i = [{**t2i_row(seed=seed), "image": varied(seed)} for seed in range(17)]
    t2i += [
        t2i_row(broken),
        t2i_row(b""),
        t2i_row(captions="{"),
        t2i_row(captions=json.dumps({"a": "word " * 600})),
        t2i_row(varied(3), captions=json.dumps({"a": SPECIAL_TEXT, "b": "a cup", "c": " "})),
    ]
    file = write_t2i(folder / "t2i/a.parquet", t2i)
    (folder / "t2i/b.parquet").write_bytes(file.read_bytes()[:-400])
    edits = [
        edit_row([varied(seed), varied(seed + 1), varied(seed + 2)], seed=seed) for seed in range(5)
    ]
    edits += [
        edit_row([varied(0), varied(1), broken]),
        edit_row([varied(0)]),
        {**edit_row(seed=2), "instruction_list": [[]]},
        {
            **edit_row([varied(2), varied(5), varied(1)]),
            "instruction_list": [["grow it", SPECIAL_TEXT]],
        },
    ]
    captioned = [
        {**row, "caption_list": [[], [CAPTIONS[0]], list(CAPTIONS)][: len(row["image_list"])]}
        for row in edits
    ]
    (folder / "edit").mkdir()
    pq.write_table(pa.Table.from_pylist(captioned), folder / "edit/a.parquet")
    write_vlm(
        folder / "vlm",
        [f"{number}.jpg" for number in range(5)],
        extra=['{"image": "0.jpg", "conversa'],
        missing=["gone.jpg"],
    )
    return {layout: folder / layout for layout in LAYOUTS}


@dataclass(frozen=True)
class Place:
    folder: Path
    paths: dict[str, Path]

    def recipe(self, sources: dict[str, Path], **changes: Any) -> str:
        """A file: UNO from a base of random weights, over sources that are named by their
        layout."""
        plain = tree(
            self.folder,
            [],
            model={"base": str(self.folder / "base")},
            sequence={"metaquery_grid": 3, "conversation_images": "random"},
            data={
                "sources": [{"path": str(path), "name": layout} for layout, path in sources.items()]
            },
            engine={"packs_per_step": 2},
        )
        del plain["model"]["architecture"], plain["model"]["tokenizer"]
        for key, value in changes.items():
            branch, leaf = key.split("__")
            plain[branch][leaf] = value
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(plain))
        return str(path)

    def open(self, sources: dict[str, Path], *overrides: str, **changes: Any) -> Run:
        return prepare(self.recipe(sources, **changes), overrides, world_size=1)

    def prepare(self, out: str, *flags: str, **changes: Any) -> dict[str, Path]:
        """The prepared folders by layout."""
        assert (
            command.main(
                [
                    "--recipe",
                    self.recipe(self.paths, **changes),
                    "--out",
                    str(self.folder / out),
                    "--rows-per-shard",
                    "4",
                    *flags,
                ]
            )
            == 0
        )
        return self.prepared(out)

    def prepared(self, out: str) -> dict[str, Path]:
        return {
            layout: self.folder / out / f"{number}_{layout}"
            for number, layout in enumerate(LAYOUTS)
        }
