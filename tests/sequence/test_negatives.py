"""Negative captions in a sample and in a pack: where they come from, what they see, their cost."""

import numpy as np
import pytest
from dense import sees, tokens_of
from tiny_objective import make_composer, random_ids, random_views, text_to_image

from uno_ds.data.layouts.interleaved import ImagePiece, TextPiece, interleaved_sample
from uno_ds.data.layouts.text_to_image import text_to_image_sample
from uno_ds.kernels.plan import CAUSAL, FULL, NONE
from uno_ds.sequence.negatives import captions_of, with_negatives
from uno_ds.sequence.packing import Packer
from uno_ds.sequence.segments import Kind, Sample, SegmentTable

FROM_COLUMN = {"negative_source": "column"}


def sample_of(seed: int, negatives: list[list[int]], composition: dict | None = None) -> Sample:
    rng = np.random.default_rng(seed)
    composer = make_composer(composition=composition)
    prompt, caption, views = random_ids(rng), [7, 8, 9], random_views(rng)
    return text_to_image_sample(composer, "t2i", prompt, caption, views, rng, negatives)


def negatives_of(sample: Sample) -> list:
    return [segment for segment in sample.segments if segment.negative]


def test_a_negative_of_a_column_reads_the_same_image_from_the_same_position():
    sample = sample_of(0, [[10, 11]], FROM_COLUMN)
    (negative,) = negatives_of(sample)
    (caption,) = captions_of(sample)
    assert negative.kind == Kind.CAPTION and negative.supervises == caption.supervises
    assert negative.token_ids.tolist() == [1, 10, 11, 2]
    assert negative.rope_ids[0] == caption.rope_ids[0]


def test_conditions_noise_and_noise_level_do_not_depend_on_negatives():
    with_one = sample_of(3, [[10, 11], [12]], FROM_COLUMN)
    without = sample_of(3, [], {})
    kept = [segment for segment in with_one.segments if not segment.negative]
    for ours, theirs in zip(kept, without.segments, strict=True):
        assert (ours.kind, ours.timestep) == (theirs.kind, theirs.timestep)
        assert np.array_equal(ours.rope_ids, theirs.rope_ids)
        assert ours.noise is None or np.array_equal(ours.noise, theirs.noise)


@pytest.mark.parametrize(
    "negatives, composition",
    [
        ([[10, 11]], {}),
        ([[10, 11]], {"negative_source": "pack"}),
        ([], FROM_COLUMN),
        ([[7, 8, 9]], FROM_COLUMN),  # the caption itself
    ],
)
def test_without_a_wrong_text_or_the_wish_for_one_there_is_none(negatives, composition):
    assert not negatives_of(sample_of(0, negatives, composition))


def test_caption_and_negative_do_not_see_each_other_nor_the_prompt():
    sample = sample_of(0, [[10, 11]], FROM_COLUMN)
    relation = SegmentTable.of([sample]).relation()
    kinds = [segment.kind for segment in sample.segments]
    noised = kinds.index(Kind.NOISED)
    first, second = (place for place, kind in enumerate(kinds) if kind == Kind.CAPTION)
    for row, other in ((first, second), (second, first)):
        assert relation[row, other] == NONE and relation[row, row] == CAUSAL
        assert relation[row, noised] == FULL and relation[row, kinds.index(Kind.TEXT)] == NONE
        assert (relation[:, row] != NONE).sum() == 1
    # The independent visibility table says the same.
    tokens = tokens_of([sample])
    of = {place: next(t for t in tokens if t.segment == place) for place in (first, second)}
    assert not sees(of[first], of[second]) and not sees(of[second], of[first])


def test_in_a_pack_the_negative_is_the_last_earlier_caption_that_is_another_text():
    composer = make_composer()
    samples = [text_to_image(np.random.default_rng(seed), composer) for seed in range(4)]
    again = text_to_image(np.random.default_rng(3), composer)
    packer = Packer(1000, negatives=True)
    for sample in [*samples, again]:
        assert packer.offer(sample)
    texts = [captions_of(sample)[0].ids.tolist() for sample in samples]
    assert len({tuple(text) for text in texts}) == 4
    found = [[n.ids.tolist() for n in negatives_of(sample)] for sample in packer.samples]
    assert found == [[], [texts[0]], [texts[1]], [texts[2]], [texts[2]]]
    assert packer.tokens == sum(sample.length for sample in packer.samples)
    # The samples that were offered are as they were.
    assert not any(map(negatives_of, samples))


def test_the_negative_counts_against_the_budget():
    composer = make_composer()
    first, second = (text_to_image(np.random.default_rng(seed), composer) for seed in range(2))
    negative = captions_of(first)[0].length
    room = first.length + second.length
    packer = Packer(room + negative - 1, negatives=True)
    assert packer.offer(first) and not packer.offer(second)
    packer = Packer(room + negative, negatives=True)
    assert packer.offer(first) and packer.offer(second) and packer.tokens == room + negative


def test_in_a_sample_with_two_images_each_caption_keeps_its_image():
    rng = np.random.default_rng(0)
    pieces = [
        ImagePiece(random_views(rng), random_views(rng), [5, 6]),
        TextPiece([9]),
        ImagePiece(random_views(rng), random_views(rng), [7, 8]),
    ]
    sample = interleaved_sample(make_composer(), "parts", pieces, rng)
    extended = with_negatives(sample, [np.array([1, 20, 2])])
    assert extended.segments[: len(sample.segments)] == sample.segments
    for caption, negative in zip(captions_of(sample), negatives_of(extended), strict=True):
        assert extended.segments[negative.supervises].kind == Kind.NOISED
        assert negative.supervises == caption.supervises
        assert negative.rope_ids.tolist() == (caption.rope_ids[0] + np.arange(3)).tolist()
