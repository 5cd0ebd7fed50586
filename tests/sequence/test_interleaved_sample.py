"""How an interleaved sample is laid out: positions, visibility, drop rates; and that an edit and a
conversation are cases of it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from uno_ds.data.layouts.conversation import conversation_sample
from uno_ds.data.layouts.edit import edit_sample
from uno_ds.data.layouts.interleaved import ImagePiece, TextPiece, interleaved_sample
from uno_ds.kernels.plan import CAUSAL, FULL, NONE
from uno_ds.sequence.composition import (
    Geometry,
    ImageViews,
    SampleComposer,
    SequenceSettings,
    SpecialTokens,
)
from uno_ds.sequence.segments import Kind, Sample, SegmentTable
from uno_ds.settings import build

GEOMETRY = Geometry(latent_stride=4, latent_values=12, latent_side=8, vit_stride=3, vit_side=9)
SPECIAL = SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4)
DRAWS = 2000


def make_composer(**sequence) -> SampleComposer:
    nothing_dropped = dict(drop_text=0.0, drop_vit=0.0, drop_latent=0.0)
    given = dict(token_budget=1000, metaquery_grid=2) | nothing_dropped | sequence
    return SampleComposer(build(SequenceSettings, given), GEOMETRY, SPECIAL, True, True)


def views(shade: float = 0.0) -> ImageViews:
    return ImageViews(
        np.full((3, 8, 4), shade, dtype=np.float32), np.full((3, 6, 9), shade, dtype=np.float32)
    )


def condition() -> ImagePiece:
    return ImagePiece(views(0.1))


def target(caption: bool = True) -> ImagePiece:
    return ImagePiece(views(0.2), views(0.2), [20, 21] if caption else None)


def text(*ids: int, loss: bool = False) -> TextPiece:
    return TextPiece(list(ids) or [10, 11, 12], loss)


def compose(pieces, seed: int = 0, **sequence) -> Sample:
    rng = np.random.default_rng(seed)
    return interleaved_sample(make_composer(**sequence), "key", pieces, rng)


def kinds(sample: Sample) -> list[Kind]:
    return [segment.kind for segment in sample.segments]


def shown(sample: Sample) -> list[tuple]:
    return [
        (segment.kind, segment.rope_ids.tolist(), segment.answer, segment.grid)
        for segment in sample.segments
    ]


def test_positions_and_visibility_of_an_edit_in_two_turns():
    sample = compose([condition(), text(), target(), text(5), target(caption=False)])
    clean, vit, words, noised = Kind.CLEAN, Kind.VIT, Kind.TEXT, Kind.NOISED
    caption, queries = Kind.CAPTION, Kind.METAQUERY
    expected = [clean, vit, words, noised, caption, queries, clean, vit, words, noised, queries]
    assert kinds(sample) == expected
    firsts = [int(segment.rope_ids[0]) for segment in sample.segments]
    # The text has five tokens with bos and eos. The clean view of the generated image has the id of
    # the noised one, whose supervision starts one later; a text of three tokens follows.
    assert firsts == [0, 1, 2, 7, 8, 8, 7, 8, 9, 12, 13]
    relation = SegmentTable.of([sample]).relation()
    context = [0, 1, 2, 6, 7, 8]
    for query, key in itertools.product(range(len(expected)), repeat=2):
        if query == key:
            wanted = CAUSAL if expected[query] in (words, caption) else FULL
        elif expected[query] in (caption, queries):
            wanted = FULL if key == sample.segments[query].supervises else NONE
        else:
            wanted = FULL if key in context and key < query else NONE
        assert relation[query, key] == wanted, (query, key)
    assert [sample.segments[place].supervises for place in (4, 5, 10)] == [3, 3, 9]


def test_a_generated_image_that_nothing_follows_is_not_shown_again():
    assert kinds(compose([text(), target()]))[1:2] == [Kind.NOISED]
    assert Kind.CLEAN not in kinds(compose([text(), target()]))
    before_text = kinds(compose([target(), text(loss=True)]))
    assert before_text[-3:] == [Kind.CLEAN, Kind.VIT, Kind.TEXT]


def test_an_edit_and_a_conversation_are_cases_of_it():
    rng = np.random.default_rng(0)
    composer = make_composer()
    edit = edit_sample(composer, "key", views(0.1), [10, 11, 12], [20, 21], views(0.2), rng)
    assert shown(compose([condition(), text(), target()])) == shown(edit)
    turns = [(False, [views(0.1), [10, 11, 12]]), (True, [[7]])]
    talk = conversation_sample(composer, "key", turns)
    assert shown(compose([condition(), text(), text(7, loss=True)])) == shown(talk)


def share(samples: list[Sample], kind: Kind, place: int) -> float:
    """Of the samples, those that have more than `place` segments of a kind."""
    return sum(kinds(sample).count(kind) > place for sample in samples) / len(samples)


def check_share(found: float, expected: float) -> None:
    assert abs(found - expected) <= 4 * math.sqrt(expected * (1 - expected) / DRAWS)


def test_every_condition_of_a_generated_image_is_dropped_on_its_own():
    rates = dict(drop_text=0.2, drop_vit=0.3, drop_latent=0.4)
    pieces = [condition(), condition(), text(), target()]
    samples = [compose(pieces, seed, **rates) for seed in range(DRAWS)]
    check_share(share(samples, Kind.TEXT, 0), 0.8)
    for kind, kept in ((Kind.VIT, 0.7), (Kind.CLEAN, 0.6)):
        check_share(share(samples, kind, 0), 1 - (1 - kept) ** 2)
        check_share(share(samples, kind, 1), kept**2)
    assert all(kinds(sample).count(Kind.NOISED) == 1 for sample in samples)


def test_the_views_of_a_generated_image_are_dropped_like_those_of_a_condition():
    pieces = [text(), target(), text(), target()]
    samples = [compose(pieces, seed, drop_latent=0.4, drop_vit=0.3) for seed in range(DRAWS)]
    check_share(share(samples, Kind.CLEAN, 0), 0.6)
    check_share(share(samples, Kind.VIT, 0), 0.7)


def test_what_a_trained_text_reads_is_never_dropped():
    everything = dict(drop_text=1.0, drop_vit=1.0, drop_latent=1.0)
    thought = [condition(), text(), text(7, loss=True), target()]
    expected = [Kind.CLEAN, Kind.VIT, Kind.TEXT, Kind.TEXT, Kind.NOISED]
    assert kinds(compose(thought, **everything))[:5] == expected
    # What follows the trained text is dropped, and so is what only an image reads.
    later = [text(), text(7, loss=True), text(8), target()]
    sample = compose(later, **everything)
    texts = [segment.ids.tolist()[1] for segment in sample.segments if segment.kind == Kind.TEXT]
    assert texts == [10, 7]
    assert kinds(compose([condition(), text(), target()], **everything))[0] == Kind.NOISED
    question = [condition(), text(), text(7, loss=True)]
    assert Kind.VIT in kinds(compose(question, **everything))


PIECES = {
    "condition": condition,
    "target": target,
    "text": text,
    "answer": lambda: text(7, loss=True),
}


@pytest.mark.parametrize("drop", [0.0, 0.5])
@hypothesis_settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=8), seed=st.integers(0, 9)
)
def test_any_interleaving_keeps_the_rules(drop, names, seed):
    rates = dict(drop_text=drop, drop_vit=drop, drop_latent=drop)
    sample = compose([PIECES[name]() for name in names], seed, **rates)
    found = kinds(sample)
    assert found.count(Kind.NOISED) == names.count("target") == found.count(Kind.METAQUERY)
    answers = [segment for segment in sample.segments if segment.answer]
    assert len(answers) == names.count("answer")
    relation = SegmentTable.of([sample]).relation()
    position = 0
    for place, segment in enumerate(sample.segments):
        if segment.kind in (Kind.CAPTION, Kind.METAQUERY):
            read = sample.segments[segment.supervises]
            assert read.kind == Kind.NOISED and segment.rope_ids[0] == read.rope_ids[0] + 1
        else:
            assert segment.rope_ids[0] == position
        if segment.kind == Kind.TEXT:
            position += segment.length
        elif segment.kind in (Kind.CLEAN, Kind.VIT):
            position += 1
        seen_by = [other for other in range(len(found)) if relation[other, place] != NONE]
        if segment.kind == Kind.NOISED:
            own = [n for n, other in enumerate(sample.segments) if other.supervises == place]
            assert seen_by == [place, *own]
