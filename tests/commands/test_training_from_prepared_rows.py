"""Training from prepared rows is training from pixels, bit for bit."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import ARCHITECTURE

from uno_ds.data.prepared import PreparedSource
from uno_ds.data.stream import skipped_samples
from uno_ds.model.architecture import Architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import build_codec, latents_to_rows
from uno_ds.model.weights import WeightsFile, bagel_name
from uno_ds.objectives.preparation import RowEncoder, TargetEncoder
from uno_ds.objectives.uno import LOSSES, UnoObjective
from uno_ds.objectives.visual_regression import grid_targets
from uno_ds.run import Run
from uno_ds.sequence.composition import SpecialTokens
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import build
from uno_ds.training.sharded_objective import initialise


def objective_of(run: Run) -> UnoObjective:
    recipe, kernels = run.recipe, run.recipe.kernels.resolved()
    model = Bagel(recipe.architecture, kernels.attention, read_context=run.read_answers)
    objective = UnoObjective(
        model,
        build_codec(recipe.architecture),
        recipe.objective,
        kernels,
        recipe.sequence.metaqueries,
    )
    weights = WeightsFile(recipe.base)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if name.startswith("model."):
                parameter.copy_(weights.read(bagel_name(name.removeprefix("model."))))
            else:
                initialise(name, parameter, 0)
    objective.set_trainable(everything=recipe.model.train == "all")
    return objective


def train_plainly(
    run: Run, threads: int = 1, steps: int = 4
) -> tuple[list[tuple[str, ...]], torch.Tensor, torch.Tensor, dict[str, int]]:
    """(keys, losses, gradients, skipped rows) of some steps without updates."""
    objective, stream = objective_of(run), run.stream(0, 1)
    keys, losses = [], []
    torch.set_num_threads(threads)
    try:
        for _, batches in zip(range(steps), stream, strict=False):
            for batch in batches:
                total, parts = objective(
                    batch,
                    torch.tensor([batch.loss_counts[name] for name in LOSSES], dtype=torch.float64),
                )
                total.backward()
                keys.append(batch.keys)
                losses.append(torch.cat([total.detach()[None], parts]))
    finally:
        torch.set_num_threads(1)
    stream.close()
    gradients = torch.cat(
        [
            parameter.grad.flatten()
            for parameter in objective.parameters()
            if parameter.grad is not None
        ]
    )
    return keys, torch.stack(losses), gradients, dict(skipped_samples(stream.state))


def assert_same(pixels: Run, prepared: Run, threads: int = 1) -> None:
    keys, losses, gradients, skipped = train_plainly(pixels, threads)
    assert (losses > 0).any(dim=0).all() and len(skipped) > 3, (
        "not every loss and not enough bad rows were met"
    )
    other_keys, other_losses, other_gradients, other_skipped = train_plainly(prepared, threads)
    assert keys == other_keys and skipped == other_skipped
    assert torch.equal(losses, other_losses), (
        f"losses differ by up to {(losses - other_losses).abs().max():.1e}"
    )
    assert torch.equal(gradients, other_gradients)


# Widths at which products of few rows and activations are seen to differ in their last bits with
# the rows around and the threads.
WIDE = ARCHITECTURE | {
    "hidden": 36,
    "heads": 3,
    "kv_heads": 3,
    "vit_hidden": 288,
    "vit_heads": 4,
    "vit_mlp": 1100,
    "vit_layers": 2,
    "vit_patch": 4,
    "vit_side": 9,
}


@pytest.mark.parametrize("alone_threads, pack_threads", [(1, 1), (2, 1), (1, 2)])
def test_features_and_targets_of_an_image_are_the_same_bits_alone_in_a_pack_and_on_any_threads(
    alone_threads, pack_threads
):
    shape, rng = build(Architecture, WIDE), np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = TargetEncoder(shape, "connector").to_empty(device="cpu").requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3)
    segments = [
        Segment(
            Kind.METAQUERY,
            np.zeros(1, dtype=np.int64),
            pixels=rng.uniform(-1, 1, (3, 4 * rows, 4 * columns)).astype(np.float32),
            grid=(rows, columns),
            sides=(1,),
            supervises=0,
        )
        for rows, columns in ((3, 1), (9, 9), (1, 5), (7, 8), (3, 3))
    ]

    def encode(segments: list[Segment], threads: int) -> list[torch.Tensor]:
        batch = Collator(shape.geometry, SpecialTokens(0, 1, 2, 3), True, False)(
            [Sample("", [segment]) for segment in segments]
        )
        torch.set_num_threads(threads)
        try:
            features = encoder.vit(
                batch.vision.patches_PC,
                batch.vision.positions_P,
                batch.vision.plan,
                batch.vision.lengths,
            )
            tokens = encoder.connector(features, batch.vision.lengths)
            return [
                *features.split(batch.vision.lengths),
                *tokens.split(batch.vision.lengths),
                *grid_targets(features, batch.targets),
                *grid_targets(tokens, batch.targets),
            ]
        finally:
            torch.set_num_threads(1)

    packed = encode(segments, pack_threads)
    alone = [encode([segment], alone_threads) for segment in segments]
    for part, number in itertools.product(range(4), range(len(segments))):
        assert torch.equal(packed[part * len(segments) + number], alone[number][part]), (
            f"part {part} of image {number}"
        )


class ThreadedCodec:
    """A codec whose latents depend on the number of threads, as the last bits of a codec with
    weights do under some BLAS libraries."""

    def encode(self, pixels_B3hw: torch.Tensor) -> torch.Tensor:
        return F.pixel_unshuffle(pixels_B3hw, 2) + torch.get_num_threads()


def test_latents_of_a_codec_with_weights_are_the_same_bits_on_any_number_of_threads(
    place, prepared
):
    run, codec, rng = place.open(place.paths), ThreadedCodec(), np.random.default_rng(0)
    encode = RowEncoder(run.recipe, run.tokenizer, codec, None, torch.device("cpu"), "float32")
    pixels = [rng.uniform(-1, 1, (3, 96, 96)).astype(np.float32) for _ in range(2)]
    segments = [
        Segment(Kind.CLEAN, np.zeros(24**2 + 2, dtype=np.int64), pixels=image, grid=(24, 24))
        for image in pixels
    ]
    batch = Collator(run.recipe.architecture.geometry, SpecialTokens(0, 1, 2, 3), False, True)(
        [Sample("", [segment]) for segment in segments]
    )
    objective = objective_of(run)
    object.__setattr__(objective, "codec", codec)
    expected = torch.cat([latents_to_rows(encode.latent(image)[None], 2) for image in pixels])
    with torch.no_grad():
        torch.set_num_threads(2)
        try:
            assert not torch.equal(
                codec.encode(batch.latents.images[0])[0], encode.latent(pixels[0])
            ), "threads make no difference to this codec"
            assert torch.equal(objective.latent_rows(batch), expected)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2])
def test_losses_gradients_and_skipped_rows_are_those_of_training_from_pixels_bit_for_bit(
    place, prepared, threads
):
    from_prepared = place.open(prepared)
    assert all(isinstance(source, PreparedSource) for source in from_prepared.sources)
    assert_same(place.open(place.paths), from_prepared, threads)


def test_prepared_and_pixel_sources_mix_in_one_pack_bit_for_bit(place, prepared):
    mixed = place.open(
        {"t2i": prepared["t2i"], "edit": place.paths["edit"], "vlm": place.paths["vlm"]}
    )
    batches = next(iter(mixed.stream(0, 1)))
    assert any(
        len(batch.targets.prepared_EW) and len(batch.targets.patches_RP) for batch in batches
    )
    assert_same(place.open(place.paths), mixed)


def test_targets_behind_the_connector_are_bit_for_bit_too(place):
    change = {"objective__regression_target": "connector"}
    assert_same(
        place.open(place.paths, **change),
        place.open(place.prepare("connector", **change), **change),
    )


def test_latents_serve_joint_training_without_regression_bit_for_bit(place, prepared):
    def run(paths: dict[str, Path]) -> Run:
        return place.open(paths, "model.train=all", "objective.regression_weight=0")

    keys, losses, gradients, skipped = train_plainly(run(place.paths))
    other = train_plainly(run(prepared))
    assert (
        (keys, skipped) == (other[0], other[3])
        and torch.equal(losses, other[1])
        and torch.equal(gradients, other[2])
    )


def test_bfloat16_halves_the_values_and_changes_losses_by_their_rounding(place, prepared):
    narrow = place.prepare("narrow", "--dtype", "bfloat16")
    wide, rounded = (train_plainly(place.open(paths)) for paths in (prepared, narrow))
    assert wide[0] == rounded[0] and not torch.equal(wide[1], rounded[1])
    torch.testing.assert_close(wide[1], rounded[1], rtol=2e-2, atol=1e-3)
    image = place.open(narrow).sources[0].read(0, np.random.default_rng(0)).image
    exact = place.open(prepared).sources[0].read(0, np.random.default_rng(0)).image
    assert np.array_equal(
        image.latent.values, torch.from_numpy(exact.latent.values).bfloat16().float().numpy()
    )
