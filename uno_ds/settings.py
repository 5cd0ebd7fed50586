"""Settings classes: typed, checked, documented, and built from plain YAML values.

A settings class is a frozen dataclass that sits beside the code it configures. Its fields are made by `setting`, which
holds the one description from which the README's table is generated. A mistake of the user raises `SettingsError`,
whose text is one line that names the key, what was given and what is allowed.
"""
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import yaml


class SettingsError(ValueError):
    """A user's mistake in a recipe, a flag or a file. `key` is the dotted path of the culprit."""

    def __init__(self, key: str, message: str):
        super().__init__(f"{key}: {message}" if key else message)
        self.key, self.message = key, message

    def under(self, prefix: str) -> "SettingsError":
        return SettingsError(".".join(part for part in (prefix, self.key) if part), self.message)


def setting(default: Any = dataclasses.MISSING, *, doc: str, factory: Any = dataclasses.MISSING, choices: tuple | None = None,
            minimum: float | None = None, maximum: float | None = None, above: float | None = None) -> Any:
    """A documented field. `minimum` and `maximum` are inclusive, `above` is exclusive; they hold for list items too."""
    metadata = dict(doc=doc, choices=choices, minimum=minimum, maximum=maximum, above=above)
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata, kw_only=True)


def build(cls: type, values: Any, path: str = "") -> Any:
    """Builds settings class `cls` from a mapping. Raises SettingsError for unknown, missing and ill-typed keys."""
    if not isinstance(values, Mapping):
        raise SettingsError(path, f"must be a mapping of keys to values, got {_show(values)}.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"allowed are {', '.join(fields)}."
            raise SettingsError(_join(path, str(key)), f"unknown key; {hint}")
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
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def override(tree: dict, assignment: str) -> None:
    """Applies one `a.b=value` in place; the value is read as YAML, and a list item is named by its index (`a.0.b=1`)."""
    key, equals, text = assignment.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise SettingsError("--set", f"expects key.path=value, got '{assignment}'.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(key, f"value is not valid YAML: {' '.join(str(error).split())}") from None
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list):
            node = node[_list_index(node, part, key)]
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, (dict, list)):
            raise SettingsError(key, f"'{part}' holds the single value {_show(node)} and has no keys below it.")
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def describe(cls: type, path: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields (key, type, default, description) of every setting, nested classes included, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        kind, where, note = hints[field.name], _join(path, field.name), field.metadata.get("doc", "")
        inner = _settings_class(kind)
        if inner is not None:
            listed = typing.get_origin(kind) is list
            if listed:
                yield where, "list", _show(to_plain(_default(field))), note
            yield from describe(inner, where + "[]" if listed else where)
            continue
        allowed = field.metadata.get("choices")
        yield where, " \\| ".join(map(str, allowed)) if allowed else _type_name(kind), _show(to_plain(_default(field))), note


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"


def _settings_class(kind: Any) -> type | None:
    if dataclasses.is_dataclass(kind):
        return kind
    return next((inner for inner in map(_settings_class, typing.get_args(kind)) if inner), None)


def _type_name(kind: Any) -> str:
    if kind is types.NoneType:
        return "null"
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " \\| ".join(_type_name(part) for part in typing.get_args(kind))
    origin = typing.get_origin(kind)
    if origin is not None:
        return f"{origin.__name__} of {', '.join(_type_name(part) for part in typing.get_args(kind))}"
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
        return value if isinstance(value, kind) else build(kind, {} if value is None else value, where)
    origin = typing.get_origin(kind)
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise SettingsError(where, f"must be a list, got {_show(value)}.")
        return [_convert(typing.get_args(kind)[0], item, f"{where}.{index}") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise SettingsError(where, f"must be a mapping, got {_show(value)}.")
        return {str(key): _convert(typing.get_args(kind)[1], item, _join(where, str(key))) for key, item in value.items()}
    if kind is float and not isinstance(value, bool):
        # YAML reads 1e-4 as a string: its floats want a dot.
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = None
        if number is not None and number == number and abs(number) != float("inf"):
            return number
        raise SettingsError(where, f"must be a finite number, got {_show(value)}.")
    if kind is Any or type(value) is kind:
        return value
    raise SettingsError(where, f"must be of type {_type_name(kind)}, got {_show(value)}.")


def _check_range(rules: Mapping, value: Any, where: str) -> None:
    for item in value if isinstance(value, list) else [value]:
        if item is None or dataclasses.is_dataclass(item):
            continue
        if rules.get("choices") and item not in rules["choices"]:
            raise SettingsError(where, f"must be one of {', '.join(map(str, rules['choices']))}; got {_show(item)}.")
        if isinstance(item, str):
            continue
        for bound, words, broken in (("minimum", "at least", lambda x, b: x < b), ("maximum", "at most", lambda x, b: x > b),
                                     ("above", "greater than", lambda x, b: x <= b)):
            limit = rules.get(bound)
            if limit is not None and broken(item, limit):
                raise SettingsError(where, f"must be {words} {limit}, got {_show(item)}.")


def _list_index(items: list, part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise SettingsError(key, f"'{part}' is not an index of a list of {len(items)}.")
    return int(part)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
