"""Results of the sampling command: PNG files with their settings, and lines of text."""

import argparse
import json
import re
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from uno_ds import __version__
from uno_ds.files_on_disk import replacing
from uno_ds.settings import SettingsError, printable

METADATA = "uno_ds"
# Controls beyond those that JSON escapes, line separators, direction marks and lone surrogates.
UNSAFE = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_PATH = 4096


def free_paths(options: argparse.Namespace, count: int) -> list[Path]:
    """OUT/0000.png and so on. Raises SettingsError if one exists, unless --overwrite is given."""
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


def write_picture(
    path: Path, picture: Image.Image, facts: dict, options: argparse.Namespace
) -> None:
    """Writes the PNG file; its metadata holds all settings that made it."""
    information = PngInfo()
    facts = {key: value for key, value in facts.items() if value is not None}
    facts |= {"checkpoint": options.checkpoint, "version": __version__}
    # Flags of the model that change what it draws.
    changes = {name: getattr(options, name) for name in ("adapter", "quantise", "no_ema")}
    facts |= {name: given for name, given in changes.items() if given}
    information.add_itxt(METADATA, json_line(facts))
    with replacing(path) as partial:
        picture.save(partial, format="PNG", pnginfo=information)
    text = facts.get("prompt") or facts.get("instruction") or ""
    print(f"{printable(path, LONGEST_PATH)}: {escaped(text)}", flush=True)


def escaped(text: str) -> str:
    """The whole text, with control characters and what a terminal cannot show escaped."""
    return printable(text, max(60, 10 * len(text)))


def json_line(facts: dict) -> str:
    """JSON with readable text; control characters and lone surrogates are escaped."""
    text = json.dumps(facts, ensure_ascii=False)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
