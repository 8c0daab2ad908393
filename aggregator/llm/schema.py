"""Does a value fit a JSON schema? The part of JSON Schema that `response_format` uses, and no more.

Keywords that are not known here hold nothing back: the check finds servers that ignored the schema, it does not
stand for the typed conversion that comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: (
        (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())
    ),
}


def mismatch(value: Any, schema: Any, *, at: str = "$", root: Any = None) -> str | None:
    """Return what does not fit, with its path; None where everything fits.

    >>> mismatch({"k": "many"}, {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]})
    "integer expected, got 'many' - at $.k"
    """
    root = schema if root is None else root
    if not isinstance(schema, Mapping):
        return None
    if "$ref" in schema:
        return mismatch(value, _resolve(schema["$ref"], root), at=at, root=root)
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        found = [mismatch(value, option, at=at, root=root) for option in options]
        return None if None in found else found[0]
    if "const" in schema and value != schema["const"]:
        return f"{schema['const']!r} expected, got {value!r} - at {at}"
    if "enum" in schema and value not in schema["enum"]:
        return f"one of {schema['enum']!r} expected, got {value!r} - at {at}"
    return _type_mismatch(value, schema, at) or _inner_mismatch(value, schema, at, root)


def _type_mismatch(value: Any, schema: Mapping[str, Any], at: str) -> str | None:
    names = schema.get("type")
    names = [names] if isinstance(names, str) else names or []
    if names and not any(_TYPES.get(name, lambda _: True)(value) for name in names):
        return f"{' or '.join(names)} expected, got {value!r} - at {at}"
    return None


def _inner_mismatch(value: Any, schema: Mapping[str, Any], at: str, root: Any) -> str | None:
    if isinstance(value, dict):
        missing = [name for name in schema.get("required", ()) if name not in value]
        if missing:
            return f"key {missing[0]!r} expected, got {sorted(value)!r} - at {at}"
        properties = schema.get("properties", {})
        parts = ((value[name], properties[name], f"{at}.{name}") for name in properties if name in value)
    elif isinstance(value, list) and "items" in schema:
        parts = ((item, schema["items"], f"{at}[{i}]") for i, item in enumerate(value))
    else:
        return None
    return next(
        (wrong for item, part, where in parts if (wrong := mismatch(item, part, at=where, root=root)) is not None), None
    )


def _resolve(reference: str, root: Any) -> Any:
    """Follow `#/$defs/Name`; one that leads nowhere holds nothing back."""
    node = root
    for step in reference.removeprefix("#/").split("/"):
        node = node.get(step) if isinstance(node, Mapping) else None
    return node
