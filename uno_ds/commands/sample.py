"""The command line of sampling: text to image, image and instruction to image, image to text."""

import argparse
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from uno_ds import __version__
from uno_ds.commands.flags import Parser
from uno_ds.commands.runner import REFUSED, print_error
from uno_ds.data.images import BadRow, ImageSettings, decode
from uno_ds.files_on_disk import read_regular, replacing
from uno_ds.generation.inference import (
    CaptionSettings,
    SampleSettings,
    caption,
    caption_noised,
    codec_size,
    edit,
    generate,
)
from uno_ds.generation.inference_model import OpenModel, assemble, open_model
from uno_ds.generation.sampler import RENORMALISATIONS, EditSettings, SamplerSettings
from uno_ds.kernels.backends import KernelSettings, backend_names
from uno_ds.model.architecture import packaged
from uno_ds.settings import SettingsError, build, printable, read_yaml, to_plain
from uno_ds.training.checkpoint_file import is_checkpoint
from uno_ds.training.export import TrainedModel

METADATA = "uno_ds"
# Controls beyond those that JSON escapes, separators of lines, marks of direction and lone surrogates.
UNSAFE = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_PATH = 4096
MOST_PICTURES = 100_000
LARGEST_FILE = 1_000_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.Namespace()
    try:
        options = _parser().parse_args(arguments)
        for flag, given in (("--batch", options.batch), ("--count", options.count)):
            if not 1 <= given <= MOST_PICTURES:
                raise SettingsError(flag, f"must be at least 1 and at most {MOST_PICTURES:,}.")
        {"generate": _generate, "edit": _edit, "caption": _caption}[options.command](options)
    except SettingsError as error:
        print_error(SettingsError(_flag(error.key, options), error.message))
        return REFUSED
    return 0


def _flag(key: str, options: argparse.Namespace) -> str:
    """The flag by which a setting is given here."""
    if key.startswith(("model.base", "tokenizer")):
        return "--checkpoint"
    given = [name for name in reversed(key.split(".")) if name in vars(options)]
    return f"--{given[0].replace('_', '-')}" if given else key


def _generate(options: argparse.Namespace) -> None:
    prompts = list(
        itertools.chain.from_iterable([prompt] * options.count for prompt in _prompts(options))
    )
    values = _sampler_values(options)
    sides = {"height": options.height, "width": options.width}
    build(SampleSettings, values | {key: side for key, side in sides.items() if side is not None})
    paths = _free_paths(options, len(prompts))
    opened = _open(options)
    largest = opened.model.shape.geometry.latent_stride * opened.model.shape.geometry.latent_side
    settings = build(
        SampleSettings,
        values | {"height": options.height or largest, "width": options.width or largest},
    )
    for start in range(0, len(prompts), options.batch):
        part = dataclasses.replace(
            settings, prompts=prompts[start : start + options.batch], seed=settings.seed + start
        )
        pictures = generate(
            opened.model,
            opened.codec,
            opened.tokenizer,
            part,
            _label(start, len(part.prompts), len(prompts)),
        )
        for number, (picture, prompt) in enumerate(zip(pictures, part.prompts, strict=True)):
            facts = _plain(part) | {
                "task": "generate",
                "prompt": prompt,
                "seed": part.seed + number,
            }
            _write(paths[start + number], picture, facts, options)


def _edit(options: argparse.Namespace) -> None:
    requests = list(
        itertools.chain.from_iterable([request] * options.count for request in _requests(options))
    )
    images = [_picture(path) for path, _ in requests]
    settings = build(EditSettings, _sampler_values(options))
    if (options.height is None) != (options.width is None):
        raise SettingsError("--height", "goes with --width: give both or none.")
    paths = _free_paths(options, len(requests))
    opened = _open(options)
    sizes = [
        (options.height, options.width)
        if options.height
        else codec_size(opened.model.shape.geometry, image)
        for image in images
    ]
    for start, stop in _runs_of_one_size(sizes, options.batch):
        part = dataclasses.replace(settings, seed=settings.seed + start)
        instructions = [instruction for _, instruction in requests[start:stop]]
        pictures = edit(
            opened.model,
            opened.codec,
            opened.tokenizer,
            images[start:stop],
            instructions,
            part,
            sizes[start],
            _label(start, stop - start, len(requests)),
        )
        for number, picture in enumerate(pictures, start=start):
            facts = _plain(part) | {
                "task": "edit",
                "source": str(requests[number][0]),
                "instruction": requests[number][1],
                "seed": settings.seed + number,
                "height": sizes[number][0],
                "width": sizes[number][1],
            }
            _write(paths[number], picture, facts, options)


def _caption(options: argparse.Namespace) -> None:
    images = [_picture(path) for path in options.image]
    settings = build(
        CaptionSettings,
        {
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed or 0,
        },
    )
    if options.from_noised is None and options.prompt is not None:
        raise SettingsError(
            "--prompt",
            "goes with --from-noised: it is what the generation expert reads before the noised latents.",
        )
    if options.from_noised is not None and (
        options.question is not None or options.view is not None
    ):
        raise SettingsError(
            "--question" if options.question is not None else "--view",
            "does not go with --from-noised: UNO's captions are read from the noised latents alone.",
        )
    opened = _open(options)
    for start in tqdm(
        range(0, len(images), options.batch), desc="captions", leave=False, disable=None
    ):
        part, seeded = (
            images[start : start + options.batch],
            dataclasses.replace(settings, seed=settings.seed + start),
        )
        common = opened.model, opened.codec, opened.tokenizer, part, seeded
        if options.from_noised is not None:
            texts = caption_noised(*common, options.from_noised, options.prompt)
        else:
            texts = caption(*common, options.question, options.view or "vit")
        for number, text in enumerate(texts, start=start):
            facts = {
                "image": str(options.image[number]),
                "caption": text,
                "from_noised": options.from_noised,
                "prompt": options.prompt,
                "question": options.question,
                "seed": settings.seed + number,
            }
            line = f"{printable(options.image[number], LONGEST_PATH)}: {_shown(text)}"
            print(_json(facts) if options.json else line, flush=True)


def _open(options: argparse.Namespace) -> OpenModel:
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu")
            if options.device == "auto"
            else options.device
        )
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            "--device", f"'{options.device}' cannot be used: {str(error).splitlines()[0]}"
        ) from None
    precision = (
        ("bf16" if device.type == "cuda" else "fp32")
        if options.precision == "auto"
        else options.precision
    )
    attention = build(KernelSettings, {"attention": options.backend}).resolved().attention
    how = device, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision], attention
    path = packaged(options.checkpoint)
    if is_checkpoint(path):
        trained = TrainedModel(path, average=False if options.no_ema else None, base=options.base)
        opened = assemble(trained.shape, trained.read, trained.base, trained.tokenizer, *how)
    else:
        opened = open_model(path, *how)
    for warning in opened.tokenizer.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    return opened


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt or [])
    if options.prompts is not None:
        lines = _lines(options.prompts, "--prompts")
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SettingsError(
            "--prompt",
            "nothing to draw: give --prompt TEXT or --prompts FILE with a prompt on each line.",
        )
    return prompts


def _requests(options: argparse.Namespace) -> list[tuple[Path, str]]:
    """(source image, instruction) of every edit."""
    if (options.image is None) != (options.instruction is None):
        raise SettingsError(
            "--instruction" if options.image else "--image",
            "is missing: an edit needs --image and --instruction, or --edits FILE.",
        )
    requests = [(options.image, options.instruction)] if options.image else []
    lines = _lines(options.edits, "--edits") if options.edits else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, instruction = row["image"], row["instruction"]
            if not isinstance(image, str) or not isinstance(instruction, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SettingsError(
                "--edits",
                f'{options.edits}, line {number}: must be {{"image": FILE, "instruction": TEXT}}.',
            ) from None
        # A relative path counts from the file that names it.
        requests.append((options.edits.parent / image, instruction))
    if not requests:
        raise SettingsError(
            "--image", "nothing to edit: give --image FILE and --instruction TEXT, or --edits FILE."
        )
    return requests


def _lines(path: Path, flag: str) -> list[str]:
    """Lines of a UTF-8 file with or without a byte-order mark. Only newlines part them: a text may hold other separators."""
    try:
        return read_regular(path, LARGEST_FILE).decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise SettingsError(flag, f"{path} cannot be read: {error}") from None


def _picture(path: Path) -> Image.Image:
    try:
        return decode(read_regular(path, LARGEST_FILE), build(ImageSettings, {}))
    except OSError as error:
        raise SettingsError("--image", f"{path} cannot be read: {error.strerror}.") from None
    except BadRow as error:
        raise SettingsError("--image", f"{path} is not a usable image: {error}.") from None


def _free_paths(options: argparse.Namespace, count: int) -> list[Path]:
    """Where the pictures go: OUT/0000.png and so on, none of which is there yet unless --overwrite."""
    paths = [options.out / f"{number:04d}.png" for number in range(count)]
    taken = [path for path in paths if path.exists()]
    if taken and not options.overwrite:
        raise SettingsError(
            "--out", f"{taken[0]} exists already; give another folder, or --overwrite."
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError("--out", f"{options.out} cannot be made: {error.strerror}.") from None
    return paths


def _write(path: Path, picture: Image.Image, facts: dict, options: argparse.Namespace) -> None:
    """Writes the PNG, whose metadata holds everything that made it."""
    information = PngInfo()
    facts = {key: value for key, value in facts.items() if value is not None} | {
        "checkpoint": options.checkpoint,
        "version": __version__,
    }
    information.add_itxt(METADATA, _json(facts))
    with replacing(path) as partial:
        picture.save(partial, format="PNG", pnginfo=information)
    text = facts.get("prompt") or facts.get("instruction")
    print(f"{printable(path, LONGEST_PATH)}: {_shown(text)}", flush=True)


def _shown(text: str) -> str:
    """The whole text, with what a terminal obeys or cannot show escaped."""
    return printable(text, max(60, 10 * len(text)))


def _json(facts: dict) -> str:
    """Readable in any language; what a terminal obeys and lone surrogates are escaped as JSON does."""
    text = json.dumps(facts, ensure_ascii=False)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _runs_of_one_size(sizes: list[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive entries of one size, at most `most` of them."""
    start = 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or stop - start == most or sizes[stop] != sizes[start]:
            yield start, stop
            start = stop


def _plain(settings: SamplerSettings) -> dict:
    """Everything that decides the picture, without the requests and without the settings of the
    other task."""
    return {
        key: value for key, value in to_plain(settings).items() if key not in ("prompts", "edit")
    }


def _label(start: int, count: int, total: int) -> str:
    return (
        f"picture {start + 1} to {start + count} of {total}"
        if count > 1
        else f"picture {start + 1} of {total}"
    )


def _sampler_values(options: argparse.Namespace) -> dict:
    """The sampler's settings for this task: flags, then the recipe of the run, then the
    defaults."""
    section = "samples.edit" if options.command == "edit" else "samples"
    drawing = _recipe_settings(packaged(options.checkpoint), section)
    known = drawing.edit if options.command == "edit" else drawing
    names = (
        "steps",
        "shift",
        "text_guidance",
        "image_guidance",
        "guidance_interval",
        "renormalise",
        "renormalise_least",
        "seed",
    )
    values = {name: getattr(known, name) for name in names if hasattr(known, name)}
    flags = {name: getattr(options, name, None) for name in values}
    if options.num_timesteps is not None:
        flags["steps"] = _steps(options.num_timesteps, options.steps)
    return values | {name: value for name, value in flags.items() if value is not None}


def _steps(num_timesteps: int, steps: int | None) -> int:
    """Euler steps between N noise levels, which is how the public BAGEL counts."""
    if steps is not None:
        raise SettingsError(
            "--num-timesteps",
            f"does not go with --steps: {num_timesteps} timesteps are {num_timesteps - 1} steps; "
            "give one of them.",
        )
    if num_timesteps < 2:
        raise SettingsError(
            "--num-timesteps",
            f"must be at least 2, got {num_timesteps}: N timesteps are N - 1 Euler steps.",
        )
    return num_timesteps - 1


def _recipe_settings(checkpoint: Path, section: str) -> SampleSettings:
    """`samples` of the run that a checkpoint belongs to; the defaults for any other model.
    `section`: what is used of it."""
    if not is_checkpoint(checkpoint):
        return SampleSettings()
    run = checkpoint if (checkpoint / "checkpoints").is_dir() else checkpoint.parent.parent
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        return SampleSettings()
    try:
        plain = read_yaml(recipe.read_text(encoding="utf-8-sig"))
        settings = build(SampleSettings, (plain or {}).get("samples") or {}, "samples")
    except (OSError, ValueError, AttributeError) as error:
        raise SettingsError("--checkpoint", f"{recipe} is not a readable recipe: {error}") from None
    print(f"settings that no flag gives: {section} of {recipe}", flush=True)
    return settings


def _drawing_flags(defaults: SamplerSettings) -> argparse.ArgumentParser:
    """Flags of the commands that draw; None where the recipe or the defaults of the task decide."""
    drawing = argparse.ArgumentParser(add_help=False)
    drawing.add_argument(
        "--out",
        type=Path,
        default=Path("samples"),
        metavar="DIR",
        help="folder of the PNG files (default samples)",
    )
    drawing.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    drawing.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="pictures for each request, with seeds that count up (default 1)",
    )
    drawing.add_argument("--steps", type=int, help=f"Euler steps (default {defaults.steps})")
    drawing.add_argument(
        "--num-timesteps",
        type=int,
        metavar="N",
        help="in place of --steps, as the public BAGEL counts: N noise levels, N - 1 Euler steps",
    )
    drawing.add_argument("--shift", type=float, help=f"timestep shift (default {defaults.shift:g})")
    drawing.add_argument(
        "--text-guidance",
        type=float,
        metavar="S",
        help=f"guidance scale of the text; 1: off (default {defaults.text_guidance:g})",
    )
    drawing.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guidance applies at LOW < t <= HIGH, t = 1 being noise (default "
        f"{defaults.guidance_interval[0]:g} {defaults.guidance_interval[1]:g})",
    )
    drawing.add_argument(
        "--renormalise",
        choices=RENORMALISATIONS,
        help=f"norm that guidance must not exceed (default {defaults.renormalise})",
    )
    drawing.add_argument(
        "--renormalise-least",
        type=float,
        metavar="X",
        help="smallest factor of the renormalisation (default 0)",
    )
    return drawing


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="sample.py", description="Draws, edits and describes pictures with a trained model."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    defaults_note = (
        "Settings that no flag gives are those of the recipe (samples, samples.edit) where the "
        "checkpoint is that of a run, and else the defaults below."
    )
    drawing, editing = _drawing_flags(SamplerSettings()), _drawing_flags(EditSettings())

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a BAGEL folder, a run (runs/NAME), one of its checkpoints, or a model that ships with uno_ds (tiny_base)",
    )
    common.add_argument(
        "--no-ema",
        action="store_true",
        help="of a checkpoint: the trained weights, where the default is their moving average",
    )
    common.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="of a checkpoint: the base that it was trained on, if that was moved",
    )
    common.add_argument(
        "--seed",
        type=int,
        help="seed of the first picture or text; the next ones count up (default 0)",
    )
    common.add_argument(
        "--batch",
        type=int,
        default=4,
        metavar="N",
        help="requests that are worked on together (default 4)",
    )
    common.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)"
    )
    common.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16"),
        help="auto: bf16 on a GPU, fp32 on a CPU",
    )
    common.add_argument(
        "--backend",
        default="auto",
        choices=("auto", *backend_names("attention")),
        help="attention backend (default auto)",
    )

    generate_parser = commands.add_parser(
        "generate", parents=[common, drawing], help="text to image", description=defaults_note
    )
    generate_parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to draw; may be repeated"
    )
    generate_parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a text file with a prompt on each line"
    )
    generate_parser.add_argument(
        "--height", type=int, help="pixels (default: as large as the model's square)"
    )
    generate_parser.add_argument(
        "--width", type=int, help="pixels (default: as large as the model's square)"
    )

    edit_parser = commands.add_parser(
        "edit",
        parents=[common, editing],
        help="image and instruction to image",
        description=defaults_note,
    )
    edit_parser.add_argument("--image", type=Path, metavar="FILE", help="source image")
    edit_parser.add_argument("--instruction", metavar="TEXT", help="what to change")
    edit_parser.add_argument(
        "--edits",
        type=Path,
        metavar="FILE",
        help='json lines: {"image": FILE, "instruction": TEXT}',
    )
    edit_parser.add_argument(
        "--image-guidance",
        type=float,
        metavar="S",
        help=f"guidance scale of the source image (default {EditSettings().image_guidance:g})",
    )
    edit_parser.add_argument(
        "--height", type=int, help="pixels of the result, with --width (default: the source's size)"
    )
    edit_parser.add_argument("--width", type=int, help="pixels of the result, with --height")

    caption_parser = commands.add_parser("caption", parents=[common], help="image to text")
    caption_parser.add_argument(
        "--image", type=Path, nargs="+", required=True, metavar="FILE", help="images to describe"
    )
    caption_parser.add_argument(
        "--question", metavar="TEXT", help="what to ask about each image (default: nothing)"
    )
    caption_parser.add_argument(
        "--view", choices=("vit", "latents", "both"), help="how the image is seen (default vit)"
    )
    caption_parser.add_argument(
        "--from-noised",
        type=float,
        metavar="T",
        help="read the latents noised to level T (0 clean, 1 noise) and nothing else, as UNO's caption loss does",
    )
    caption_parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="with --from-noised: the prompt that the noised latents, not the caption, read",
    )
    caption_parser.add_argument(
        "--max-tokens",
        type=int,
        default=CaptionSettings.max_tokens,
        help="longest text (default 256)",
    )
    caption_parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0: greedy (default); above: tokens are drawn",
    )
    caption_parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw among the likeliest tokens of this joint probability (default 1)",
    )
    caption_parser.add_argument("--json", action="store_true", help="a JSON object a line")
    caption_parser.set_defaults(count=1)
    return parser
