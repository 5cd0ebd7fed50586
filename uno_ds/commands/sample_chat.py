"""Conversations of the sampling command: requests from a file, or lines at a prompt."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uno_ds.commands.sample_output import LONGEST_PATH, escaped, json_line, write_picture
from uno_ds.commands.sample_requests import lines_of, read_picture
from uno_ds.generation.chat import Chat
from uno_ds.generation.inference import CaptionSettings
from uno_ds.generation.inference_model import OpenModel
from uno_ds.generation.sampler import EditSettings, SamplerSettings
from uno_ds.settings import SettingsError, build, printable

OUTPUTS = ("image", "text")
HELP = (
    "a line is a text that is answered; /image FILE shows an image, /draw TEXT draws, /think TEXT "
    "reasons and draws, /new starts again, /quit ends"
)


@dataclass(frozen=True)
class ChatSettings:
    """`drawing`: for a picture without images before it; `editing`: with."""

    drawing: SamplerSettings
    editing: EditSettings
    text: CaptionSettings
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Request:
    """`parts`: texts, and files of images. `think`: a text is written before the picture."""

    parts: list[str | Path]
    output: str = "image"
    think: bool = False


def requests_of(path: Path, think: bool) -> list[Request]:
    """The requests of a file of json lines. Raises SettingsError."""
    requests = []
    for number, line in enumerate(lines_of(path, "--file"), start=1):
        if not line.strip():
            continue
        try:
            requests.append(_request(json.loads(line), path.parent, think))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise SettingsError(
                "--file",
                f'{path}, line {number}: must be {{"parts": [{{"text": TEXT}} or '
                '{"image": FILE}, ...], "output": "image" or "text", "think": true or false}.',
            ) from None
    if not requests:
        raise SettingsError("--file", f"{path} holds no request.")
    return requests


def chat_settings(
    options: argparse.Namespace, drawing: SamplerSettings, editing: EditSettings
) -> ChatSettings:
    """Raises SettingsError."""
    text = build(
        CaptionSettings,
        {
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": drawing.seed,
        },
    )
    if (options.height is None) != (options.width is None):
        raise SettingsError("--height", "goes with --width: give both or none.")
    size = (options.height, options.width) if options.height is not None else None
    return ChatSettings(drawing, editing, text, size)


def answer_requests(
    opened: OpenModel,
    requests: list[Request],
    settings: ChatSettings,
    options: argparse.Namespace,
    paths: list[Path],
) -> None:
    """One line of JSON for each request; its picture is in `paths[n]`."""
    for number, request in enumerate(requests):
        chat = Chat(opened.model, opened.codec, opened.tokenizer, options.view)
        for part in request.parts:
            if isinstance(part, Path):
                chat.show(read_picture(part))
            else:
                chat.say(part)
        facts: dict[str, Any] = {"request": number}
        if request.output == "text":
            facts["text"] = chat.answer(_numbered(settings.text, number))
        else:
            texts = [part for part in request.parts if isinstance(part, str)]
            facts |= _draw(
                chat, settings, request.think, number, paths[number], " ".join(texts), options
            )
        print(json_line(facts), flush=True)


def talk(
    opened: OpenModel, settings: ChatSettings, options: argparse.Namespace, lines: Iterator[str]
) -> None:
    """Answers line after line, each with all that came before. A mistake in a line is stated, and
    the conversation continues."""
    print(HELP, file=sys.stderr)
    chat = Chat(opened.model, opened.codec, opened.tokenizer, options.view)
    number = 0
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "/quit":
                return
            if word == "/new":
                chat = Chat(opened.model, opened.codec, opened.tokenizer, options.view)
            elif word == "/image":
                chat.show(read_picture(Path(rest.strip()).expanduser()))
            elif word in ("/draw", "/think"):
                if rest.strip():
                    chat.say(rest.strip())
                path = options.out / f"{number:04d}.png"
                if path.exists() and not options.overwrite:
                    raise SettingsError(
                        "--out", f"{path} exists already; give another folder, or --overwrite."
                    )
                thinks = word == "/think"
                facts = _draw(chat, settings, thinks, number, path, rest.strip(), options)
                if "thought" in facts:
                    print(escaped(facts["thought"]), flush=True)
                number += 1
            elif word.startswith("/"):
                raise SettingsError(printable(word), f"is no command: {HELP}.")
            elif line.strip():
                chat.say(line.strip())
                print(escaped(chat.answer(settings.text)), flush=True)
        except SettingsError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


def _draw(
    chat: Chat,
    settings: ChatSettings,
    think: bool,
    number: int,
    path: Path,
    prompt: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    facts: dict[str, Any] = {"task": "chat"}
    if think:
        facts["thought"] = chat.answer(_numbered(settings.text, number))
    sampler = settings.editing if chat.has_images else settings.drawing
    seeded = dataclasses.replace(sampler, seed=sampler.seed + number)
    picture = chat.draw(seeded, settings.size)
    made_of = {"prompt": prompt, "seed": seeded.seed}
    write_picture(path, picture, facts | made_of, options)
    facts["image"] = printable(path, LONGEST_PATH)
    return facts


def _numbered(settings: CaptionSettings, number: int) -> CaptionSettings:
    return dataclasses.replace(settings, seed=settings.seed + number)


def _request(row: Any, folder: Path, think: bool) -> Request:
    """Relative files are relative to the file of requests. Raises what a row of another form
    leads to."""
    parts: list[str | Path] = []
    for part in row["parts"]:
        (key,) = part
        if key not in ("text", "image") or not isinstance(part[key], str):
            raise ValueError
        parts.append(part[key] if key == "text" else folder / part[key])
    output, thinks = row.get("output", "image"), row.get("think", think)
    unknown = set(row) - {"parts", "output", "think"}
    if unknown or output not in OUTPUTS or not isinstance(thinks, bool) or not parts:
        raise ValueError
    return Request(parts, output, thinks)
