"""Requests of the sampling command: prompts, edits and images, from flags and files."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from uno_ds.data.images import BadRow, ImageSettings, decode
from uno_ds.files_on_disk import read_regular
from uno_ds.settings import SettingsError, build

LARGEST_FILE = 1_000_000_000


def prompts_of(options: argparse.Namespace) -> list[str]:
    """Prompts of --prompt and of the lines of --prompts. Raises SettingsError if there is none."""
    prompts = list(options.prompt or [])
    if options.prompts is not None:
        lines = lines_of(options.prompts, "--prompts")
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SettingsError(
            "--prompt",
            "nothing to draw: give --prompt TEXT or --prompts FILE with a prompt on each line.",
        )
    return prompts


def edits_of(options: argparse.Namespace) -> list[tuple[Path, str]]:
    """(source image, instruction) of every edit. Raises SettingsError if there is none."""
    if (options.image is None) != (options.instruction is None):
        raise SettingsError(
            "--instruction" if options.image else "--image",
            "is missing: an edit needs --image and --instruction, or --edits FILE.",
        )
    requests = [(options.image, options.instruction)] if options.image else []
    lines = lines_of(options.edits, "--edits") if options.edits else []
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
        # A relative path is relative to the file that names it.
        requests.append((options.edits.parent / image, instruction))
    if not requests:
        raise SettingsError(
            "--image", "nothing to edit: give --image FILE and --instruction TEXT, or --edits FILE."
        )
    return requests


def lines_of(path: Path, flag: str) -> list[str]:
    """Lines of a UTF-8 file with or without a byte-order mark. Only newlines separate them: a text
    may hold other separators."""
    try:
        return read_regular(path, LARGEST_FILE).decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise SettingsError(flag, f"{path} cannot be read: {error}") from None


def read_picture(path: Path) -> Image.Image:
    """The image of --image. Raises SettingsError."""
    try:
        return decode(read_regular(path, LARGEST_FILE), build(ImageSettings, {}))
    except OSError as error:
        raise SettingsError("--image", f"{path} cannot be read: {error.strerror}.") from None
    except BadRow as error:
        raise SettingsError("--image", f"{path} is not a usable image: {error}.") from None


def batches_of_one_size(sizes: list[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive entries of one size, at most `most` of them."""
    start = 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or stop - start == most or sizes[stop] != sizes[start]:
            yield start, stop
            start = stop
