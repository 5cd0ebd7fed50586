"""The embedded scenes: prompts and scores by program, on any machine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from uno_ds.data.scene_drawing import Scene
from uno_ds.data.scene_score import score
from uno_ds.data.scenes import ScenesSettings, prompts
from uno_ds.evaluation.benchmark import PROGRAM, Benchmark
from uno_ds.evaluation.items import Item
from uno_ds.evaluation.table import Row

ASPECTS = ("all", "count", "colours", "shapes", "relation")
PROMPTS = 200


class Scenes(Benchmark):
    """Of each picture: are count, colours, shapes and relation or place right, and all of them?"""

    name: ClassVar[str] = "scenes"
    title: ClassVar[str] = "Embedded scenes"
    scored_by: ClassVar[str] = PROGRAM
    # Those of the text-to-image sampler: BAGEL has none for them.
    sampler: ClassVar[Mapping[str, Any]] = {}

    def items(self, data: Path, variant: str) -> list[Item]:
        return self.first_items(PROMPTS)

    def first_items(self, count: int) -> list[Item]:
        """A fixed list: a shorter one is its beginning."""
        found = []
        for number, (prompt, scene) in enumerate(prompts(ScenesSettings(), count)):
            found.append(Item(f"{number:05d}", prompt, scene["kind"], {"scene": scene}))
        return found

    def seeds(self, items: Sequence[Item]) -> list[list[int]]:
        """The place of the prompt in the fixed list, which decides the prompt too."""
        return [[int(item.key)] for item in items]

    def scored_path(self, item: Item, number: int, variant: str) -> str:
        return f"{item.key}.png"

    def row(self, item: Item, image: Image.Image) -> Row:
        """Scores of the picture of a prompt, in percent."""
        scene: Scene = item.facts["scene"]
        found = score(image, scene)
        values = {aspect: (100.0 * found[aspect], 1.0) for aspect in ASPECTS}
        values[f"all, {item.group}"] = values["all"]
        return Row(item.key, values, prompt=item.prompt, group=item.group)

    def headlines(self, rows: Sequence[Row]) -> dict[str, list[str]]:
        return {"all": ["all"]}
