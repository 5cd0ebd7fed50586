"""Reads YAML from users in time and memory that are bounded by its length.

PyYAML alone accepts duplicate keys (the last one wins), expands aliases without limit, converts
numbers in quadratic time and nests until the interpreter's stack overflows."""

from typing import Any

import yaml

LONGEST = 1_000_000  # characters; the longest recipe that ships has 3,000
_DEEPEST = 50
_MOST_VALUES = 50_000  # after aliases are expanded
_LONGEST_NUMBER = 400  # the longest float64 in plain digits has 309 before its point
_NUMBERS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}


def read_yaml(text: str) -> Any:
    """The plain values of YAML text; no list or mapping is shared between two places. Raises
    ValueError and nothing else, also for duplicate keys, for a value that contains itself, and for
    text that is too long, too deeply nested or has too many values."""
    if len(text) > LONGEST:
        raise ValueError(
            f"it has {len(text):,} characters, more than the {LONGEST:,} that are read"
        )
    try:
        loader = _Loader(text)
        return _unshared(loader.get_single_data())
    except ValueError:
        raise
    except yaml.MarkedYAMLError as error:
        raise ValueError(_message(error)) from None
    # PyYAML does not wrap its constructors' errors: KeyError for `!!bool x`, AttributeError for an
    # invalid date.
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Checks the limits while it composes nodes, before any value is constructed."""

    def __init__(self, text: str):
        super().__init__(text)
        self._open: list[yaml.NodeEvent] = []
        self._anchored_values: dict[int, int] = {}
        self._values = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            return self._compose_alias(event, parent, index)
        if len(self._open) >= _DEEPEST:
            raise _error(f"nested more than {_DEEPEST} deep", event)
        before = self._values
        self._count(1, event)
        self._open.append(event)
        node = super().compose_node(parent, index)
        self._open.pop()
        if event.anchor is not None:
            self._anchored_values[id(node)] = self._values - before
        is_number = node is not None and node.tag in _NUMBERS
        if node is not None and is_number and len(node.value) > _LONGEST_NUMBER:
            raise _error(f"a number of {len(node.value):,} characters", event)
        return node

    # The stubs of PyYAML give the anchor, a string or None, another type.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                continue
            identity, line = (name.tag, name.value), name.start_mark.line + 1
            if identity in lines:
                earlier = lines[identity]
                raise _error(f"'{name.value:.100}' occurs twice, in line {earlier} and", name)
            lines[identity] = line
        return node

    def _compose_alias(self, event: yaml.AliasEvent, parent: Any, index: Any) -> yaml.Node | None:
        if any(opened.anchor == event.anchor for opened in self._open):
            raise _error(f"'{event.anchor:.100}' contains itself", event)
        node = super().compose_node(parent, index)
        self._count(self._anchored_values[id(node)], event)
        return node

    def _count(self, values: int, event: yaml.Event) -> None:
        self._values += values
        if self._values > _MOST_VALUES:
            raise _error(f"more than {_MOST_VALUES:,} values, with aliases expanded,", event)


def _error(problem: str, place: yaml.Event | yaml.Node) -> ValueError:
    return ValueError(f"{problem}{_line_of(place.start_mark)}")


def _message(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's problem with its line, without the quotation of the text."""
    context = f"{error.context}, " if error.context else ""
    return f"{context}{error.problem}{_line_of(error.problem_mark)}"


def _line_of(mark: Any) -> str:
    """mark: PyYAML's position in the text, None where it is not known."""
    return f" in line {mark.line + 1}" if mark else ""


def _unshared(value: Any) -> Any:
    """A copy with a separate list or mapping at every place, also where an alias was used, so that
    an override of one place does not change the others."""
    if isinstance(value, dict):
        return {name: _unshared(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value
