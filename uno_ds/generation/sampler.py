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
from uno_ds.sequence.composition import SpecialTokens
from uno_ds.sequence.segments import Sample
from uno_ds.settings import SettingsError, printable, setting

RENORMALISATIONS = ("global", "channel", "text-channel", "none")


# Called at each step with its number, its noise level, the velocity [B, G, C] of each branch by
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
    others are its conditions: all; all but the prompt; all but the source images. A branch that
    does not guide is None."""

    full: Sample
    without_text: Sample | None = None
    without_image: Sample | None = None

    def names(self) -> list[str]:
        """The branches that are given, `full` first."""
        optional = ("without_text", "without_image")
        return ["full", *(name for name in optional if getattr(self, name) is not None)]


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
    """One picture for each entry; all have one size and the same branches. The rows that they read
    are computed once and cached. Picture number n starts from the noise of seed
    `settings.seed + n`, whatever the other pictures are, or from `noise_BGC[n]`. `progress`: label
    of a bar over the steps, shown on a terminal."""
    if not pictures:
        return []
    names = pictures[0].names()
    samples: list[Sample] = []
    for name in names:
        samples += [getattr(picture, name) for picture in pictures]
    cache = Cache(model, tokens)
    read = []
    for number, sample in enumerate(samples):
        read += [(number, segment) for segment in sample.segments[:-1]]
    if read:
        cache.append(read, codec)
    noised = [(number, sample.segments[-1]) for number, sample in enumerate(samples)]
    guided_batch = cache.lay_out(noised)
    # The branches with all conditions come first.
    plain_batch = cache.lay_out(noised[: len(pictures)])
    grid = samples[0].segments[-1].grid
    if noise_BGC is None:
        size = (grid[0] * grid[1], model.shape.latent_values)
        noise_BGC = torch.stack(
            [_noise(settings.seed + number, size) for number in range(len(pictures))]
        )
    x_BGC = noise_BGC.to(model.lm_head.weight.device)
    low, high = settings.guidance_interval
    times = settings.times()
    intervals = list(zip(times[:-1], times[1:], strict=True))
    hidden_bar = None if progress else True
    bar = tqdm(intervals, desc=progress, leave=False, disable=hidden_bar)
    for step, (t, next_t) in enumerate(bar):
        if len(names) > 1 and low < t <= high:
            x_of_branches = x_BGC.repeat(len(names), 1, 1).flatten(0, 1)
            stacked = cache.velocity(guided_batch, x_of_branches, t)
            by_branch = stacked.unflatten(0, (len(names), *x_BGC.shape[:2]))
            velocities = dict(zip(names, by_branch, strict=True))
            v_BGC = guide(velocities, settings)
        else:
            v_BGC = cache.velocity(plain_batch, x_BGC.flatten(0, 1), t).view(x_BGC.shape)
            velocities = {"full": v_BGC}
        if observe is not None:
            observe(step, t, velocities, v_BGC)
        x_BGC = x_BGC - v_BGC * (t - next_t)
    latents = rows_to_latents(x_BGC.flatten(0, 1), grid, model.shape.latent_patch)
    return _pictures(codec.decode(latents).float())


def _pictures(pixels_B3hw: torch.Tensor) -> list[Image.Image]:
    """Images of pixels in [-1, 1]; values beyond are clipped."""
    bytes_B3hw = ((pixels_B3hw.clamp(-1, 1) + 1) * 127.5).round().byte()
    arrays = bytes_B3hw.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def _noise(seed: int, size: tuple[int, int]) -> torch.Tensor:
    """fp32 [G, C]: the initial noise of one picture."""
    noise = np.random.default_rng([seed, 0]).standard_normal(size, dtype=np.float32)
    return torch.from_numpy(noise)


def guide(velocities: dict[str, torch.Tensor], settings: SamplerSettings) -> torch.Tensor:
    """The guided velocity [B, G, C] of the branches' velocities, renormalised (conventions of
    BAGEL's sampler). A branch without the source image needs EditSettings."""
    full = v = velocities["full"]
    if "without_text" in velocities:
        without = velocities["without_text"]
        v = without + settings.text_guidance * (v - without)
        if settings.renormalise == "text-channel":
            v = _shrink(v, full, (2,), settings.renormalise_least)
    if "without_image" in velocities:
        assert isinstance(settings, EditSettings), "only edits have source images"
        without = velocities["without_image"]
        v = without + settings.image_guidance * (v - without)
    match settings.renormalise:
        case "global":
            return _shrink(v, full, (1, 2), settings.renormalise_least)
        case "channel":
            return _shrink(v, full, (2,), settings.renormalise_least)
        case "text-channel" | "none":
            return v
        case unknown:
            allowed = ", ".join(RENORMALISATIONS)
            raise ValueError(f"Unknown renormalisation {unknown!r}; allowed are {allowed}.")


def _shrink(
    v: torch.Tensor, like: torch.Tensor, dims: tuple[int, ...], least: float
) -> torch.Tensor:
    """v scaled to the norm of `like` over `dims`, by a factor between `least` and 1."""
    allowed = torch.linalg.vector_norm(like, dim=dims, keepdim=True)
    norm = torch.linalg.vector_norm(v, dim=dims, keepdim=True)
    return v * (allowed / norm.clamp(min=1e-8)).clamp(min=least, max=1.0)
