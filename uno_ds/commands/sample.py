"""The command line of sampling: text to image, image and instruction to image, image to text."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from itertools import chain
from typing import TypeVar

import torch
from tqdm import tqdm

from uno_ds.commands.runner import one_line_errors
from uno_ds.commands.sample_chat import answer_requests, chat_settings, requests_of, talk
from uno_ds.commands.sample_flags import sample_parser
from uno_ds.commands.sample_output import (
    LONGEST_PATH,
    escaped,
    free_paths,
    json_line,
    write_picture,
)
from uno_ds.commands.sample_requests import (
    batches_of_one_size,
    edits_of,
    prompts_of,
    read_picture,
)
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
from uno_ds.generation.sampler import EditSettings, SamplerSettings
from uno_ds.kernels.selection import KernelSettings
from uno_ds.model.adapter_files import AdapterFolder
from uno_ds.model.adapter_merging import added_tensors, read_share
from uno_ds.model.architecture import demands_of, packaged, read_architecture
from uno_ds.model.precision import DTYPES
from uno_ds.model.weights import check_base_folder, read_added
from uno_ds.settings import SettingsError, build, printable, read_yaml, to_plain
from uno_ds.training.checkpoint_file import is_checkpoint
from uno_ds.training.export import TrainedModel

MOST_PICTURES = 100_000
Request = TypeVar("Request")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = sample_parser().parse_args(arguments)
    for flag, given in (("--batch", options.batch), ("--count", options.count)):
        if not 1 <= given <= MOST_PICTURES:
            raise SettingsError(flag, f"must be at least 1 and at most {MOST_PICTURES:,}.")
    commands = {"generate": _generate, "edit": _edit, "caption": _caption, "chat": _chat}
    try:
        commands[options.command](options)
    except SettingsError as error:
        raise SettingsError(_flag(error.key, options), error.message) from None
    return 0


def _flag(key: str, options: argparse.Namespace) -> str:
    """The flag of a setting, or its key if it has none."""
    if key.startswith(("model.base", "tokenizer")):
        return "--checkpoint"
    given = [name for name in reversed(key.split(".")) if name in vars(options)]
    return f"--{given[0].replace('_', '-')}" if given else key


def _generate(options: argparse.Namespace) -> None:
    prompts = _repeated(prompts_of(options), options.count)
    values = _sampler_values(options, _recipe_settings(options, "samples"))
    sides = {"height": options.height, "width": options.width}
    given_sides = {key: side for key, side in sides.items() if side is not None}
    # Refuses wrong values before the model is opened.
    build(SampleSettings, values | given_sides)
    paths = free_paths(options, len(prompts))
    opened = open_from_flags(options)
    geometry = opened.model.shape.geometry
    largest = geometry.latent_stride * geometry.latent_side
    largest_sides = {"height": largest, "width": largest}
    settings = build(SampleSettings, values | largest_sides | given_sides)
    for start in range(0, len(prompts), options.batch):
        batch_prompts = prompts[start : start + options.batch]
        seed = settings.seed + start
        batch = dataclasses.replace(settings, prompts=batch_prompts, seed=seed)
        label = _label(start, len(batch_prompts), len(prompts))
        pictures = generate(opened.model, opened.codec, opened.tokenizer, batch, label)
        for number, (picture, prompt) in enumerate(zip(pictures, batch_prompts, strict=True)):
            facts = _plain(batch)
            facts |= {"task": "generate", "prompt": prompt, "seed": seed + number}
            write_picture(paths[start + number], picture, facts, options)


def _edit(options: argparse.Namespace) -> None:
    requests = _repeated(edits_of(options), options.count)
    images = [read_picture(path) for path, _ in requests]
    known = _recipe_settings(options, "samples.edit").edit
    settings = build(EditSettings, _sampler_values(options, known))
    if (options.height is None) != (options.width is None):
        raise SettingsError("--height", "goes with --width: give both or none.")
    paths = free_paths(options, len(requests))
    opened = open_from_flags(options)
    sizes = [
        (options.height, options.width)
        if options.height
        else codec_size(opened.model.shape.geometry, image)
        for image in images
    ]
    for start, stop in batches_of_one_size(sizes, options.batch):
        batch = dataclasses.replace(settings, seed=settings.seed + start)
        instructions = [instruction for _, instruction in requests[start:stop]]
        pictures = edit(
            opened.model,
            opened.codec,
            opened.tokenizer,
            images[start:stop],
            instructions,
            batch,
            sizes[start],
            _label(start, stop - start, len(requests)),
        )
        for number, picture in enumerate(pictures, start=start):
            source, instruction = requests[number]
            height, width = sizes[number]
            facts = _plain(batch) | {
                "task": "edit",
                "source": str(source),
                "instruction": instruction,
                "seed": settings.seed + number,
                "height": height,
                "width": width,
            }
            write_picture(paths[number], picture, facts, options)


def _caption(options: argparse.Namespace) -> None:
    images = [read_picture(path) for path in options.image]
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
            "goes with --from-noised: the generation expert reads it before the noised latents.",
        )
    if options.from_noised is not None and (
        options.question is not None or options.view is not None
    ):
        raise SettingsError(
            "--question" if options.question is not None else "--view",
            "does not go with --from-noised: UNO's captions are read from the noised latents "
            "alone.",
        )
    opened = open_from_flags(options)
    starts = range(0, len(images), options.batch)
    for start in tqdm(starts, desc="captions", leave=False, disable=None):
        batch = images[start : start + options.batch]
        seeded = dataclasses.replace(settings, seed=settings.seed + start)
        common = opened.model, opened.codec, opened.tokenizer, batch, seeded
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
            line = f"{printable(options.image[number], LONGEST_PATH)}: {escaped(text)}"
            print(json_line(facts) if options.json else line, flush=True)


def _chat(options: argparse.Namespace) -> None:
    requests = requests_of(options.file, options.think) if options.file is not None else []
    known = _recipe_settings(options, "samples")
    drawing = build(SamplerSettings, _sampler_values(options, known))
    editing = build(EditSettings, _sampler_values(options, known.edit))
    settings = chat_settings(options, drawing, editing)
    paths = free_paths(options, len(requests))
    opened = open_from_flags(options)
    if requests:
        answer_requests(opened, requests, settings, options, paths)
    else:
        talk(opened, settings, options, iter(sys.stdin))


def open_from_flags(
    options: argparse.Namespace, added: dict[str, torch.Tensor] | None = None
) -> OpenModel:
    """The model that the flags of `model_flags` name. `added` gets the tensors that UNO added to
    it, by name. Raises SettingsError."""
    device = device_of(options.device)
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    path = packaged(options.checkpoint)
    adapters = [read_share(text) for text in options.adapter or ()]
    trained = None
    if is_checkpoint(path):
        if adapters:
            raise SettingsError(
                "--adapter",
                f"belongs to the base that it was trained on, and {path} is the checkpoint of a "
                "run, whose own adapters are merged in; name a base folder as --checkpoint.",
            )
        trained = TrainedModel(path, average=False if options.no_ema else None, base=options.base)
    else:
        check_base_folder(path)
    shape = trained.shape if trained is not None else read_architecture(path)
    demands = demands_of(shape, precision, on_cpu=device.type == "cpu")
    kernels = build(KernelSettings, {"attention": options.backend}).resolved(demands)
    kernels.check(demands)
    how = (device, DTYPES[precision], kernels.attention)
    if trained is not None:
        opened = assemble(
            trained.shape,
            trained.read,
            trained.base,
            trained.tokenizer,
            *how,
            quantise=options.quantise,
        )
        extra = trained.read_added() if added is not None else {}
    else:
        opened = open_model(path, *how, adapters, options.quantise)
        extra = read_added(path) if added is not None else {}
        if adapters and added is not None:
            extra |= added_tensors(AdapterFolder(adapters[0][0], opened.model.shape, "--adapter"))
    if added is not None:
        added |= extra
    for warning in opened.tokenizer.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    return opened


def device_of(name: str) -> torch.device:
    """The device of --device. Raises SettingsError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            "--device", f"'{name}' cannot be used: {str(error).splitlines()[0]}"
        ) from None
    return device


def _repeated(requests: list[Request], count: int) -> list[Request]:
    """Each request `count` times in a row."""
    return list(chain.from_iterable([request] * count for request in requests))


def _plain(settings: SamplerSettings) -> dict:
    """The settings that decide the picture, without the requests and the settings of the other
    task."""
    plain = to_plain(settings)
    return {key: value for key, value in plain.items() if key not in ("prompts", "edit")}


def _label(start: int, count: int, total: int) -> str:
    if count == 1:
        return f"picture {start + 1} of {total}"
    return f"picture {start + 1} to {start + count} of {total}"


def _sampler_values(options: argparse.Namespace, known: SamplerSettings) -> dict:
    """The sampler's settings for a task: those of flags, else those that are known already."""
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


def _recipe_settings(options: argparse.Namespace, section: str) -> SampleSettings:
    """`samples` in the recipe of a checkpoint's run; the defaults for any other model. `section`:
    the part that the caller uses, for the message."""
    checkpoint = packaged(options.checkpoint)
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
