"""What a source holds, by a sample of its rows: counts, sizes, lengths, packs, some samples."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from uno_ds.data.examples import PreparedImage
from uno_ds.data.images import BadRow
from uno_ds.data.samples import SampleMaker
from uno_ds.data.source_checks import BadExample
from uno_ds.data.sources import Source
from uno_ds.sequence.segments import Kind, Sample, SegmentTable

# Words for one letter of `SegmentTable.relation`.
VISIBILITY = {0: "no", 1: "all", 2: "causal"}


@dataclass(frozen=True)
class ShownSegment:
    """`text`: of a text or a caption. `grid`: tokens (rows, columns) of an image."""

    kind: str
    tokens: int
    text: str | None
    is_trained: bool
    grid: tuple[int, int]


@dataclass(frozen=True, eq=False)
class ShownSample:
    """A sample as training would see it. `sees[i][j]`: how segment i sees segment j, a value of
    VISIBILITY."""

    row: int
    segments: list[ShownSegment]
    sees: list[list[str]]
    pictures: list[Image.Image]

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)


@dataclass(eq=False)
class Survey:
    """Of `tried` rows, spread over a source. `lengths`: tokens of each usable one; `tokens`: by
    kind of segment; `sizes`: (width, height) of images as they are stored; `fill`: share of the
    token budget in each full pack."""

    rows: int
    token_budget: int
    tried: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    first_of_cause: dict[str, BadExample] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    fill: list[float] = field(default_factory=list)
    samples_per_pack: list[int] = field(default_factory=list)
    shown: list[ShownSample] = field(default_factory=list)

    @property
    def usable(self) -> int:
        return len(self.lengths)


def survey(source: Source, make_sample: SampleMaker, rows: int, shown: int, seed: int) -> Survey:
    """Reads up to `rows` rows, evenly spread, and keeps the first `shown` usable ones."""
    found = Survey(len(source), make_sample.token_budget)
    for index in _spread(len(source), rows):
        rng = np.random.default_rng((seed, index))
        found.tried += 1
        try:
            example = source.read(index, rng)
            sample = make_sample(example, rng)
        except BadRow as error:
            found.causes[error.cause] += 1
            found.first_of_cause.setdefault(error.cause, BadExample.of(source, index, error))
            continue
        pictures = list(_pictures(example))
        found.sizes += [picture.size for picture in pictures]
        found.lengths.append(sample.length)
        for segment in sample.segments:
            found.tokens[segment.kind.name.lower()] += segment.length
        if len(found.shown) < shown:
            found.shown.append(_shown(index, sample, pictures, make_sample))
    found.fill, found.samples_per_pack = _packs(found.lengths, make_sample.token_budget)
    return found


def histogram(values: Sequence[float], bins: int = 8) -> list[tuple[float, float, int]]:
    """(from, up to, count) of equal ranges; one range where all values are the same."""
    if not values:
        return []
    low, high = min(values), max(values)
    if low == high:
        return [(low, high, len(values))]
    counts, edges = np.histogram(values, bins=bins)
    return [
        (float(start), float(end), int(count))
        for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def _spread(rows: int, wanted: int) -> list[int]:
    if wanted >= rows:
        return list(range(rows))
    return [place * rows // wanted for place in range(wanted)]


def _packs(lengths: Sequence[int], budget: int) -> tuple[list[float], list[int]]:
    """(share of the budget, samples) of each pack that the samples fill in their order; the last
    one is left out, since nothing closes it, unless it is the only one."""
    packs: list[list[int]] = [[]]
    for length in lengths:
        if sum(packs[-1]) + length > budget:
            packs.append([])
        packs[-1].append(length)
    full = packs[:-1] or packs
    return [sum(pack) / budget for pack in full if pack], [len(pack) for pack in full if pack]


def _shown(
    row: int, sample: Sample, pictures: list[Image.Image], make_sample: SampleMaker
) -> ShownSample:
    tokenizer = make_sample.encoder.tokenizer
    segments = []
    for segment in sample.segments:
        text = None
        if segment.kind in (Kind.TEXT, Kind.CAPTION):
            text = tokenizer.decode(segment.ids[1:-1].tolist())
        is_trained = segment.answer or segment.kind in (Kind.NOISED, Kind.CAPTION, Kind.METAQUERY)
        segments.append(
            ShownSegment(segment.kind.name.lower(), segment.length, text, is_trained, segment.grid)
        )
    relation = SegmentTable.of([sample]).relation()
    sees = [[VISIBILITY[int(how)] for how in row_of] for row_of in relation]
    return ShownSample(row, segments, sees, pictures)


def _pictures(value: Any) -> Iterator[Image.Image]:
    """The pictures of an example, in the order of its fields."""
    if isinstance(value, Image.Image):
        yield value
    elif isinstance(value, PreparedImage):
        if value.picture is not None:
            yield value.picture
    elif dataclasses.is_dataclass(value):
        for entry in dataclasses.fields(value):
            yield from _pictures(getattr(value, entry.name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _pictures(item)
