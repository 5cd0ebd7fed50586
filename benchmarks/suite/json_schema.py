"""A validator for the part of JSON Schema that benchmarks/result.schema.json uses."""

from collections.abc import Mapping
from typing import Any

_TYPES = {"object": Mapping, "array": list, "string": str, "boolean": bool, "null": type(None)}
# Words that change nothing about what is valid.
_ANNOTATIONS = {"$schema", "title", "description"}
_CONSTRAINTS = {
    "const",
    "enum",
    "type",
    "required",
    "properties",
    "additionalProperties",
    "items",
    "allOf",
    "if",
    "then",
}


def problems_of(value: Any, schema: Mapping[str, Any], where: str) -> list[str]:
    """Sentences about what breaks the schema. Raises ValueError for a word of JSON Schema that is
    not implemented here."""
    unknown = set(schema) - _ANNOTATIONS - _CONSTRAINTS
    if unknown:
        raise ValueError(f"the schema of {where} uses {', '.join(sorted(unknown))}")
    problems = []
    if "const" in schema and value != schema["const"]:
        problems.append(f"{where} must be {schema['const']!r}, got {value!r}")
    if "enum" in schema and value not in schema["enum"]:
        problems.append(f"{where} must be one of {schema['enum']}, got {value!r}")
    allowed = _allowed_types(schema)
    if allowed and not any(_has_type(value, name) for name in allowed):
        given = type(value).__name__
        problems.append(f"{where} must be of type {' or '.join(allowed)}, got {given}")
        return problems
    if isinstance(value, Mapping):
        problems += _problems_of_object(value, schema, where)
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            problems += problems_of(item, schema["items"], f"{where}[{number}]")
    for branch in schema.get("allOf", ()):
        if not problems_of(value, branch["if"], where):
            problems += problems_of(value, branch["then"], where)
    return problems


def _problems_of_object(
    value: Mapping[str, Any], schema: Mapping[str, Any], where: str
) -> list[str]:
    required = schema.get("required", ())
    problems = [f"{where} lacks {name}" for name in required if name not in value]
    properties = schema.get("properties", {})
    for name, item in value.items():
        rule = properties.get(name, schema.get("additionalProperties"))
        if rule:
            problems += problems_of(item, rule, f"{where}.{name}")
    return problems


def _allowed_types(schema: Mapping[str, Any]) -> list[str]:
    allowed = schema.get("type", [])
    return allowed if isinstance(allowed, list) else [allowed]


def _has_type(value: Any, name: str) -> bool:
    if name in ("number", "integer"):
        numbers = int if name == "integer" else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, _TYPES[name])
