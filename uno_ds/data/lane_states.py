"""Whether the lane states of a checkpoint belong to a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from uno_ds.data.sources import Source
from uno_ds.settings import SettingsError


def check_states(
    states: Mapping[str, Mapping[str, Any]], sources: Sequence[Source], packs_per_step: int
) -> None:
    """Raises SettingsError if the lane states of a checkpoint do not belong to these sources and so
    many packs."""
    if len(states) != packs_per_step:
        raise SettingsError(
            "engine.packs_per_step",
            f"is {packs_per_step}, but the checkpoint was written with {len(states)}.",
        )
    if any(len(state["positions"]) != len(sources) for state in states.values()):
        raise SettingsError(
            "data.sources",
            f"are {len(sources)}, but the checkpoint was written with another number of them.",
        )
    for number, source in enumerate(sources):
        was_streamed = str(number) in states["0"].get("streams", {})
        if was_streamed != source.is_streamed:
            raise SettingsError(
                f"data.sources.{number}.streaming",
                f"is {str(source.is_streamed).lower()}, but the checkpoint was written with "
                f"{str(was_streamed).lower()}, so that rows would repeat; set it back.",
            )
