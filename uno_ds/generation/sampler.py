"""Drawing pictures: Euler integration of the learned velocity, guided by text and by source images.

Shape suffixes: docs/notation.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from uno_ds.generation.cache import Cache
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import Codec, rows_to_latents
from uno_ds.sequence.segments import Sample
from uno_ds.sequence.tasks import SpecialTokens
from uno_ds.settings import SettingsError, printable, setting

RENORMALISATIONS = ("global", "channel", "text-channel", "none")


# Called at each step with its number, its noise level, the velocity [B, R, C] of each branch by
# name, and the guided one.
Observe = Callable[[int, float, dict[str, torch.Tensor], torch.Tensor], None]


def _guidance_interval(low: float, high: float) -> Any:
    return setting(
        factory=lambda: [low, high],
        minimum=0,
        maximum=1,
        doc="Guidance applies at low < t <= high.",
    )


def _renormalise(default: str) -> Any:
    return setting(
        default,
        choices=RENORMALISATIONS,
        doc="The guided velocity is scaled down to the norm of the one with all conditions. "
        "global: norm of the whole picture; channel: of each latent token; text-channel: of each "
        "token after text guidance, before image guidance, which is left as it is.",
    )


@dataclass(frozen=True)
class SamplerSettings:
    """How a picture is drawn from a prompt. The defaults are those of the public BAGEL, but for one
    step more: its 50 timesteps are 49 Euler steps."""

    steps: int = setting(
        50,
        doc="Euler steps from noise to image.",
        minimum=1,
        maximum=10_000,
    )
    shift: float = setting(
        3.0,
        doc="Timestep shift of the steps; above 1 spends more of them near noise.",
        minimum=1e-3,
        maximum=1e3,
    )
    text_guidance: float = setting(
        4.0,
        doc="Guidance scale s: v = v_without + s (v_with - v_without) the prompt; 1: off.",
        minimum=1,
        maximum=1e3,
    )
    guidance_interval: list[float] = _guidance_interval(0.4, 1.0)
    renormalise: str = _renormalise("global")
    renormalise_least: float = setting(
        0.0, doc="Smallest factor of that scaling.", minimum=0, maximum=1
    )
    seed: int = setting(
        0,
        doc="Seed of the first picture's noise; the next ones count up.",
        minimum=0,
        maximum=2**62,
    )

    def __post_init__(self) -> None:
        if (
            len(self.guidance_interval) != 2
            or self.guidance_interval[0] > self.guidance_interval[1]
        ):
            raise SettingsError(
                "guidance_interval",
                f"must be [low, high] with low <= high, got {printable(self.guidance_interval)}.",
            )

    def times(self) -> list[float]:
        """steps + 1 noise levels from 1 to 0."""
        line = np.linspace(1, 0, self.steps + 1)
        return (self.shift * line / (1 + (self.shift - 1) * line)).tolist()


@dataclass(frozen=True)
class EditSettings(SamplerSettings):
    """How a picture is edited. The defaults are those of the public BAGEL, as above."""

    guidance_interval: list[float] = _guidance_interval(0.0, 1.0)
    renormalise: str = _renormalise("text-channel")
    image_guidance: float = setting(
        2.0,
        doc="Guidance scale of the source image, after text guidance; 1: off.",
        minimum=1,
        maximum=1e3,
    )


@dataclass(frozen=True, eq=False)
class Branches:
    """The samples whose velocities guide one picture. Their last segment is the noised image, the
    others are what it reads: all conditions; all but the prompt; all but the source images. A
    branch that does not guide is None."""

    full: Sample
    without_text: Sample | None = None
    without_image: Sample | None = None


@torch.no_grad()
def draw(
    model: Bagel,
    codec: Codec,
    tokens: SpecialTokens,
    pictures: Sequence[Branches],
    settings: SamplerSettings,
    progress: str | None = None,
    noise_BGC: torch.Tensor | None = None,
    observe: Observe | None = None,
) -> list[Image.Image]:
    """One picture for each entry; all have one size and the same branches. What they read is
    computed once and cached. Picture number n starts from the noise of seed `settings.seed + n`,
    whatever its neighbours are, or from `noise_BGC[n]`. `progress`: label of a bar over the steps,
    shown on a terminal."""
    if not pictures:
        return []
    names = [
        name
        for name in ("full", "without_text", "without_image")
        if getattr(pictures[0], name) is not None
    ]
    samples = [getattr(picture, name) for name in names for picture in pictures]
    cache = Cache(model, tokens)
    known = [
        (number, segment)
        for number, sample in enumerate(samples)
        for segment in sample.segments[:-1]
    ]
    if known:
        cache.append(known, codec)
    noised = [(number, sample.segments[-1]) for number, sample in enumerate(samples)]
    guided, plain = cache.lay_out(noised), cache.lay_out(noised[: len(pictures)])
    grid, values = noised[0][1].grid, model.shape.latent_values
    if noise_BGC is None:
        size = grid[0] * grid[1], values
        noise_BGC = torch.stack(
            [_noise(settings.seed + number, size) for number in range(len(pictures))]
        )
    x_BGC = noise_BGC.to(model.lm_head.weight.device)
    low, high = settings.guidance_interval
    times = settings.times()
    steps = list(enumerate(zip(times[:-1], times[1:], strict=True)))
    for step, (t, following) in tqdm(
        steps, desc=progress, leave=False, disable=None if progress else True
    ):
        if len(names) > 1 and low < t <= high:
            stacked = cache.velocity(
                guided, x_BGC.repeat(len(names), 1, 1).flatten(0, 1), t
            ).unflatten(0, (len(names), *x_BGC.shape[:2]))
            velocities = dict(zip(names, stacked, strict=True))
            v_BGC = guide(velocities, settings)
        else:
            v_BGC = cache.velocity(plain, x_BGC.flatten(0, 1), t).view(x_BGC.shape)
            velocities = {"full": v_BGC}
        if observe is not None:
            observe(step, t, velocities, v_BGC)
        x_BGC = x_BGC - v_BGC * (t - following)
    pixels = codec.decode(
        rows_to_latents(x_BGC.flatten(0, 1), grid, model.shape.latent_patch)
    ).float()
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def _noise(seed: int, size: tuple[int, int]) -> torch.Tensor:
    """fp32 [R, C]: what one picture starts from."""
    return torch.from_numpy(
        np.random.default_rng([seed, 0]).standard_normal(size, dtype=np.float32)
    )


def guide(velocities: dict[str, torch.Tensor], settings: SamplerSettings) -> torch.Tensor:
    """The guided velocity [B, R, C] of the branches' velocities, renormalised (conventions of
    BAGEL's sampler). A branch without the source image needs EditSettings."""
    full = v = velocities["full"]
    if "without_text" in velocities:
        v = velocities["without_text"] + settings.text_guidance * (v - velocities["without_text"])
        if settings.renormalise == "text-channel":
            v = _shrink(v, full, (2,), settings.renormalise_least)
    if "without_image" in velocities:
        v = velocities["without_image"] + settings.image_guidance * (
            v - velocities["without_image"]
        )
    if settings.renormalise in ("global", "channel"):
        v = _shrink(
            v,
            full,
            (1, 2) if settings.renormalise == "global" else (2,),
            settings.renormalise_least,
        )
    return v


def _shrink(
    v: torch.Tensor, like: torch.Tensor, dims: tuple[int, ...], least: float
) -> torch.Tensor:
    """v scaled to the norm of `like` over `dims`, by a factor between `least` and 1."""
    norms = [torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (like, v)]
    return v * (norms[0] / norms[1].clamp(min=1e-8)).clamp(min=least, max=1.0)
