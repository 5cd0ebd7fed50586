"""Settings classes: typed, checked, documented, and built from plain YAML values.

A settings class is a frozen dataclass that sits beside the code it configures. Its fields are made by `setting`, which
holds the one description from which the README's table is generated. A mistake of the user raises `SettingsError`,
whose text is one line that names the key, what was given and what is allowed.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

# Words that YAML 1.1 reads as booleans, beside true and false.
SWITCHES = {"on": True, "yes": True, "off": False, "no": False}


class SettingsError(ValueError):
    """A user's mistake in a recipe, a flag or a file. `key` is the dotted path of the culprit."""

    def __init__(self, key: str, message: str):
        text = f"{key}: {message}" if key else message
        # One line, whatever the user or a library wrote.
        super().__init__(" ".join(text.split()))
        self.key, self.message = key, message

    def under(self, prefix: str) -> "SettingsError":
        return type(self)(".".join(part for part in (prefix, self.key) if part), self.message)


def setting(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    factory: Any = dataclasses.MISSING,
    choices: tuple | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """A documented field. `minimum` and `maximum` are inclusive, `above` is exclusive; they hold for list items too."""
    metadata = dict(doc=doc, choices=choices, minimum=minimum, maximum=maximum, above=above)
    return dataclasses.field(
        default=default, default_factory=factory, metadata=metadata, kw_only=True
    )


def build(cls: type, values: Any, path: str = "") -> Any:
    """Builds settings class `cls` from a mapping. Raises SettingsError for unknown, missing and ill-typed keys."""
    if not isinstance(values, Mapping):
        raise SettingsError(path, f"must be a mapping of keys to values, got {_show(values)}.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"allowed are {', '.join(fields)}."
            raise SettingsError(_join(path, str(key) or "''"), f"unknown key; {hint}")
    hints, arguments = typing.get_type_hints(cls), {}
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
    return [to_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_yaml(text: str) -> Any:
    """The plain values in YAML text. Raises ValueError and nothing else."""
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML lets its constructors' errors through: ValueError for 2001-99-99, KeyError for !!bool x
        raise ValueError(str(error) or type(error).__name__) from None


def override(tree: dict, assignment: str) -> None:
    """Applies one `a.b=value` in place; the value is read as YAML, and a list item is named by its
    index (`a.0.b=1`). on, off, yes and no stay words, which a key that holds a boolean
    understands."""
    key, equals, text = assignment.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise SettingsError("--set", f"expects key.path=value, got '{assignment}'.")
    try:
        value = read_yaml(text)
    except ValueError as error:
        raise SettingsError(key, f"value is not valid YAML: {error}") from None
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
                key, f"'{part}' holds the single value {_show(node)} and has no keys below it."
            )
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def describe(cls: type, path: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields (key, type and bounds, default, description) of every setting, in the order of declaration.

    Keys of a nested class follow; the class itself is listed where it may be left out (null) or repeated (a list).
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        kind, where, note = (
            hints[field.name],
            _join(path, field.name),
            field.metadata.get("doc", ""),
        )
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
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )
    return yaml.safe_dump(
        to_plain(value), default_flow_style=True, sort_keys=False, width=1000
    ).split("\n")[0]


def _allowed(kind: Any, rules: Mapping) -> str:
    if rules.get("choices"):
        return " | ".join(map(str, rules["choices"]))
    low, high, above = (rules.get(bound) for bound in ("minimum", "maximum", "above"))
    if low is not None and high is not None:
        return f"{_type_name(kind)}, {low} to {high}"
    bounds = [
        f"{words} {limit}"
        for words, limit in (("at least", low), ("above", above), ("at most", high))
        if limit is not None
    ]
    return ", ".join([_type_name(kind), *bounds])


def _settings_class(kind: Any) -> type | None:
    if dataclasses.is_dataclass(kind):
        return kind
    return next((inner for inner in map(_settings_class, typing.get_args(kind)) if inner), None)


def _type_name(kind: Any) -> str:
    if kind is types.NoneType:
        return "null"
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " | ".join(_type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is not None:
        return f"{'mapping of names to' if typing.get_origin(kind) is dict else 'list of'} {_type_name(typing.get_args(kind)[-1])}"
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
    if dataclasses.is_dataclass(kind):
        return (
            value if isinstance(value, kind) else build(kind, {} if value is None else value, where)
        )
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
        # YAML reads 1e-4 as a string: its floats want a dot.
        try:
            number = (
                float(value)
                if isinstance(value, (int, float, str)) and not isinstance(value, bool)
                else math.nan
            )
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise SettingsError(where, f"must be a finite number, got {_show(value)}.")
    if kind is Any or type(value) is kind:
        return value
    if kind is bool and isinstance(value, str) and value.lower() in SWITCHES:
        return SWITCHES[value.lower()]
    hint = "; put it into quotes to have it as text" if kind is str and value is not None else ""
    raise SettingsError(where, f"must be of type {_type_name(kind)}, got {_show(value)}{hint}.")


def _check_range(rules: Mapping, value: Any, where: str) -> None:
    for item in value if isinstance(value, list) else [value]:
        if item is None or dataclasses.is_dataclass(item):
            continue
        if rules.get("choices") and item not in rules["choices"]:
            raise SettingsError(
                where, f"must be one of {', '.join(map(str, rules['choices']))}; got {_show(item)}."
            )
        if isinstance(item, str):
            continue
        for bound, words, broken in (
            ("minimum", "at least", lambda x, b: x < b),
            ("maximum", "at most", lambda x, b: x > b),
            ("above", "greater than", lambda x, b: x <= b),
        ):
            limit = rules.get(bound)
            if limit is not None and broken(item, limit):
                raise SettingsError(where, f"must be {words} {limit}, got {_show(item)}.")


def _list_index(items: list, part: str, key: str) -> int:
    if not (part.isascii() and part.isdigit()) or int(part) >= len(items):
        raise SettingsError(key, f"'{part}' is not an index of a list of {len(items)}.")
    return int(part)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."
