"""Which steps of a run torch's profiler traces."""

from dataclasses import dataclass

from uno_ds.settings import SettingsError, setting

# A trace of a step of 28 layers holds some 100,000 events, all in main memory until it is written.
MOST_STEPS = 100


@dataclass(frozen=True)
class TraceSettings:
    steps: list[int] = setting(
        factory=list,
        minimum=1,
        maximum=10**9,
        doc="First and last step of a trace in the run's folder, e.g. [20, 25]; []: none. A file "
        "`trace` in the folder of a running job asks for one too.",
    )
    ranks: list[int] = setting(
        factory=lambda: [0], minimum=0, maximum=10**6, doc="Ranks that write a trace."
    )
    allocations: int = setting(
        0,
        minimum=0,
        maximum=10**7,
        doc="Allocations on a GPU whose stacks are kept, for the snapshot of its memory that is "
        "written when memory runs out; 0: the snapshot has no stacks. Each allocation takes longer "
        "while they are kept.",
    )

    def __post_init__(self) -> None:
        if self.steps and len(self.steps) != 2:
            raise SettingsError(
                "steps", f"must be [first, last] or [], got {len(self.steps)} number(s)."
            )
        if self.steps and not 0 <= self.steps[1] - self.steps[0] < MOST_STEPS:
            raise SettingsError(
                "steps",
                f"must be [first, last] with at most {MOST_STEPS} steps, got {self.steps}.",
            )
        if self.steps and not self.ranks:
            raise SettingsError("ranks", "is [], but steps are to be traced; name a rank.")


@dataclass(frozen=True)
class TraceRequest:
    """Content of the file `trace` that asks for a trace of a running job."""

    steps: int = setting(3, minimum=1, maximum=MOST_STEPS, doc="Number of steps.")
    ranks: list[int] = setting(
        factory=lambda: [0], minimum=0, maximum=10**6, doc="Ranks that write a trace."
    )

    def __post_init__(self) -> None:
        if not self.ranks:
            raise SettingsError("ranks", "is []; name a rank.")


def check_ranks(ranks: list[int], world_size: int) -> None:
    """Raises SettingsError for a rank that the run does not have."""
    unknown = [rank for rank in ranks if rank >= world_size]
    if unknown:
        raise SettingsError(
            "ranks", f"names rank {unknown[0]}, but the run has ranks 0 to {world_size - 1}."
        )
