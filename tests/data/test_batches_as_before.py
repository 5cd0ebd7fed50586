"""What a recipe without any switch of the losses trains on, as recorded before there were any: none
of them moves what is drawn at random."""

import hashlib
import json

import pytest

from uno_ds.run import prepare
from uno_ds.sequence.segments import Kind, Sample

# Of the first pack of each lane of the recipe `tiny`: keys, kinds of segments and token ids.
DIGEST = "cf5e27f479474824618b26a979d397c3e0475594d27fe200d335cc3ce2d8e81a"
# (noise level, sum of the noise) of the first noised images.
NOISED = [
    (0.842026, 98.6252),
    (0.250331, -43.6384),
    (0.897927, -1.0716),
    (0.883205, -4.0622),
    (0.912136, 74.3857),
    (0.951092, -56.7494),
]


def first_samples(folder, *overrides: str) -> list[Sample]:
    given = [f"output={folder}", "data.workers=1", *overrides]
    run = prepare("tiny", given, reads_only=True, world_size=1)
    return [sample for lane in run.stream(0, 1).lanes for sample in lane.next_pack()]


def digest(samples: list[Sample]) -> str:
    plain = [
        [
            str(sample.key),
            [
                [
                    segment.kind.name,
                    [] if segment.token_ids is None else segment.token_ids.tolist(),
                ]
                for segment in sample.segments
            ],
        ]
        for sample in samples
    ]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def test_rows_texts_noise_levels_and_noise_are_those_of_before(tmp_path):
    samples = first_samples(tmp_path)
    assert len(samples) == 33 and digest(samples) == DIGEST
    segments = [segment for sample in samples for segment in sample.segments]
    noised = [segment for segment in segments if segment.kind == Kind.NOISED]
    for segment, (timestep, noise) in zip(noised, NOISED, strict=False):
        assert segment.timestep == pytest.approx(timestep, abs=1e-5)
        assert segment.noise.sum() == pytest.approx(noise, abs=1e-2)


@pytest.mark.parametrize(
    "switch",
    [
        "objective.flow_contrast=0.05",
        "objective.regression_loss=contrastive",
        "objective.regression_target=hog",
        "objective.supervise_until=0.5",
        "objective.balance=gradient_norm",
        "sequence.supervision_window=[0.0, 1.0]",
    ],
)
def test_a_switch_that_lays_out_nothing_more_leaves_them_too(tmp_path, switch):
    samples = first_samples(tmp_path, switch)
    assert digest(samples) == DIGEST
    first = next(s for s in samples[0].segments if s.kind == Kind.NOISED)
    assert first.noise.sum() == pytest.approx(NOISED[0][1], abs=1e-2)
