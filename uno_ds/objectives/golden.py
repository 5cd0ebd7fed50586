"""Golden cases: tensors of the public BAGEL code, replayed through our own sequence, model and
losses.

A case is NAME.json (sizes and samples) and NAME.safetensors (weights under BAGEL's names, inputs,
and every quantity to compare). The file's position ids are used unchanged. Its visibility is
compared, not used, except to decide whether a text after a noised image is a caption of it."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from uno_ds.kernels.backends import KernelSettings
from uno_ds.model.architecture import Architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import PixelCodec
from uno_ds.model.weights import bagel_name
from uno_ds.objectives.captioning import captioning_loss
from uno_ds.objectives.flow_matching import noise_latents
from uno_ds.objectives.uno import ObjectiveSettings, UnoObjective
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.composition import SpecialTokens
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import SettingsError, build


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    tensors: dict[str, torch.Tensor]
    objective: UnoObjective
    samples: list[Sample]
    batch: PackedBatch


@dataclass(frozen=True)
class Comparison:
    """Largest absolute error, and the same relative to the golden tensor's largest value. For masks
    it is the number of differing pairs; they have to be equal, as have positions and labels.
    `note`: why it is reported and not counted."""

    quantity: str
    absolute: float
    relative: float
    note: str = ""


def load_case(path: Path, backend: str = "sdpa") -> Case:
    """Raises SettingsError if a file is missing, unreadable, lacks a weight, or has an unknown kind
    of item."""
    try:
        description = json.loads(path.read_text())
        tensors = load_file(path.with_suffix(".safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingsError(str(path), f"is not a golden case: {error}") from None
    try:
        shape = _architecture(description)
        ids = description["special_tokens"]
        special = SpecialTokens(ids["bos"], ids["eos"], ids["start_of_image"], ids["end_of_image"])
        samples = _samples(description, tensors, special, shape)
        model = Bagel(shape, attention=backend, read_context=True)
        objective = UnoObjective(
            model,
            PixelCodec(1),
            build(ObjectiveSettings, {"caption_weight": 1.0, "regression_weight": 0.0}),
            KernelSettings(),
            0,
        )
        with torch.no_grad():
            for ours, target in [*model.named_parameters(), *model.named_buffers()]:
                target.copy_(tensors[f"weights.{bagel_name(ours)}"].reshape(target.shape))
    except KeyError as error:
        raise SettingsError(str(path), f"lacks {error}.") from None
    except ValueError as error:
        raise SettingsError(str(path), f"does not follow the format: {error}.") from None
    objective.set_trainable(everything=False)
    collate = Collator(shape.geometry, special, train_understanding=False, stop_at_context=False)
    return Case(path.stem, tensors, objective, samples, collate(samples))


def compare(case: Case) -> Iterator[Comparison]:
    """Replays the case and yields a comparison for the mask, hidden states, losses per token, and
    every gradient."""
    objective, batch, tensors = case.objective, case.batch, case.tensors
    order_T = batch.order_T
    model = objective.model
    yield _count("attention mask", _differing_pairs(case))

    latents_GC, velocity_XC = noise_latents(objective.latent_rows(batch), batch.latents)
    no_metaqueries = torch.zeros(0, model.shape.hidden)
    understanding_UH, generation_GH, _ = model(batch, latents_GC, no_metaqueries)
    hidden_TH = torch.empty_like(tensors["last_hidden_state"])
    hidden_TH[order_T] = torch.cat([understanding_UH, generation_GH])
    yield _error("last_hidden_state", hidden_TH, tensors["last_hidden_state"])

    predicted_XC = model.llm2vae(generation_GH[batch.latents.noised_X])
    squared_XC = (predicted_XC - velocity_XC).square()
    yield _error("mse_per_token", squared_XC, tensors["mse_per_token"])

    rows_Y = torch.cat([batch.captions.rows_Y, batch.answers.rows_Y])
    labels_Y = torch.cat([batch.captions.labels_Y, batch.answers.labels_Y])
    in_sequence = order_T[rows_Y].argsort()
    same_positions = torch.equal(order_T[rows_Y][in_sequence], tensors["ce_indexes"].long())
    same_labels = torch.equal(labels_Y[in_sequence], tensors["ce_labels"].long())
    same_tokens = same_positions and same_labels
    yield _count("cross-entropy positions and labels", 0 if same_tokens else 1)
    if same_tokens:
        loss_Y = captioning_loss(model.lm_head, understanding_UH[rows_Y], labels_Y)
        yield _error("ce_per_token", loss_Y[in_sequence], tensors["ce_per_token"])

    counts = torch.tensor([len(batch.latents.noised_X), len(rows_Y), 1, len(rows_Y)])
    total, _ = objective(batch, counts)
    yield _error("loss", total, tensors["loss"].reshape(()))
    total.backward()
    yield from _compare_gradients(model, tensors)


def _compare_gradients(model: Bagel, tensors: dict[str, torch.Tensor]) -> Iterator[Comparison]:
    ours = {bagel_name(name): parameter.grad for name, parameter in model.named_parameters()}
    golden = {
        key.removeprefix("grads."): value
        for key, value in tensors.items()
        if key.startswith("grads.")
    }
    for name, gradient in golden.items():
        mine = ours.get(name)
        mine = torch.zeros_like(gradient) if mine is None else mine.reshape(gradient.shape)
        yield _error(f"gradient of {name}", mine, gradient)
    for name, mine in sorted(ours.items()):
        if mine is not None and name not in golden:
            yield Comparison(
                f"gradient of {name}, which has none in the golden case",
                float(mine.abs().max()),
                float("inf"),
            )


def _count(quantity: str, differing: int) -> Comparison:
    """Of a quantity that has to be equal."""
    return Comparison(quantity, float(differing), float(differing))


def _error(quantity: str, ours: torch.Tensor, golden: torch.Tensor) -> Comparison:
    if ours.shape != golden.shape:
        quantity = f"{quantity}: shape {list(ours.shape)} instead of {list(golden.shape)}"
    return Comparison(quantity, *errors(ours, golden))


def errors(ours: torch.Tensor, golden: torch.Tensor) -> tuple[float, float]:
    """(largest absolute error, the same over the golden tensor's largest value); infinite if the
    shapes differ."""
    if ours.shape != golden.shape:
        return float("inf"), float("inf")
    if not golden.numel():
        return 0.0, 0.0
    absolute = (ours.double() - golden.double()).abs().max().item()
    scale = golden.double().abs().max().item()
    if not math.isfinite(absolute):
        # NaN would be lost in a maximum over several tensors.
        return float("inf"), float("inf")
    return absolute, absolute / scale if scale else absolute


def _differing_pairs(case: Case) -> int:
    """Pairs of tokens of the pack that one code shows and the other hides; samples must not see
    each other at all."""
    order = case.batch.order_T
    context, live = case.batch.context_plan.visible(), case.batch.live_plan.visible()
    visible = torch.zeros(len(order), len(order), dtype=torch.bool)
    visible[order[:, None], order[None, :]] = torch.cat([context, live])
    start = 0
    for number, sample in enumerate(case.samples):
        rows = slice(start, start + sample.length)
        visible[rows, rows] ^= case.tensors[f"attention_allowed.sample{number}"].bool()
        start += sample.length
    return int(visible.sum())


def _architecture(description: dict) -> Architecture:
    dims = description["dims"]
    return build(
        Architecture,
        dict(
            hidden=dims["hidden"],
            layers=dims["layers"],
            heads=dims["heads"],
            kv_heads=dims["kv"],
            mlp=dims["inter"],
            vocabulary=dims["vocab"],
            rope_theta=description["rope_theta"],
            norm_eps=description["rms_norm_eps"],
            vit_hidden=dims["vit_hidden"],
            vit_layers=dims["vit_layers"],
            vit_heads=dims["vit_heads"],
            vit_mlp=3 * dims["vit_hidden"],
            vit_patch=description["vit_patch_size"],
            vit_side=dims["max_vit"],
            codec="flux",
            codec_downsample=description["vae_downsample"],
            latent_channels=dims["zch"],
            latent_patch=description["latent_patch_size"],
            latent_side=dims["max_latent"],
        ),
    )


def _samples(
    description: dict, tensors: dict, special: SpecialTokens, shape: Architecture
) -> list[Sample]:
    rope_T = tensors["position_ids"].numpy()
    logits_G = tensors["timesteps_logit"].double().numpy()
    shift = description["timestep_shift"]
    samples: list[Sample] = []
    token = latent = 0
    for number, items in enumerate(description["samples"]):
        allowed = tensors[f"attention_allowed.sample{number}"].bool().numpy()
        segments: list[Segment] = []
        starts: list[int] = []
        start = 0
        for place, item in enumerate(items):
            fields: dict = {}
            if item["type"] == "text":
                fields["token_ids"] = np.array([special.bos, *item["token_ids"], special.eos])
                length = len(fields["token_ids"])
                read = _noised_segment_read(segments, starts, allowed[start])
                kind = Kind.TEXT if read is None else Kind.CAPTION
                if read is None:
                    fields["answer"] = bool(item["loss"])
                else:
                    fields["supervises"] = read
            else:
                kind = _image_kind(item)
                stride = shape.vit_patch if kind == Kind.VIT else shape.geometry.latent_stride
                rows, columns = item["height"] // stride, item["width"] // stride
                cells = rows * columns
                fields["grid"] = rows, columns
                length = cells + 2
                name = f"sample{number}.item{place}"
                if kind == Kind.VIT:
                    fields["pixels"] = tensors[f"{name}.pixels"].numpy()
                else:
                    fields["latent"] = tensors[f"{name}.latent"].numpy()
                    if kind == Kind.NOISED:
                        s = 1 / (1 + np.exp(-logits_G[latent]))
                        fields["timestep"] = shift * s / (1 + (shift - 1) * s)
                        fields["noise"] = tensors["noise"][latent : latent + cells].numpy()
                    latent += cells
            segments.append(Segment(kind, rope_T[token : token + length], **fields))
            starts.append(start)
            start += length
            token += length
        samples.append(Sample(f"golden:{number}", segments))
    return samples


def _noised_segment_read(
    segments: list[Segment], starts: list[int], allowed_T: np.ndarray
) -> int | None:
    """The first noised segment that a row with the visibility `allowed_T` attends to."""
    for index, segment in enumerate(segments):
        if segment.kind == Kind.NOISED and allowed_T[starts[index]]:
            return index
    return None


def _image_kind(item: dict) -> Kind:
    kind = item["type"]
    if kind == "vit_image":
        return Kind.VIT
    if kind == "vae_image":
        return Kind.NOISED if item["loss"] else Kind.CLEAN
    raise ValueError(f"the type of an item must be text, vit_image or vae_image; got {kind!r}")
