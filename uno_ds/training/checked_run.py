"""The interface of a run that the training loop uses, so that it does not import `uno_ds.run`."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from uno_ds.data.sources import Source
from uno_ds.data.stream import Stream
from uno_ds.data.text import Tokenizer
from uno_ds.training.checkpoint import Resume

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


class CheckedRun(Protocol):
    """A run whose recipe, base and data have been checked against each other; `uno_ds.run.Run`."""

    @property
    def recipe(self) -> "Recipe": ...

    @property
    def required_tokenizer(self) -> Tokenizer: ...

    @property
    def sources(self) -> list[Source]: ...

    @property
    def resume(self) -> Resume | None:
        """The checkpoints that the run may continue from; None: it starts at step 1."""

    @property
    def resume_flag(self) -> str:
        """The value of --resume."""

    @property
    def overwrite(self) -> bool:
        """Whether the files of an earlier run in the folder are moved aside."""

    @property
    def command(self) -> str:
        """The command that started the run, for its summary."""

    @property
    def exit_file(self) -> Path | None: ...

    @property
    def supervised(self) -> bool:
        """Whether captions or metaqueries supervise noised images, as in UNO."""

    @property
    def read_answers(self) -> bool:
        """Whether some source has answers, and the weight of their loss is above 0."""

    def stream(self, rank: int, world_size: int) -> Stream:
        """The packs of one rank, from the first step on."""
