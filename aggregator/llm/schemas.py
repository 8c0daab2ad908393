"""JSON schemas: the schema of a type, requirements of providers, and the check of a value.

A schema is checked at once, so that an invalid one costs no request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from math import isclose
from typing import Any

import msgspec

from aggregator.checks import is_int, is_number
from aggregator.errors import ConfigError
from aggregator.text import fenced_blocks, one_line

Validate = Callable[[str], Any]
"""A check that takes the text of a reply and raises ValueError if it is not acceptable."""

_DEEPEST = 64  # levels of a schema
_NOT_STRICT = {"default", "allOf", "oneOf", "not", "if", "then", "else", "patternProperties", "dependentRequired"}


def as_response_format(wanted: Any) -> Mapping[str, Any] | None:
    """Return OpenAI's `response_format` for it, a JSON schema, or a type that msgspec or pydantic knows.

    Raises ConfigError for anything else, and for a schema that only refers to itself or is too deep.

    >>> as_response_format({"type": "object", "properties": {}})["json_schema"]["strict"]
    False
    >>> as_response_format(list[int])["json_schema"]["schema"]
    {'type': 'array', 'items': {'type': 'integer'}}
    """
    if wanted is None:
        return None
    if isinstance(wanted, Mapping):
        kind = wanted.get("type")
        if kind in ("json_object", "text"):
            return wanted
        if kind == "json_schema":
            stated = wanted.get("json_schema")
            if not isinstance(stated, Mapping) or not isinstance(stated.get("schema", {}), Mapping):
                raise ConfigError(
                    "Expected response_format as {'type': 'json_schema', 'json_schema': {'name': …, 'schema': {…}}}, "
                    f"got {one_line(repr(wanted), 200)}"
                )
            check_schema(stated.get("schema", {}))
            return wanted
        schema = wanted
    else:
        schema = _schema_of(wanted)
    check_schema(schema)
    name = re.sub(r"\W", "_", str(schema.get("title") or "answer"))[:64]
    return {"type": "json_schema", "json_schema": {"name": name, "strict": is_strict(schema), "schema": dict(schema)}}


def _schema_of(kind: Any) -> Mapping[str, Any]:
    """Return the schema of a type, with its objects closed, because the type accepts no other keys."""
    make = getattr(kind, "model_json_schema", None)  # pydantic's
    try:
        schema = make() if callable(make) else msgspec.json.schema(kind)
    except (TypeError, NameError, AttributeError) as error:
        raise ConfigError(
            f"Expected response_format as OpenAI's dict, a JSON schema or a type, got {kind!r}: {error}"
        ) from error
    root = _follow(schema, schema)
    inner = root is not schema and any("$ref" in node for node in _nodes(root))
    made: Mapping[str, Any] = closed({**root, "$defs": schema["$defs"]} if inner else root)
    return made


def _nodes(schema: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Yield every schema within a schema; raises ConfigError for one that is too deep."""
    if depth > _DEEPEST:
        raise ConfigError(f"Expected a schema of at most {_DEEPEST} levels, got a deeper one - at response_format")
    if isinstance(schema, Mapping):
        yield schema
    for value in schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list | tuple) else ():
        if isinstance(value, Mapping | list | tuple):
            yield from _nodes(value, depth + 1)


def check_schema(schema: Any) -> None:
    """Raise ConfigError for an invalid schema: too deep, or with a reference that leads back to itself."""
    for node in _nodes(schema):
        _follow(node, schema)


def is_strict(schema: Any) -> bool:
    """Return True for a schema that strict mode supports.

    It is an object, with all objects closed, every key required, and no other keywords.
    """
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        return False
    for node in _nodes(schema):
        if _NOT_STRICT.intersection(node) and not _is_named(node):
            return False
        if ("properties" in node or node.get("type") == "object") and not (
            node.get("additionalProperties") is False
            and set(node.get("properties", {})) == set(node.get("required", []))
        ):
            return False
    return True


def _is_named(node: Mapping[str, Any]) -> bool:
    """Return True for a mapping of names to schemas, whose keys are not keywords."""
    return all(isinstance(value, Mapping) for value in node.values())


UNENFORCED = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "minItems"}
    | {"maxItems", "uniqueItems"}
)
"""Keywords that Claude refuses in a schema, by Anthropic's API and by Bedrock's."""


def closed(schema: Any, dropped: frozenset[str] = frozenset()) -> Any:
    """Return the schema with its objects closed and without the keywords in `dropped`, as providers require.

    Dropped keywords are still checked in the answer.

    >>> closed({"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}}, frozenset({"minimum"}))
    {'type': 'object', 'properties': {'a': {'type': 'integer'}}, 'additionalProperties': False}
    """
    if isinstance(schema, list | tuple):
        return [closed(item, dropped) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
            made[key] = {name: closed(part, dropped) for name, part in value.items()}
        elif key in ("enum", "const", "required", "default", "examples"):
            if key not in dropped:
                made[key] = value
        elif key not in dropped:
            made[key] = closed(value, dropped)
    if "properties" in made:
        made.setdefault("additionalProperties", False)
    return made


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": is_number,
    "integer": lambda value: is_int(value) or (isinstance(value, float) and value.is_integer()),
}


def mismatch(value: Any, schema: Any, *, at: str = "$", root: Any = None) -> str | None:
    """Return the first mismatch with its path, or None.

    >>> mismatch({"k": "many"}, {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]})
    "integer expected, got 'many' - at $.k"
    """
    root = schema if root is None else root
    schema = _follow(schema, root)
    if not isinstance(schema, Mapping):
        return None
    for part in schema.get("allOf") or ():
        if (wrong := mismatch(value, part, at=at, root=root)) is not None:
            return wrong
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        found = [mismatch(value, option, at=at, root=root) for option in options]
        return None if None in found else found[0]
    if "const" in schema and value != schema["const"]:
        return f"{schema['const']!r} expected, got {value!r} - at {at}"
    if "enum" in schema and value not in schema["enum"]:
        return f"one of {schema['enum']!r} expected, got {value!r} - at {at}"
    return (
        _type_mismatch(value, schema, at)
        or next((f"{name} {schema[name]!r} expected, got {value!r} - at {at}" for name in _broken(value, schema)), None)
        or _inner_mismatch(value, schema, at, root)
    )


_SLOW = re.compile(r"[*+}]\??[^()]*\)[*+{]")
"""Patterns in which a repeated group repeats: matching can take exponential time, so only the server checks them."""
_LIMITS: dict[str, tuple[Callable[[Any], bool], Callable[[Any, Any], bool]]] = {
    "minimum": (is_number, lambda value, limit: value >= limit),
    "maximum": (is_number, lambda value, limit: value <= limit),
    "exclusiveMinimum": (is_number, lambda value, limit: value > limit),
    "exclusiveMaximum": (is_number, lambda value, limit: value < limit),
    "multipleOf": (is_number, lambda value, limit: isclose(value / limit, round(value / limit), abs_tol=1e-9)),
    "minLength": (_TYPES["string"], lambda value, limit: len(value) >= limit),
    "maxLength": (_TYPES["string"], lambda value, limit: len(value) <= limit),
    "pattern": (_TYPES["string"], lambda value, limit: bool(_SLOW.search(limit) or re.search(limit, value))),
    "minItems": (_TYPES["array"], lambda value, limit: len(value) >= limit),
    "maxItems": (_TYPES["array"], lambda value, limit: len(value) <= limit),
}


def _broken(value: Any, schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keywords of limits that a value violates; a limit of an invalid type is ignored."""
    for name, (applies, holds) in _LIMITS.items():
        if name in schema and applies(value):
            try:
                kept = holds(value, schema[name])
            except (TypeError, ValueError, ZeroDivisionError, OverflowError, re.error):
                continue
            if not kept:
                yield name


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
        more = schema.get("additionalProperties", True)
        unknown = [] if more is True else [name for name in value if name not in properties]
        if more is False and unknown:
            return f"no key {unknown[0]!r} expected, got {sorted(value)!r} - at {at}"
        if isinstance(more, Mapping):
            properties = {**properties, **dict.fromkeys(unknown, more)}
        parts = ((value[name], properties[name], f"{at}.{name}") for name in properties if name in value)
    elif isinstance(value, list) and "items" in schema:
        parts = ((item, schema["items"], f"{at}[{i}]") for i, item in enumerate(value))
    else:
        return None
    return next(
        (wrong for item, part, where in parts if (wrong := mismatch(item, part, at=where, root=root)) is not None), None
    )


def _follow(schema: Any, root: Any) -> Any:
    """Follow `#/$defs/Name`, from one to the next; a missing target allows any value.

    Raises ConfigError for circular references.
    """
    seen = set()
    while isinstance(schema, Mapping) and isinstance(reference := schema.get("$ref"), str):
        if reference in seen:
            raise ConfigError(
                f"Expected a schema that states something, got one that refers to itself - at {reference}"
            )
        seen.add(reference)
        schema = root
        for step in reference.removeprefix("#").strip("/").split("/") if reference.strip("#/") else ():
            schema = schema.get(step) if isinstance(schema, Mapping) else None
    return schema


def checker(wanted: Mapping[str, Any]) -> Validate:
    r"""Return the check of a response_format: valid JSON, of the schema's shape if a schema is given.

    >>> checker({"type": "json_object"})('```json\n{"a": 1}\n```')
    {'a': 1}
    """
    schema = wanted["json_schema"].get("schema", {}) if wanted["type"] == "json_schema" else {"type": "object"}

    def check(text: str) -> Any:
        value = parse_json(text)
        if (wrong := mismatch(value, schema)) is not None:
            raise ValueError(wrong)
        return value

    return check


def parse_json(text: str) -> Any:
    """Parse a text that is JSON, bare or as its only fenced block; raises ValueError."""
    fenced = fenced_blocks(text)
    for candidate in (text, *(fenced if len(fenced) == 1 else ())):
        try:
            return msgspec.json.decode(candidate.strip())
        except (msgspec.DecodeError, RecursionError):
            continue
    raise ValueError(f"Expected JSON, got {text[:200]!r}")
