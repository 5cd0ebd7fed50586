"""Counts and examples of unusable rows, for the summary of a run."""

from dataclasses import asdict
from typing import Any

from uno_ds.data.source_checks import BadExample
from uno_ds.data.sources import Source
from uno_ds.data.stream import Stream, skipped_samples
from uno_ds.training.collectives import gather_objects


def skipped_rows(stream: Stream, sources: list[Source]) -> dict[str, int]:
    """{cause: number of rows} over all ranks, and the number of unreadable files. Collective."""
    lanes: dict[str, dict] = {}
    for lanes_of_rank in gather_objects(stream.state):
        lanes |= lanes_of_rank
    counts: dict[str, int] = dict(skipped_samples(lanes))
    unreadable = sum(len(source.unreadable_files) for source in sources)
    if unreadable:
        counts["unreadable_file"] = unreadable
    return counts


def skipped_examples(stream: Stream) -> dict[str, dict[str, Any]]:
    """{cause: {source, file, row, detail}}: one unusable row for each cause, from the lane with the
    lowest number. Collective."""
    lanes: dict[int, dict[str, BadExample]] = {}
    for lanes_of_rank in gather_objects(stream.skipped_examples()):
        lanes |= lanes_of_rank
    examples: dict[str, dict[str, Any]] = {}
    for number in sorted(lanes):
        for cause, example in lanes[number].items():
            examples.setdefault(cause, asdict(example))
    return examples
