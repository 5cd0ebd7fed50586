"""Settings classes: typed, checked, documented, and built from plain YAML values.

A settings class is a frozen dataclass in the module of the code that it configures. Its fields are
made by `setting`, which holds the one description from which docs/settings.md is generated. A
mistake of the user raises `SettingsError`, whose text is one line that names the key, what was
given and what is allowed."""

import dataclasses
import difflib
import json
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import yaml

from uno_ds.yaml_text import read_yaml

LONGEST_MESSAGE = 1000
DEEPEST_KEY = 20
# Words that YAML 1.1 reads as booleans, in addition to true and false.
SWITCHES = {"on": True, "yes": True, "off": False, "no": False}
# Lone surrogates have no UTF-8 form, so neither a file name nor a tokenizer accepts them.
_UNUSABLE_CHARACTER = re.compile("[\0\ud800-\udfff]")


class SettingsError(ValueError):
    """A user's mistake in a recipe, a flag or a file. `key`: the dotted path of the setting, the
    flag or the file."""

    def __init__(self, key: str, message: str):
        text = printable(f"{printable(key)}: {message}" if key else message, LONGEST_MESSAGE)
        super().__init__(" ".join(text.split()))
        self.key, self.message = key, message

    def under(self, prefix: str) -> "SettingsError":
        return type(self)(".".join(part for part in (prefix, self.key) if part), self.message)


def printable(text: object, limit: int = 200) -> str:
    """`text` as one line of at most `limit` characters (at least 60): control characters and others
    that are not printable are escaped, and a long text is shortened in the middle, with the number
    of characters left out. A string, a path or an exception is shown as its text, anything else as
    its repr. The time does not grow with the size of a string or a container."""
    if isinstance(text, (BaseException, PurePath)):
        text = str(text)
    if not isinstance(text, str):
        return _start(_literal(text), limit)
    if len(text) <= limit:
        whole = "".join(map(_escaped, text))
        if len(whole) <= limit:
            return whole
    room = limit - len(f" [...{len(text):,} characters...] ")
    end = _fitting(reversed(text[-limit:]), room // 2)[::-1]
    start = _fitting(text[: min(limit, len(text) - len(end))], room - room // 2)
    left_out = len(text) - len(start) - len(end)
    return f"{''.join(start)} [...{left_out:,} characters...] {''.join(end)}"


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    if character.isspace():
        return " "
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _fitting(characters: Iterable[str], room: int) -> list[str]:
    """As many of the first characters, escaped, as fit."""
    shown: list[str] = []
    used = 0
    for character in characters:
        used += len(_escaped(character))
        if used > room:
            break
        shown.append(_escaped(character))
    return shown


def _start(pieces: Iterable[str], limit: int) -> str:
    text = ""
    for piece in pieces:
        text += "".join(map(_escaped, piece[: limit + 1]))
        if len(text) > limit:
            return text[: limit - 3] + "..."
    return text


def _literal(value: object) -> Iterator[str]:
    """repr(value) in pieces, lazily."""
    if isinstance(value, Mapping):
        yield "{"
        for number, (key, item) in enumerate(value.items()):
            yield ", " if number else ""
            yield from _literal(key)
            yield ": "
            yield from _literal(item)
        yield "}"
    elif isinstance(value, (list, tuple, set)):
        yield "[" if isinstance(value, list) else "("
        for number, item in enumerate(value):
            yield ", " if number else ""
            yield from _literal(item)
        yield "]" if isinstance(value, list) else ")"
    elif isinstance(value, (str, bytes)):
        yield repr(value[:1000])
    elif isinstance(value, int) and value.bit_length() > 3000:
        yield f"a number of {value.bit_length():,} bits"
    else:
        yield repr(value)


def setting(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    factory: Any = dataclasses.MISSING,
    choices: tuple | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    or_zero: bool = False,
) -> Any:
    """A documented field. `minimum` and `maximum` are inclusive, `above` and `below` exclusive;
    `or_zero` also allows 0, which turns something off. The bounds of a list or a mapping hold for
    its items."""
    metadata = dict(
        doc=doc,
        choices=choices,
        minimum=minimum,
        maximum=maximum,
        above=above,
        below=below,
        or_zero=or_zero,
    )
    return dataclasses.field(
        default=default, default_factory=factory, metadata=metadata, kw_only=True
    )


def build(cls: type, values: Any, path: str = "") -> Any:
    """Builds settings class `cls` from a mapping. Raises SettingsError for unknown, missing and
    ill-typed keys."""
    if not isinstance(values, Mapping):
        raise SettingsError(path, f"must be a mapping of keys to values, got {_show(values)}.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            name = key if isinstance(key, str) else printable(key)
            near = difflib.get_close_matches(name[:100], fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"allowed are {', '.join(fields)}."
            raise SettingsError(_join(path, name or "''"), f"unknown key; {hint}")
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        where = _join(path, name)
        if name in values:
            arguments[name] = _convert(hints[name], values[name], where)
            _check_range(field.metadata, arguments[name], where)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SettingsError(where, "is required and was not given.")
    try:
        return cls(**arguments)
    except SettingsError as error:
        raise error.under(path) from None


def to_plain(value: Any) -> Any:
    """Settings as dictionaries, lists and scalars, ready for YAML or JSON."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def override(tree: dict, assignment: str) -> None:
    """Applies one `a.b=value` in place; the value is read as YAML, and a list item is addressed by
    its index (`a.0.b=1`). on, off, yes and no are kept as strings, which boolean keys accept."""
    key, equals, text = assignment.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise SettingsError("--set", f"expects key.path=value, got '{printable(assignment)}'.")
    if key.count(".") > DEEPEST_KEY:
        raise SettingsError("--set", f"'{printable(key)}' has more than {DEEPEST_KEY} dots.")
    try:
        value = read_yaml(text)
    except ValueError as error:
        raise SettingsError(key, f"value is not valid YAML: {printable(error, 400)}.") from None
    if text.strip().lower() in SWITCHES:
        value = text.strip()
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list):
            node = node[_list_index(node, part, key)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise SettingsError(
                key,
                f"'{printable(part)}' holds the single value {_show(node)} and has no keys below "
                "it.",
            )
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def describe(cls: type, path: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields (key, type and bounds, default, description) of every setting, in the order of
    declaration.

    Keys of a nested class follow; the class itself is listed where it may be left out (null) or
    repeated (a list)."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        kind, where = hints[field.name], _join(path, field.name)
        note = field.metadata.get("doc", "")
        inner = _settings_class(kind)
        listed = inner is not None and typing.get_origin(kind) is list
        if inner is None:
            yield where, _allowed(kind, field.metadata), _default(field), note
        elif listed or field.default is None:
            yield where, "list" if listed else "mapping | null", _default(field), note
        if inner is not None:
            yield from describe(inner, where + "[]" if listed else where)


def _default(field: dataclasses.Field) -> str:
    """As YAML in one line."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    text = yaml.safe_dump(to_plain(value), default_flow_style=True, sort_keys=False, width=1000)
    return text.split("\n")[0]


def _allowed(kind: Any, rules: Mapping) -> str:
    if rules.get("choices"):
        return " | ".join(map(str, rules["choices"]))
    low, high = rules.get("minimum"), rules.get("maximum")
    zero = "0 or " if rules.get("or_zero") else ""
    if low is not None and high is not None:
        return f"{_type_name(kind)}, {zero}{_plain_number(low)} to {_plain_number(high)}"
    words = {
        "minimum": f"{zero}at least",
        "above": "above",
        "maximum": "at most",
        "below": "below",
    }
    given = [bound for bound in words if rules.get(bound) is not None]
    bounds = [f"{words[bound]} {_plain_number(rules[bound])}" for bound in given]
    return ", ".join([_type_name(kind), *bounds])


def _plain_number(number: float) -> str:
    """With grouped thousands."""
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def _settings_class(kind: Any) -> type | None:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind
    return next((inner for inner in map(_settings_class, typing.get_args(kind)) if inner), None)


def _type_name(kind: Any) -> str:
    if kind is types.NoneType:
        return "null"
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " | ".join(_type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is not None:
        container = "mapping of names to" if typing.get_origin(kind) is dict else "list of"
        return f"{container} {_type_name(typing.get_args(kind)[-1])}"
    return getattr(kind, "__name__", str(kind))


def _convert(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        options = [part for part in typing.get_args(kind) if part is not types.NoneType]
        if value is None and len(options) < len(typing.get_args(kind)):
            return None
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except SettingsError:
                pass
        return _convert(options[-1], value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        return build(kind, {} if value is None else value, where)
    origin = typing.get_origin(kind)
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise SettingsError(where, f"must be a list, got {_show(value)}.")
        return [
            _convert(typing.get_args(kind)[0], item, f"{where}.{index}")
            for index, item in enumerate(value)
        ]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise SettingsError(where, f"must be a mapping, got {_show(value)}.")
        return {
            str(key): _convert(typing.get_args(kind)[1], item, _join(where, str(key)))
            for key, item in value.items()
        }
    if kind is float:
        return _finite_number(value, where)
    if kind is str and isinstance(value, str) and _UNUSABLE_CHARACTER.search(value):
        raise SettingsError(
            where, f"must not hold a NUL character or half of a character, got {_show(value)}."
        )
    if kind is Any or type(value) is kind:
        return value
    if kind is bool and isinstance(value, str) and value.lower() in SWITCHES:
        return SWITCHES[value.lower()]
    hint = "; put it into quotes to have it as text" if kind is str and value is not None else ""
    raise SettingsError(where, f"must be of type {_type_name(kind)}, got {_show(value)}{hint}.")


def _finite_number(value: Any, where: str) -> float:
    """A float. Numbers in strings count: YAML reads 1e-4, which lacks a dot, as a string."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise SettingsError(where, f"must be a finite number, got {_show(value)}.")


_BOUNDS = (
    ("minimum", "at least", operator.lt),
    ("maximum", "at most", operator.gt),
    ("above", "greater than", operator.le),
    ("below", "below", operator.ge),
)


def _check_range(rules: Mapping, value: Any, where: str) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _check_range(rules, item, _join(where, name))
        return
    zero = "0 or " if rules.get("or_zero") else ""
    for item in value if isinstance(value, list) else [value]:
        if item is None or dataclasses.is_dataclass(item):
            continue
        if rules.get("choices") and item not in rules["choices"]:
            raise SettingsError(
                where, f"must be one of {', '.join(map(str, rules['choices']))}; got {_show(item)}."
            )
        if isinstance(item, str) or zero and item == 0:
            continue
        for bound, words, broken in _BOUNDS:
            limit = rules.get(bound)
            if limit is not None and broken(item, limit):
                raise SettingsError(where, f"must be {zero}{words} {limit}, got {_show(item)}.")
        if type(item) is int and not -(2**63) <= item < 2**63:
            raise SettingsError(where, f"must be an integer of 64 bits, got {_show(item)}.")


def _list_index(items: list, part: str, key: str) -> int:
    # int() of a very long string of digits is slow, or raises.
    is_number = part.isascii() and part.isdigit() and len(part) < 10
    if not is_number or int(part) >= len(items):
        raise SettingsError(key, f"'{printable(part)}' is not an index of a list of {len(items)}.")
    return int(part)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return f"'{printable(value, 78)}'" if isinstance(value, str) else printable(value, 80)
