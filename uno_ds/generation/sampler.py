"""Text to image: Euler integration of the learned velocity with text guidance, over one packed batch of all prompts.

Legend of shape suffixes: G generation rows, C values of a latent token.
"""
import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from uno_ds.data.text import Tokenizer
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import Codec, rows_to_latents
from uno_ds.sequence.packing import Collator, PackedBatch
from uno_ds.sequence.segments import Sample
from uno_ds.sequence.tasks import ImageViews, Layout, SequenceSettings, SpecialTokens
from uno_ds.settings import SettingsError, build, setting


@dataclass(frozen=True)
class SampleSettings:
    prompts: list[str] = setting(factory=list, doc="Prompts of the pictures drawn at the end of a run, with the base model and with the "
                                                   "trained one; none: no pictures.")
    height: int = setting(32, doc="Height of the pictures in pixels.", minimum=1)
    width: int = setting(32, doc="Width of the pictures in pixels.", minimum=1)
    steps: int = setting(50, doc="Euler steps from noise to image.", minimum=1)
    shift: float = setting(3.0, doc="Timestep shift of the steps; above 1 spends more of them near noise.", above=0)
    text_guidance: float = setting(4.0, doc="Guidance scale s: v = v_without + s (v_with - v_without) the prompt; 1: off.", minimum=1)
    guidance_interval: list[float] = setting(factory=lambda: [0.4, 1.0], minimum=0, maximum=1, doc="Guidance applies at low < t <= high.")
    seed: int = setting(0, doc="Seed of the first picture's noise; the next ones count up.", minimum=0)

    def __post_init__(self) -> None:
        if len(self.guidance_interval) != 2 or self.guidance_interval[0] > self.guidance_interval[1]:
            raise SettingsError("guidance_interval", f"must be [low, high] with low <= high, got {self.guidance_interval}.")


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    return SpecialTokens(tokenizer.bos, tokenizer.eos, tokenizer.start_of_image, tokenizer.end_of_image)


@torch.no_grad()
def generate(model: Bagel, codec: Codec, tokenizer: Tokenizer, settings: SampleSettings) -> list[Image.Image]:
    """One picture for each prompt. Guidance is renormalised to the norm of the guided-with velocity, per picture."""
    geometry, patch = model.shape.geometry, model.shape.latent_patch
    grid = settings.height // geometry.latent_stride, settings.width // geometry.latent_stride
    rows, pictures = grid[0] * grid[1], len(settings.prompts)
    if not rows or settings.height % geometry.latent_stride or settings.width % geometry.latent_stride:
        stride = geometry.latent_stride
        raise SettingsError("samples.height", f"height and width must be multiples of {stride} pixels, got {settings.height} x {settings.width}.")
    device = model.lm_head.weight.device
    batch = _batch(model, tokenizer, settings).to(device)
    generators = [np.random.default_rng([settings.seed + number, 0]) for number in range(pictures)]
    noise = [generator.standard_normal((rows, geometry.latent_values), dtype=np.float32) for generator in generators]
    x_GC = torch.from_numpy(np.concatenate(noise)).to(device)
    line = torch.linspace(1, 0, settings.steps + 1, dtype=torch.float64)
    times = (settings.shift * line / (1 + (settings.shift - 1) * line)).tolist()
    low, high = settings.guidance_interval
    for t, following in zip(times[:-1], times[1:], strict=True):
        with_prompt, without = _velocity(model, batch, torch.cat([x_GC, x_GC]), t).chunk(2)
        velocity = with_prompt
        if settings.text_guidance > 1 and low < t <= high:
            guided = without + settings.text_guidance * (with_prompt - without)
            norms = [v.reshape(pictures, -1).norm(dim=1) for v in (with_prompt, guided)]
            scale = (norms[0] / norms[1].clamp(min=1e-8)).clamp(max=1)
            velocity = guided * scale.repeat_interleave(rows)[:, None]
        x_GC = x_GC - velocity * (t - following)
    pixels = codec.decode(rows_to_latents(x_GC, grid, patch))
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def _batch(model: Bagel, tokenizer: Tokenizer, settings: SampleSettings) -> PackedBatch:
    """All prompts with their noised image, then as many images without a prompt, in one pack."""
    tokens = special_tokens(tokenizer)
    blank = ImageViews(latent=np.zeros((3, settings.height, settings.width), dtype=np.float32))
    samples: list[Sample] = []
    for drop in (0.0, 1.0):
        sequence = build(SequenceSettings, {"token_budget": 1, "metaquery_grid": 0, "drop_text": drop})
        layout = Layout(sequence, model.shape.geometry, tokens, captions=False, metaqueries=False)
        samples += [layout.text_to_image(prompt, tokenizer.encode(prompt), None, blank, np.random.default_rng(0)) for prompt in settings.prompts]
    return Collator(model.shape.geometry, tokens, train_understanding=False, stop_at_context=True)(samples)


def _velocity(model: Bagel, batch: PackedBatch, x_GC: torch.Tensor, t: float) -> torch.Tensor:
    timed = dataclasses.replace(batch, timestep_G=torch.full_like(batch.timestep_G, t))
    none = model.lm_head.weight.new_zeros(0, model.shape.hidden)
    _, generation_GH, _ = model(timed, x_GC, none)
    return model.llm2vae(generation_GH).float()
