"""What a benchmark defines: its prompts, its settings, where its images lie, and its score."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from uno_ds.data.images import BadRow, ImageSettings, decode
from uno_ds.evaluation.items import Item, seed_of
from uno_ds.evaluation.table import Row
from uno_ds.files_on_disk import read_regular
from uno_ds.settings import SettingsError

# BAGEL evaluates with 50 timesteps, which are 49 Euler steps.
BAGEL_GENERATES = {"steps": 49, "text_guidance": 4.0, "guidance_interval": [0.0, 1.0]}
BAGEL_SIDE = 1024
PROGRAM, LOCAL, JUDGE = "program", "local", "judge"


class Benchmark(ABC):
    """One benchmark. `scored_by`: program, local (models of kept libraries) or judge (a
    vision-language model behind an endpoint). `variants`: sets of prompts to choose from, the first
    by default. `sampler`: BAGEL's settings for it where they differ from the sampler's defaults.
    `fetch`: what to get from where, for the message if it is missing."""

    name: ClassVar[str]
    title: ClassVar[str]
    scored_by: ClassVar[str]
    fetch: ClassVar[str] = ""
    is_edit: ClassVar[bool] = False
    variants: ClassVar[tuple[str, ...]] = ("",)
    images_per_prompt: ClassVar[int] = 1
    sampler: ClassVar[Mapping[str, Any]] = BAGEL_GENERATES

    @abstractmethod
    def items(self, data: Path, variant: str) -> list[Item]:
        """The prompts, in the order of the file. Raises SettingsError that names the file and the
        row."""

    @abstractmethod
    def scored_path(self, item: Item, number: int, variant: str) -> str:
        """Where the benchmark's own scorer reads image `number` of a prompt, below its folder of
        images."""

    @abstractmethod
    def headlines(self, rows: Sequence[Row]) -> dict[str, list[str]]:
        """{headline: columns whose means are averaged}, the overall score first."""

    def drawn_path(self, item: Item, number: int, variant: str) -> str:
        """Where image `number` is written, below the folder of the evaluation."""
        return f"images/{self.scored_path(item, number, variant)}"

    # Most benchmarks have no such files.
    def finish(self, items: Sequence[Item], folder: Path, variant: str) -> None:  # noqa: B027
        """Writes what the benchmark's scorer reads besides the images of these prompts, once they
        are there. `folder`: of the evaluation."""

    def finish_all(self, items: Sequence[Item], folder: Path, variant: str) -> None:  # noqa: B027
        """Writes what it reads for all prompts together. Every rank calls it at its end, so that
        the last one finds all images."""

    def seeds(self, items: Sequence[Item]) -> list[list[int]]:
        """Seeds of the images of every item. The prompt and the number decide; where a prompt comes
        again, its numbers continue."""
        used: dict[str, int] = {}
        found = []
        for item in items:
            identity = "\0".join([item.prompt, *(path.name for path in item.sources)])
            first = used.get(identity, 0)
            numbers = range(first, first + self.images_per_prompt)
            used[identity] = first + self.images_per_prompt
            found.append([seed_of(identity, number) for number in numbers])
        return found

    def source_images(self, item: Item) -> list[Image.Image]:
        """The images that an item edits, decoded. Raises SettingsError."""
        return [open_image(path) for path in item.sources]

    def missing(self, data: Path) -> SettingsError:
        return SettingsError("--data", f"{data} does not exist; {self.fetch}")


def open_image(path: Path, flag: str = "--data") -> Image.Image:
    """A decoded RGB image. Raises SettingsError."""
    try:
        return decode(read_regular(path), ImageSettings())
    except OSError as error:
        raise SettingsError(flag, f"{path} cannot be read: {error.strerror}.") from None
    except BadRow as error:
        raise SettingsError(flag, f"{path} is not a usable image: {error}.") from None


@dataclass(frozen=True)
class Picture:
    """An image of a question. `quarter`: 0 to 3 for one quarter of a 2 x 2 grid, in rows."""

    path: Path
    quarter: int | None = None
