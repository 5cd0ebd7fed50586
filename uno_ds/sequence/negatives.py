"""Negative captions that come from the other samples of a pack."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from uno_ds.sequence.segments import Kind, Sample, Segment


def with_negatives(sample: Sample, earlier: Sequence[np.ndarray]) -> Sample:
    """The sample with a negative for each of its captions: of `earlier`, the token ids of captions
    of other samples, the last that is another text. None is added where there is no such text.

    Negatives come after all other segments, so that indices of segments stay as they are, and have
    the positions of the caption."""
    added: list[Segment] = []
    for caption in captions_of(sample):
        others = (ids for ids in reversed(earlier) if not np.array_equal(ids, caption.ids))
        ids = next(others, None)
        if ids is None:
            continue
        rope_ids = caption.rope_ids[0] + np.arange(len(ids))
        negative = dataclasses.replace(caption, token_ids=ids, rope_ids=rope_ids, negative=True)
        added.append(negative)
    return dataclasses.replace(sample, segments=[*sample.segments, *added]) if added else sample


def captions_of(sample: Sample) -> list[Segment]:
    """Those that are no negatives."""
    return [
        segment
        for segment in sample.segments
        if segment.kind == Kind.CAPTION and not segment.negative
    ]
