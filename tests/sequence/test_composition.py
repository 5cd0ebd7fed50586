"""The random choices in a sample do what the settings say."""

import math

import numpy as np
import pytest
from composed_samples import (
    DRAWS,
    GEOMETRY,
    PROMPT,
    RANDOM,
    check_rate,
    draws,
    edit,
    image,
    kinds,
    make_composer,
    t2i,
    the,
)

from uno_ds.data.layouts.conversation import conversation_views
from uno_ds.data.layouts.text_to_image import text_to_image_sample
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import SettingsError


@pytest.mark.parametrize("make", [t2i, edit])
@pytest.mark.parametrize("window", [[0.2, 0.6], [0.0, 0.5], [0.5, 0.5]])
def test_a_sample_is_supervised_exactly_if_its_noise_level_lies_in_the_window(window, make):
    samples = draws(make, make_composer(supervision_window=window), 1000)
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
    samples = draws(make, make_composer(supervised_fraction=fraction))
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
    assert kinds(text_to_image_sample(make_composer(), "key", PROMPT, None, image(), rng)) == [
        Kind.TEXT,
        Kind.NOISED,
        Kind.METAQUERY,
    ]
    assert kinds(t2i(make_composer(), rng)) == [
        Kind.TEXT,
        Kind.NOISED,
        Kind.CAPTION,
        Kind.METAQUERY,
    ]
    assert kinds(t2i(make_composer(captions=False), rng)) == [
        Kind.TEXT,
        Kind.NOISED,
        Kind.METAQUERY,
    ]
    for off in (make_composer(metaqueries=False), make_composer(metaquery_grid=0)):
        assert kinds(t2i(off, rng)) == [Kind.TEXT, Kind.NOISED, Kind.CAPTION]
    assert kinds(edit(make_composer(), rng)) == [
        Kind.CLEAN,
        Kind.VIT,
        Kind.TEXT,
        Kind.NOISED,
        Kind.CAPTION,
        Kind.METAQUERY,
    ]


@pytest.mark.parametrize("rate", [0.0, 0.15, 1.0])
def test_a_prompt_is_dropped_at_its_rate(rate):
    samples = draws(t2i, make_composer(drop_text=rate))
    check_rate(sum(Kind.TEXT not in kinds(sample) for sample in samples), rate)
    assert all(Kind.NOISED in kinds(sample) and Kind.CAPTION in kinds(sample) for sample in samples)


def test_the_conditions_of_an_edit_are_dropped_at_their_own_rates_and_independently():
    rates = {Kind.TEXT: 0.2, Kind.VIT: 0.35, Kind.CLEAN: 0.6}
    samples = draws(edit, make_composer(drop_text=0.2, drop_vit=0.35, drop_latent=0.6))
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
    composer, rng = make_composer(conversation_images=how), np.random.default_rng(0)
    views = [conversation_views(composer.settings, rng) for _ in range(1000)]
    assert set(views) == wanted
    if how == "random":
        check_rate(views.count((True, False)), 0.5, 1000)


@pytest.mark.parametrize("shift", [0.3, 1.0, 4.0])
def test_noise_levels_are_the_shifted_sigmoid_of_a_standard_normal(shift):
    """logit(t) is normal around log(shift) with deviation 1, so the median of t is shift / (1 +
    shift)."""
    rng = np.random.default_rng(0)
    composer = make_composer(timestep_shift=shift)
    t = np.array([composer.draw_timestep(rng) for _ in range(DRAWS)])
    assert ((t > 0) & (t < 1)).all()
    check_rate((t < shift / (1 + shift)).sum(), 0.5)
    u = np.log(t / (1 - t)) - np.log(shift)
    for quantile in (-2.0, -1.0, 0.5, 1.5):
        check_rate((u < quantile).sum(), 0.5 * (1 + math.erf(quantile / math.sqrt(2))))
    used = [the(sample, Kind.NOISED).timestep for sample in draws(t2i, composer)]
    check_rate(sum(value < shift / (1 + shift) for value in used), 0.5)


def test_noise_is_standard_normal_and_independent_of_the_noise_level():
    samples = draws(t2i, make_composer(), 1000)
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


@pytest.mark.parametrize("make", [t2i, edit])
def test_one_seed_gives_one_sample_and_another_seed_another(make):
    composer = make_composer(**RANDOM)
    first, again, other = (
        list(map(content, draws(make, composer, 30, seed))) for seed in (7, 7, 8)
    )
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

    composers = [
        make_composer(captions, metaqueries, **RANDOM)
        for captions in (False, True)
        for metaqueries in (False, True)
    ]
    composers += [
        make_composer(**RANDOM | dict(supervised_fraction=fraction)) for fraction in (0.0, 1.0)
    ]
    composers += [
        make_composer(**RANDOM | dict(supervision_window=window))
        for window in ([0.0, 1.0], [0.5, 0.5])
    ]
    plain, *others = [
        list(map(without_supervision, draws(make, composer, 50))) for composer in composers
    ]
    assert all(other == plain for other in others)


@pytest.mark.parametrize("window", [[0.5], [0.7, 0.2], [-0.1, 0.5], [0.0, 1.1]])
def test_a_window_that_is_none_is_refused_by_name(window):
    with pytest.raises(SettingsError, match="supervision_window"):
        make_composer(supervision_window=window)
