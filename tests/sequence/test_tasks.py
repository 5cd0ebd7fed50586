"""How a sample is laid out: its random choices do what the settings say, and its ids, cells and
targets lie where they should."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rounding import assert_equal_up_to_rounding

from uno_ds.objectives.visual_regression import grid_targets
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.sequence.tasks import Geometry, ImageViews, Layout, SequenceSettings, SpecialTokens
from uno_ds.settings import SettingsError, build

GEOMETRY = Geometry(latent_stride=4, latent_values=12, latent_side=8, vit_stride=3, vit_side=9)
SPECIAL = SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4)
DRAWS = 4000
PROMPT, CAPTION, INSTRUCTION = [10, 11, 12], [20, 21], [30, 31, 32, 33]


def make_layout(captions: bool = True, metaqueries: bool = True, **sequence) -> Layout:
    settings = build(
        SequenceSettings,
        dict(token_budget=1000, metaquery_grid=2, drop_text=0.0, drop_vit=0.0, drop_latent=0.0)
        | sequence,
    )
    return Layout(settings, GEOMETRY, SPECIAL, captions, metaqueries)


def image(
    latent: tuple[int, int] = (2, 1), vit: tuple[int, int] = (2, 3), shade: float = 0.0
) -> ImageViews:
    """Both views, their grids given in tokens."""
    shapes = (3, latent[0] * 4, latent[1] * 4), (3, vit[0] * 3, vit[1] * 3)
    return ImageViews(*(np.full(shape, shade, dtype=np.float32) for shape in shapes))


def t2i(layout: Layout, rng: np.random.Generator) -> Sample:
    return layout.text_to_image("key", PROMPT, CAPTION, image(), rng)


def edit(layout: Layout, rng: np.random.Generator) -> Sample:
    return layout.edit("key", image(shade=0.1), INSTRUCTION, CAPTION, image(shade=0.2), rng)


def draws(make: Callable, layout: Layout, count: int = DRAWS, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [make(layout, rng) for _ in range(count)]


def kinds(sample: Sample) -> list[Kind]:
    return [segment.kind for segment in sample.segments]


def the(sample: Sample, kind: Kind) -> Segment:
    found = [segment for segment in sample.segments if segment.kind == kind]
    assert len(found) == 1
    return found[0]


def check_rate(hits: int, rate: float, count: int = DRAWS) -> None:
    assert abs(hits - rate * count) <= 4 * math.sqrt(rate * (1 - rate) * count), (
        f"{hits} of {count}, expected a share of {rate}"
    )


@pytest.mark.parametrize("make", [t2i, edit])
@pytest.mark.parametrize("window", [[0.2, 0.6], [0.0, 0.5], [0.5, 0.5]])
def test_a_sample_is_supervised_exactly_if_its_noise_level_lies_in_the_window(window, make):
    samples = draws(make, make_layout(supervision_window=window), 1000)
    for sample in samples:
        inside = window[0] <= the(sample, Kind.NOISED).timestep <= window[1]
        assert (Kind.CAPTION in kinds(sample)) == (Kind.METAQUERY in kinds(sample)) == inside
    shares = {Kind.CAPTION in kinds(sample) for sample in samples}
    assert shares == ({False} if window[0] == window[1] else {False, True})


@pytest.mark.parametrize("make", [t2i, edit])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_supervised_fraction_is_the_share_of_supervised_samples_at_every_noise_level(
    fraction, make
):
    samples = draws(make, make_layout(supervised_fraction=fraction))
    supervised = [Kind.CAPTION in kinds(sample) for sample in samples]
    assert supervised == [Kind.METAQUERY in kinds(sample) for sample in samples]
    check_rate(sum(supervised), fraction)
    noisy = [
        there
        for there, sample in zip(supervised, samples)
        if the(sample, Kind.NOISED).timestep > 0.5
    ]
    check_rate(sum(noisy), fraction, len(noisy))


def test_a_sample_without_a_caption_still_has_metaqueries_and_a_loss_that_is_off_has_no_tokens():
    rng = np.random.default_rng(0)
    assert kinds(make_layout().text_to_image("key", PROMPT, None, image(), rng)) == [
        Kind.TEXT,
        Kind.NOISED,
        Kind.METAQUERY,
    ]
    assert kinds(t2i(make_layout(), rng)) == [Kind.TEXT, Kind.NOISED, Kind.CAPTION, Kind.METAQUERY]
    assert kinds(t2i(make_layout(captions=False), rng)) == [Kind.TEXT, Kind.NOISED, Kind.METAQUERY]
    for off in (make_layout(metaqueries=False), make_layout(metaquery_grid=0)):
        assert kinds(t2i(off, rng)) == [Kind.TEXT, Kind.NOISED, Kind.CAPTION]
    assert kinds(edit(make_layout(), rng)) == [
        Kind.CLEAN,
        Kind.VIT,
        Kind.TEXT,
        Kind.NOISED,
        Kind.CAPTION,
        Kind.METAQUERY,
    ]


@pytest.mark.parametrize("rate", [0.0, 0.15, 1.0])
def test_a_prompt_is_dropped_at_its_rate(rate):
    samples = draws(t2i, make_layout(drop_text=rate))
    check_rate(sum(Kind.TEXT not in kinds(sample) for sample in samples), rate)
    assert all(Kind.NOISED in kinds(sample) and Kind.CAPTION in kinds(sample) for sample in samples)


def test_the_conditions_of_an_edit_are_dropped_at_their_own_rates_and_independently():
    rates = {Kind.TEXT: 0.2, Kind.VIT: 0.35, Kind.CLEAN: 0.6}
    samples = draws(edit, make_layout(drop_text=0.2, drop_vit=0.35, drop_latent=0.6))
    dropped = {kind: np.array([kind not in kinds(sample) for sample in samples]) for kind in rates}
    for kind, rate in rates.items():
        check_rate(dropped[kind].sum(), rate)
        for other in rates:
            if other != kind:
                check_rate((dropped[kind] & dropped[other]).sum(), rate * rates[other])
    assert all(sample.segments[-3].kind == Kind.NOISED for sample in samples)


@pytest.mark.parametrize(
    "how, wanted",
    [
        ("vit", {(False, True)}),
        ("latents", {(True, False)}),
        ("both", {(True, True)}),
        ("random", {(True, False), (False, True)}),
    ],
)
def test_images_of_a_conversation_come_in_the_views_that_were_asked_for(how, wanted):
    layout, rng = make_layout(conversation_images=how), np.random.default_rng(0)
    views = [layout.conversation_views(rng) for _ in range(1000)]
    assert set(views) == wanted
    if how == "random":
        check_rate(views.count((True, False)), 0.5, 1000)


@pytest.mark.parametrize("shift", [0.3, 1.0, 4.0])
def test_noise_levels_are_the_shifted_sigmoid_of_a_standard_normal(shift):
    """logit(t) is normal around log(shift) with deviation 1, so the median of t is shift / (1 +
    shift)."""
    rng = np.random.default_rng(0)
    layout = make_layout(timestep_shift=shift)
    t = np.array([layout.draw_timestep(rng) for _ in range(DRAWS)])
    assert ((t > 0) & (t < 1)).all()
    check_rate((t < shift / (1 + shift)).sum(), 0.5)
    u = np.log(t / (1 - t)) - np.log(shift)
    for quantile in (-2.0, -1.0, 0.5, 1.5):
        check_rate((u < quantile).sum(), 0.5 * (1 + math.erf(quantile / math.sqrt(2))))
    used = [the(sample, Kind.NOISED).timestep for sample in draws(t2i, layout)]
    check_rate(sum(value < shift / (1 + shift) for value in used), 0.5)


def test_noise_is_standard_normal_and_independent_of_the_noise_level():
    samples = draws(t2i, make_layout(), 1000)
    noise = np.concatenate([the(sample, Kind.NOISED).noise for sample in samples])
    assert noise.shape == (1000 * 2, GEOMETRY.latent_values) and noise.dtype == np.float32
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / noise.size)
    for quantile in (-2.0, -1.0, 0.5, 1.5):
        check_rate(
            (noise < quantile).sum(), 0.5 * (1 + math.erf(quantile / math.sqrt(2))), noise.size
        )
    levels = np.array([the(sample, Kind.NOISED).timestep for sample in samples])
    columns = np.concatenate([noise.reshape(1000, -1), levels[:, None]], axis=1)
    # 300 pairs of columns: 5 sigma here is as rare as 4 sigma for one of them.
    assert np.abs(np.corrcoef(columns.T) - np.eye(columns.shape[1])).max() < 5 / math.sqrt(1000)


def content(sample: Sample) -> list:
    """All that a sample holds, as plain values."""

    def plain(segment: Segment) -> dict:
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(segment).items()
        }

    return [sample.key, *map(plain, sample.segments)]


RANDOM = dict(
    drop_text=0.4,
    drop_vit=0.4,
    drop_latent=0.4,
    supervised_fraction=0.5,
    supervision_window=[0.1, 0.8],
)


@pytest.mark.parametrize("make", [t2i, edit])
def test_one_seed_gives_one_sample_and_another_seed_another(make):
    layout = make_layout(**RANDOM)
    first, again, other = (list(map(content, draws(make, layout, 30, seed))) for seed in (7, 7, 8))
    assert first == again
    assert all(one != another for one, another in zip(first, other))


@pytest.mark.parametrize("make", [t2i, edit])
def test_conditions_noise_and_noise_level_do_not_depend_on_which_losses_are_on(make):
    """So that runs with and without UNO can be compared on the same samples."""

    def without_supervision(sample: Sample) -> list:
        return content(
            Sample(
                sample.key,
                [
                    segment
                    for segment in sample.segments
                    if segment.kind not in (Kind.CAPTION, Kind.METAQUERY)
                ],
            )
        )

    layouts = [
        make_layout(captions, metaqueries, **RANDOM)
        for captions in (False, True)
        for metaqueries in (False, True)
    ]
    layouts += [
        make_layout(**RANDOM | dict(supervised_fraction=fraction)) for fraction in (0.0, 1.0)
    ]
    layouts += [
        make_layout(**RANDOM | dict(supervision_window=window))
        for window in ([0.0, 1.0], [0.5, 0.5])
    ]
    plain, *others = [list(map(without_supervision, draws(make, layout, 50))) for layout in layouts]
    assert all(other == plain for other in others)


@st.composite
def laid_out(draw) -> Sample:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layout = make_layout(**RANDOM | dict(metaquery_grid=draw(st.integers(0, 3))))
    ids = st.lists(st.integers(5, 99), max_size=5)
    views = st.builds(
        image,
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
    )
    task = draw(st.sampled_from(["t2i", "edit", "vlm"]))
    if task == "t2i":
        return layout.text_to_image("key", draw(ids), draw(ids), draw(views), rng)
    if task == "edit":
        return layout.edit("key", draw(views), draw(ids), draw(ids), draw(views), rng)
    turn = st.tuples(st.booleans(), st.lists(st.one_of(ids, views), max_size=3))
    return layout.conversation("key", draw(st.lists(turn, max_size=4)), rng)


@given(laid_out())
@hypothesis_settings(max_examples=200, deadline=None)
def test_rope_ids_advance_by_a_texts_length_and_by_one_per_image_and_supervision_starts_behind_its_image(
    sample,
):
    following = 0
    for segment in sample.segments:
        if segment.kind in (Kind.CAPTION, Kind.METAQUERY):
            image_id = sample.segments[segment.supervises].rope_ids[0]
            assert sample.segments[segment.supervises].kind == Kind.NOISED
            steps = range(segment.length) if segment.kind == Kind.CAPTION else [0] * segment.length
            assert segment.rope_ids.tolist() == [image_id + 1 + step for step in steps]
        elif segment.kind == Kind.TEXT:
            assert segment.rope_ids.tolist() == list(range(following, following + segment.length))
            following += segment.length
        else:
            assert segment.rope_ids.tolist() == [following] * segment.length
            following += 1


@given(laid_out())
@hypothesis_settings(max_examples=100, deadline=None)
def test_images_have_a_start_and_an_end_and_metaqueries_fill_their_grid(sample):
    for segment in sample.segments:
        if segment.kind in (Kind.VIT, Kind.CLEAN, Kind.NOISED):
            stride = 3 if segment.kind == Kind.VIT else 4
            assert segment.grid == (
                segment.pixels.shape[1] // stride,
                segment.pixels.shape[2] // stride,
            )
            assert segment.length == segment.grid[0] * segment.grid[1] + 2
            assert segment.generation_tokens().tolist() == [False] + [segment.kind != Kind.VIT] * (
                segment.length - 2
            ) + [False]
        else:
            assert not segment.generation_tokens().any()
        if segment.kind == Kind.METAQUERY:
            assert segment.length == segment.side**2


def test_text_is_wrapped_in_bos_and_eos_and_only_answers_are_trained():
    rng = np.random.default_rng(0)
    sample = edit(make_layout(), rng)
    assert the(sample, Kind.TEXT).token_ids.tolist() == [SPECIAL.bos, *INSTRUCTION, SPECIAL.eos]
    assert the(sample, Kind.CAPTION).token_ids.tolist() == [SPECIAL.bos, *CAPTION, SPECIAL.eos]
    assert not the(sample, Kind.TEXT).answer
    sample = make_layout().conversation(
        "key", [(False, [image(), [5, 6]]), (True, [[7]]), (False, [[]]), (True, [[8, 9]])], rng
    )
    assert kinds(sample) == [Kind.CLEAN, Kind.VIT] + [Kind.TEXT] * 4
    assert [(segment.token_ids.tolist(), segment.answer) for segment in sample.segments[2:]] == [
        ([1, 5, 6, 2], False),
        ([1, 7, 2], True),
        ([1, 2], False),
        ([1, 8, 9, 2], True),
    ]


def test_an_edit_shows_its_source_noises_its_target_and_compares_the_targets_features():
    sample = edit(make_layout(), np.random.default_rng(0))
    shades = {
        segment.kind: segment.pixels.flat[0].item()
        for segment in sample.segments
        if segment.pixels is not None
    }
    assert shades == pytest.approx(
        {Kind.CLEAN: 0.1, Kind.VIT: 0.1, Kind.NOISED: 0.2, Kind.METAQUERY: 0.2}
    )


@pytest.mark.parametrize("captions", [False, True])
@pytest.mark.parametrize("metaqueries", [False, True])
def test_the_largest_sample_with_a_noised_image_is_as_large_as_the_announced_one(
    metaqueries, captions
):
    """The budget is checked against it before anything starts."""
    layout, rng, text = (
        make_layout(captions, metaqueries, max_text_tokens=4, metaquery_grid=3),
        np.random.default_rng(0),
        [9] * 4,
    )
    assert layout.text_to_image("key", text, text, image(), rng).length == layout.largest_sample(
        "t2i", latent_cells=2, vit_cells=6
    )
    assert layout.edit("key", image(), text, text, image(), rng).length == layout.largest_sample(
        "edit", latent_cells=2, vit_cells=6
    )


@pytest.mark.parametrize("how", ["vit", "latents", "both", "random"])
def test_the_largest_question_answer_sample_is_as_large_as_the_announced_one(how):
    layout, rng = make_layout(max_text_tokens=4, conversation_images=how), np.random.default_rng(0)
    lengths = []
    for _ in range(20):
        latent, vit = layout.conversation_views(rng)
        shown = ImageViews(image().latent if latent else None, image().vit if vit else None)
        lengths.append(
            layout.conversation("key", [(False, [shown, [9] * 4]), (True, [[9] * 4])], rng).length
        )
    assert max(lengths) == layout.largest_sample("vlm", latent_cells=2, vit_cells=6)


def collate(*samples: Sample) -> PackedBatch:
    return Collator(GEOMETRY, SPECIAL, train_understanding=False, stop_at_context=True)(
        list(samples)
    )


GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(vit=GRIDS, side=st.integers(1, 5))
@hypothesis_settings(max_examples=100, deadline=None)
def test_a_metaquery_stands_at_the_patch_in_the_middle_of_its_cell(vit, side):
    batch = collate(
        make_layout(metaquery_grid=side).text_to_image(
            "key", PROMPT, None, image(vit=vit), np.random.default_rng(0)
        )
    )
    assert batch.metaqueries.index_M.tolist() == list(range(side * side))
    for query, position in enumerate(batch.metaqueries.positions_M.tolist()):
        for place, number, size in zip(
            divmod(position, GEOMETRY.vit_side), divmod(query, side), vit
        ):
            assert place < size and abs(place + 0.5 - (number + 0.5) * size / side) <= 0.5 + 1e-9


@given(source=GRIDS, targets=st.lists(GRIDS, min_size=1, max_size=3), side=st.integers(1, 5))
@hypothesis_settings(max_examples=100, deadline=None)
def test_the_target_of_a_metaquery_is_the_mean_of_its_own_images_cell_as_in_adaptive_average_pooling(
    source, targets, side
):
    layout, rng = make_layout(metaquery_grid=side), np.random.default_rng(0)
    batch = collate(
        *[
            layout.edit("key", image(vit=source), INSTRUCTION, CAPTION, image(vit=target), rng)
            for target in targets
        ]
    )
    features = torch.from_numpy(
        rng.standard_normal((len(batch.vision.patches_PC), 4))
    ).requires_grad_()
    got = grid_targets(features, batch.targets)
    assert not got.requires_grad
    pooled, first = [], len(targets) * source[0] * source[1]
    for rows, columns in targets:
        own = features[first : first + rows * columns].detach().T.reshape(1, 4, rows, columns)
        pooled.append(F.adaptive_avg_pool2d(own, side)[0].flatten(1).T)
        first += rows * columns
    assert first == len(features)
    assert_equal_up_to_rounding(
        got.float(), torch.cat(pooled), max(rows * columns for rows, columns in targets)
    )


@pytest.mark.parametrize("window", [[0.5], [0.7, 0.2], [-0.1, 0.5], [0.0, 1.1]])
def test_a_window_that_is_none_is_refused_by_name(window):
    with pytest.raises(SettingsError, match="supervision_window"):
        make_layout(supervision_window=window)
