"""The schema of a reply that suggests values for parameters, for `response_format`. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from aggregator.agents import parameters as values_of_types

Schema = dict[str, Any]

_KEPT = ("type", "enum", "const", "description", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_KEPT_OF_LISTS = ("minItems", "maxItems")
"""Keywords that strict mode supports in addition to the structure.

Patterns and lengths are left out, because servers differ; every limit is checked again when the value is converted.
"""

_JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number"}


def lean_schema(parameters: Sequence[Any]) -> dict[str, Any]:
    """Return a schema for small models: the values first, then one short text of reasons, and no nulls.

    Every value is required; an unchanged one is repeated. A type that strict mode does not support turns it off.
    """
    plain = {parameter.name: _plain(parameter) for parameter in parameters}
    strict = {name: part for name, schema in plain.items() if (part := _strict(schema)) is not None}
    every_key = len(strict) == len(plain)
    inner = _object(strict if every_key else plain, list(strict) if every_key else [])
    schema = _object({"suggestion": inner, "reasoning": {"type": "string"}}, ["suggestion", "reasoning"])
    return {"type": "json_schema", "json_schema": {"name": "suggestion", "strict": every_key, "schema": schema}}


def response_schema(parameters: Sequence[Any]) -> dict[str, Any]:
    """Return the `response_format` of a reply that suggests values for these parameters.

    Strict mode requires every key, so each value may be null, which `convert_suggestion` reads as unchanged. A type
    that strict mode does not support (a dict with arbitrary keys, Any) turns it off: then keys may be left out, and the
    schema only guides.
    """
    return _response_schema(msgspec.json.encode({parameter.name: _plain(parameter) for parameter in parameters}))


@lru_cache(maxsize=256)
def _response_schema(encoded: bytes) -> dict[str, Any]:
    """Return the schema of a reply from the schemas of its values; every instance of a step has the same one."""
    plain: dict[str, Schema] = msgspec.json.decode(encoded)
    strict = {name: part for name, schema in plain.items() if (part := _strict(schema)) is not None}
    if len(strict) == len(plain):
        schema = _reply({name: _nullable(part) for name, part in strict.items()}, every_key=True)
    else:
        schema = _reply(plain, every_key=False)
    return {
        "type": "json_schema",
        "json_schema": {"name": "suggestion", "strict": len(strict) == len(plain), "schema": schema},
    }


def _plain(parameter: Any) -> Schema:
    """Return the schema of one value; for Trace's parameters it is derived from the value."""
    if hasattr(parameter, "json_schema"):
        own: Schema = parameter.json_schema()
        return own
    return values_of_types.schema(values_of_types.infer_type(parameter.data))


def _reply(suggestion: Mapping[str, Schema], *, every_key: bool) -> Schema:
    reasons = {f"reasoning_{name}": {"type": "string"} for name in suggestion}
    inner = _object(suggestion, list(suggestion) if every_key else [])
    return _object({**reasons, "suggestion": inner}, [*reasons, "suggestion"] if every_key else ["suggestion"])


def _object(properties: Mapping[str, Schema], required: list[str]) -> Schema:
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}


def _nullable(schema: Schema) -> Schema:
    """Let a value be null and keep its description: a strict schema has no optional keys."""
    if schema.get("type") == "null" or {"type": "null"} in schema.get("anyOf", ()):
        return schema
    words = {"description": schema["description"]} if "description" in schema else {}
    inner = {key: value for key, value in schema.items() if key != "description"}
    return {"anyOf": [*(inner["anyOf"] if set(inner) == {"anyOf"} else [inner]), {"type": "null"}], **words}


def _strict(schema: Schema) -> Schema | None:
    """Return a schema in strict mode's subset, or None if that is impossible."""
    kept = {key: schema[key] for key in _KEPT if key in schema}
    if "anyOf" in schema:
        options = [_strict(option) for option in schema["anyOf"]]
        return None if None in options else {**kept, "anyOf": options}
    kind = schema.get("type")
    if kind == "array":
        items = _strict(schema["items"]) if schema.get("items") and "prefixItems" not in schema else None
        limits = {key: schema[key] for key in _KEPT_OF_LISTS if key in schema}
        return None if items is None else {**kept, **limits, "items": items}
    if kind == "object":
        members = {name: _strict(part) for name, part in schema.get("properties", {}).items()}
        if not members or None in members.values():
            return None
        return {**kept, **_object({name: part for name, part in members.items() if part is not None}, list(members))}
    if kind is None and "enum" in schema:
        kinds = {_JSON_TYPES.get(type(value)) for value in schema["enum"]}
        return None if len(kinds) > 1 or None in kinds else {"type": kinds.pop(), **kept}
    return kept if isinstance(kind, str) else None
