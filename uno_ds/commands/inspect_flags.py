"""Flags of the command that looks inside models."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uno_ds.commands.evaluate_flags import add_judge_flags
from uno_ds.commands.flags import Parser
from uno_ds.inspection.alignment import NEIGHBOURS
from uno_ds.inspection.plan import PARTS
from uno_ds.kernels.backends import backend_names
from uno_ds.settings import SettingsError, printable

MOST = 100_000
# More than the neighbours of CKNNA, and four of a class in each fold.
LEAST_IMAGES = 2 * NEIGHBOURS


class _AdapterOfCheckpoint(argparse.Action):
    """Keeps the texts of --adapter by the number of the --checkpoint before them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if not namespace.checkpoint:
            raise SettingsError(
                "--adapter",
                "has no --checkpoint before it; give it after the base that it belongs to.",
            )
        number = len(namespace.checkpoint) - 1
        kept = namespace.adapter or {}
        namespace.adapter = kept | {number: [*kept.get(number, []), values]}


def inspect_parser() -> Parser:
    parser = Parser(
        prog="inspect_model.py",
        description="Looks inside one or several models with the same images and the same noise: "
        "maps of hidden states, alignment with image encoders, probes, what the understanding "
        "expert reads, gradients of the losses, and where generations go wrong. Writes one folder "
        "with report.html, figures and results.json. A call that was stopped continues where it "
        "was; ranks that a launcher starts share the work.",
    )
    what = parser.add_argument_group("what is looked at")
    what.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        metavar="DIR",
        help="a BAGEL folder, a run (runs/NAME), one of its checkpoints, or a model that ships "
        "with uno_ds (tiny_base); may be repeated, and the report has all of them side by side",
    )
    what.add_argument(
        "--adapter",
        action=_AdapterOfCheckpoint,
        metavar="DIR[:SHARE]",
        help="an adapter folder that is merged into the base folder --checkpoint before it, and by "
        "how much it counts (default 1); may be repeated. A base that is named twice, once with "
        "an adapter, is compared with itself",
    )
    what.add_argument(
        "--data",
        default="scenes/t2i",
        metavar="SOURCE",
        help="file, folder or glob of a t2i or edit source, or an embedded set, drawn anew with a "
        "seed that no training has (default scenes/t2i)",
    )
    what.add_argument(
        "--recipe",
        metavar="NAME_OR_FILE",
        help="sizes of images, weights of losses and settings of the sampler (default: the recipe "
        "of the first checkpoint that is a run's, else the largest sizes of the model)",
    )
    what.add_argument("--images", type=int, default=128, metavar="N", help="images (default 128)")
    what.add_argument(
        "--t",
        default="0.1,0.3,0.5,0.7,0.9",
        metavar="T,T,...",
        help="noise levels, 0 clean, 1 noise (default 0.1,0.3,0.5,0.7,0.9)",
    )
    what.add_argument(
        "--layers",
        metavar="L,L,...",
        help="layers after which hidden states are taken, 1 the first (default: 4, evenly spaced)",
    )
    what.add_argument(
        "--only",
        metavar="PARTS",
        help=f"some of {','.join(PARTS)} (default: all that are possible)",
    )
    what.add_argument(
        "--encoder",
        type=Path,
        metavar="DIR",
        help="also compare with this image encoder, a folder of transformers such as DINOv2",
    )
    what.add_argument(
        "--without-prompts",
        action="store_true",
        help="leave prompts and conditions out, so that hidden states know the noised image alone",
    )
    what.add_argument(
        "--shown", type=int, default=2, metavar="N", help="images with maps (default 2)"
    )
    what.add_argument(
        "--gradient-images",
        type=int,
        default=16,
        metavar="N",
        help="images of the batch whose gradients are taken (default 16)",
    )
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts of the diagnosis, a text or a JSON object a line (default: scenes)",
    )
    what.add_argument(
        "--scene-prompts",
        type=int,
        default=24,
        metavar="N",
        help="prompts of scenes, without --prompts (default 24)",
    )
    what.add_argument("--steps", type=int, help="Euler steps of the diagnosis's pictures")
    what.add_argument(
        "--max-tokens",
        type=int,
        default=64,
        metavar="N",
        help="longest caption or answer (default 64)",
    )
    what.add_argument("--seed", type=int, default=0, help="of images, noise and pictures")
    judged = parser.add_argument_group(
        "the judge of the diagnosis",
        "a vision-language model that says of every picture whether it shows what was asked for, "
        "in place of the program, and of captions that no program can judge what they say; its key "
        "is read from UNO_DS_JUDGE_KEY or OPENAI_API_KEY",
    )
    add_judge_flags(judged)
    how = parser.add_argument_group("where and how")
    how.add_argument(
        "--out",
        type=Path,
        default=Path("runs/inspection"),
        metavar="DIR",
        help="folder of the report (default runs/inspection)",
    )
    how.add_argument(
        "--overwrite", action="store_true", help="remove what an earlier call computed in DIR"
    )
    how.add_argument(
        "--batch", type=int, default=16, metavar="N", help="images computed together (default 16)"
    )
    how.add_argument(
        "--no-ema",
        action="store_true",
        help="of a checkpoint: the trained weights, where the default is their moving average",
    )
    how.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="of checkpoints: the base that they were trained on, if that was moved",
    )
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default auto)")
    how.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16"),
        help="auto: bf16 on a GPU, fp32 on a CPU",
    )
    how.add_argument(
        "--backend",
        default="auto",
        choices=("auto", *backend_names("attention")),
        help="attention backend (default auto)",
    )
    how.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def check_numbers(options: argparse.Namespace) -> None:
    """Raises SettingsError for a number that is out of its range."""
    for flag, least in (
        ("images", LEAST_IMAGES),
        ("shown", 1),
        ("gradient_images", 1),
        ("scene_prompts", 1),
        ("max_tokens", 1),
        ("batch", 1),
        ("seed", 0),
    ):
        given = getattr(options, flag)
        most = MOST if flag != "seed" else 2**31
        if not least <= given <= most:
            raise SettingsError(
                f"--{flag.replace('_', '-')}", f"must be {least} to {most:,}, got {given}."
            )


def levels_of(text: str) -> tuple[float, ...]:
    """The noise levels of --t, in rising order."""
    levels = []
    for word in text.split(","):
        try:
            level = float(word)
        except ValueError:
            level = math.nan
        if not 0 <= level <= 1:
            raise SettingsError(
                "--t", f"must be noise levels from 0 to 1, comma between, got '{printable(text)}'."
            )
        levels.append(level)
    return tuple(sorted(set(levels)))


def layers_of(text: str, count: int) -> tuple[int, ...]:
    """The layers of --layers, in rising order, of a model with `count` layers."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and 1 <= int(word) <= count for word in words):
        raise SettingsError(
            "--layers",
            f"must be numbers from 1 to {count}, comma between, got '{printable(text)}'.",
        )
    return tuple(sorted({int(word) for word in words}))


def parts_of(text: str | None) -> tuple[str, ...]:
    """The parts of --only, in the order of the report."""
    if text is None:
        return PARTS
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in PARTS:
            raise SettingsError(
                "--only", f"knows no part '{printable(word)}'; allowed are {', '.join(PARTS)}."
            )
    return tuple(part for part in PARTS if part in words)
