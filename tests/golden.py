"""Replays a golden case of the public BAGEL code through the product's own sequence, model and objective."""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from uno_ds.kernels.backends import KernelSettings
from uno_ds.model.architecture import Architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import PixelCodec
from uno_ds.model.weights import bagel_name
from uno_ds.objectives.uno import ObjectiveSettings, UnoObjective
from uno_ds.sequence.packing import Collator, PackedBatch
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.sequence.tasks import SpecialTokens
from uno_ds.settings import build

FOLDER = Path(__file__).parent / "goldens"


@dataclass
class Case:
    tensors: dict[str, torch.Tensor]
    objective: UnoObjective
    samples: list[Sample]
    batch: PackedBatch


def load_case(name: str) -> Case:
    description = json.loads((FOLDER / f"{name}.json").read_text())
    tensors = load_file(FOLDER / f"{name}.safetensors")
    dims = description["dims"]
    shape = build(Architecture, dict(
        hidden=dims["hidden"], layers=dims["layers"], heads=dims["heads"], kv_heads=dims["kv"], mlp=dims["inter"], vocabulary=dims["vocab"],
        rope_theta=description["rope_theta"], norm_eps=description["rms_norm_eps"], vit_hidden=dims["vit_hidden"], vit_layers=dims["vit_layers"],
        vit_heads=dims["vit_heads"], vit_mlp=3 * dims["vit_hidden"], vit_patch=description["vit_patch_size"], vit_side=dims["max_vit"],
        codec="flux", codec_downsample=description["vae_downsample"], latent_channels=dims["zch"], latent_patch=description["latent_patch_size"],
        latent_side=dims["max_latent"]))
    special = SpecialTokens(**{key: description["special_tokens"][key] for key in ("bos", "eos", "start_of_image", "end_of_image")})
    samples = _samples(description, tensors, special, shape)
    model = Bagel(shape, attention="sdpa", read_context=True)
    objective = UnoObjective(model, PixelCodec(1), build(ObjectiveSettings, {"caption_weight": 1.0, "regression_weight": 0.0}), KernelSettings(), 0)
    with torch.no_grad():
        for ours, target in [*model.named_parameters(), *model.named_buffers()]:
            target.copy_(tensors[f"weights.{bagel_name(ours)}"].reshape(target.shape))
    objective.set_trainable(everything=False)
    batch = Collator(shape.geometry, special, train_understanding=False, stop_at_context=False)(samples)
    return Case(tensors, objective, samples, batch)


def _samples(description: dict, tensors: dict, special: SpecialTokens, shape: Architecture) -> list[Sample]:
    rope, start, noise_start, samples = tensors["position_ids"].numpy(), 0, 0, []
    logits = tensors["timesteps_logit"].double().numpy()
    latent_start = 0
    for number, items in enumerate(description["samples"]):
        segments: list[Segment] = []
        for place, item in enumerate(items):
            fields: dict = {}
            if item["type"] == "text":
                kind = Kind.TEXT
                fields["token_ids"] = np.array([special.bos, *item["token_ids"], special.eos])
                length = len(fields["token_ids"])
                if item["loss"] and segments[-1].kind == Kind.NOISED:
                    kind, fields["supervises"] = Kind.CAPTION, len(segments) - 1
                else:
                    fields["answer"] = bool(item["loss"])
            else:
                kind = Kind.VIT if item["type"] == "vit_image" else Kind.NOISED if item["loss"] else Kind.CLEAN
                stride = shape.vit_patch if kind == Kind.VIT else shape.geometry.latent_stride
                fields["grid"] = (item["height"] // stride, item["width"] // stride)
                rows = fields["grid"][0] * fields["grid"][1]
                length = rows + 2
                prefix = f"sample{number}.item{place}"
                if kind == Kind.VIT:
                    fields["pixels"] = tensors[f"{prefix}.pixels"].numpy()
                else:
                    fields["latent"] = tensors[f"{prefix}.latent"].numpy()
                    s = 1 / (1 + np.exp(-logits[latent_start]))
                    shift = description["timestep_shift"]
                    if kind == Kind.NOISED:
                        fields["timestep"] = shift * s / (1 + (shift - 1) * s)
                        fields["noise"] = tensors["noise"][latent_start:latent_start + rows].numpy()
                    latent_start += rows
            segments.append(Segment(kind, rope[start:start + length], **fields))
            start += length
        samples.append(Sample(f"golden:{number}", segments))
    return samples
