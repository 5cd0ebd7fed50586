"""YAML that a user wrote, read in time and memory that its length bounds.

PyYAML alone accepts a name twice (the last one wins), follows aliases without end, converts
numbers in quadratic time and nests until the interpreter's stack is used up."""

from typing import Any

import yaml

LONGEST = 1_000_000  # characters; the longest recipe that ships has 3,000
_DEEPEST = 50
_MOST_VALUES = 50_000  # with every alias counted as the value that it repeats
_LONGEST_NUMBER = 400  # the longest float64 in plain digits has 309 before its point
_NUMBERS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}


def read_yaml(text: str) -> Any:
    """The plain values in YAML text; no two places share a list or a mapping. Raises ValueError and
    nothing else, also for a name that occurs twice in a mapping, for a value within itself, and for
    what is too long, deep or manifold."""
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
    # PyYAML lets its constructors' errors through: KeyError for `!!bool x`, AttributeError for a
    # wrong date.
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Counts while it composes, so that nothing is built of a document that is refused."""

    def __init__(self, text: str):
        super().__init__(text)
        self._open: list[yaml.Event] = []
        self._anchored_values: dict[int, int] = {}
        self._values = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
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
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise _error(f"a number of {len(node.value):,} characters", event)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
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

    def _compose_alias(self, event: yaml.AliasEvent, parent: Any, index: Any) -> yaml.Node:
        if any(opened.anchor == event.anchor for opened in self._open):
            raise _error(f"'{event.anchor:.100}' contains itself", event)
        node = super().compose_node(parent, index)
        self._count(self._anchored_values[id(node)], event)
        return node

    def _count(self, values: int, event: yaml.Event) -> None:
        self._values += values
        if self._values > _MOST_VALUES:
            raise _error(f"more than {_MOST_VALUES:,} values, aliases followed,", event)


def _error(problem: str, place: yaml.Event | yaml.Node) -> ValueError:
    return ValueError(f"{problem} in line {place.start_mark.line + 1}")


def _message(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's problem with its line, without the quotation of the text."""
    context = f"{error.context}, " if error.context else ""
    line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
    return f"{context}{error.problem}{line}"


def _unshared(value: Any) -> Any:
    """With a copy wherever an alias stood: a value that is overridden in one place stays as it is
    in the others."""
    if isinstance(value, dict):
        return {name: _unshared(item) for name, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value
