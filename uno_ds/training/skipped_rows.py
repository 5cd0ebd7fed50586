"""What the summary reports of rows that could not be used."""

import json
from dataclasses import asdict
from typing import Any

from uno_ds.data.sources import Source
from uno_ds.data.stream import Stream, skipped_samples
from uno_ds.training.collectives import gather_objects


def skipped_rows(stream: Stream, sources: list[Source]) -> dict[str, int]:
    """Bad rows by cause over all ranks, and unreadable files. Collective."""
    lanes = {
        number: state for part in gather_objects(stream.state) for number, state in part.items()
    }
    counts: dict[str, int] = json.loads(json.dumps(skipped_samples(lanes)))
    unreadable = sum(len(source.unreadable_files) for source in sources)
    if unreadable:
        counts["unreadable_file"] = unreadable
    return counts


def skipped_examples(stream: Stream) -> dict[str, dict[str, Any]]:
    """{cause: {source, file, row, detail}} of one unusable row each, of the first lane that met
    one. Collective."""
    parts = gather_objects(stream.skipped_examples())
    lanes = {number: examples for part in parts for number, examples in part.items()}
    chosen: dict[str, dict[str, Any]] = {}
    for number in sorted(lanes):
        for cause, example in lanes[number].items():
            chosen.setdefault(cause, asdict(example))
    return chosen
