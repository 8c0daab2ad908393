"""Structured output: json_schema -> json_object -> prompt alone, and a check of what came back.

Servers refuse a `response_format` with 400, 422 or a 500 that names it, or ignore it silently; so the text is always
checked. Which form a server takes is remembered per (base_url, model).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
from msgspec.structs import replace

from aggregator.checks import is_int, is_number
from aggregator.errors import (
    BadRequestError,
    ConfigError,
    ContextLengthError,
    DecodeError,
    LLMError,
    ServerError,
    TruncatedError,
)
from aggregator.llm.attempts import Attempts
from aggregator.llm.calls import ChatCall
from aggregator.records import Completion
from aggregator.text import fenced_blocks

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


Validate = Callable[[str], Any]
"""Takes the text of a reply and raises ValueError where it is not acceptable."""

_JSON_OBJECT = {"type": "json_object"}
_NAMES_FORMAT = re.compile(
    r"response.?format|json.?schema|json.?object|guided|grammar|structured.?output", re.IGNORECASE
)

_remembered: WeakKeyDictionary[object, dict[tuple[str, str], int]] = WeakKeyDictionary()
# By transport, since it is the servers' trait; by tape while one is open, so that a replay begins as its record did.


def as_response_format(wanted: Any) -> Mapping[str, Any] | None:
    """Return OpenAI's `response_format` for it, a JSON schema, or a type that msgspec knows.

    >>> as_response_format({"type": "object", "properties": {}})["json_schema"]["strict"]
    False
    """
    if wanted is None:
        return None
    if isinstance(wanted, Mapping):
        if wanted.get("type") in ("json_schema", "json_object", "text"):
            return wanted
        schema = wanted
    elif isinstance(wanted, type):
        schema = msgspec.json.schema(wanted)
    else:
        raise ConfigError(f"Expected response_format as OpenAI's dict, a JSON schema or a type, got {wanted!r}")
    name = re.sub(r"\W", "_", str(schema.get("title") or "answer"))[:64]
    return {"type": "json_schema", "json_schema": {"name": name, "strict": _is_strict(schema), "schema": dict(schema)}}


def _is_strict(schema: Any) -> bool:
    """Tell whether a schema is one that strict mode takes: objects closed, every key required."""
    if isinstance(schema, list):
        return all(_is_strict(item) for item in schema)
    if not isinstance(schema, Mapping):
        return True
    if "properties" in schema or schema.get("type") == "object":
        closed = schema.get("additionalProperties") is False
        if not closed or set(schema.get("properties", {})) != set(schema.get("required", [])):
            return False
    return all(_is_strict(value) for value in schema.values())


async def ask_structured(attempts: Attempts, call: ChatCall, validate: Validate | None) -> Completion:
    """Ask in the best form that the server takes; raises DecodeError where the text is not what was asked for.

    A lower form is tried where this one is refused or ignored, within the call's attempts and deadline.
    """
    wanted = call.response_format or _JSON_OBJECT
    check = validate or checker(wanted)
    forms = list(_forms(call))
    known = _remembered.setdefault(attempts.tape or attempts.line.transport, {})
    key = (attempts.line.endpoint.base_url, call.model)
    level = min(known.get(key, 0), len(forms) - 1)
    level = _first_recorded(attempts, forms, level)
    while True:
        try:
            completion = await attempts.ask(unless=partial(_next_level, level=level, levels=len(forms)))
            await _check(completion, check)
        except LLMError as error:
            next_level = _next_level(error, level=level, levels=len(forms))
            if next_level is None or not attempts.may_go_on():
                error.attempts = attempts.count
                raise
            level = next_level
            attempts.issue(forms[level])
            if not attempts.is_answerable():  # the recorded call ended here, with fewer attempts
                error.attempts = attempts.count
                raise
            continue
        if level:
            known[key] = max(level, known.get(key, 0))
        return completion


def _forms(call: ChatCall) -> Iterator[ChatCall]:
    """The same question in each form, the best first."""
    wanted: Mapping[str, Any] = call.response_format or _JSON_OBJECT
    yield call
    if wanted["type"] == "json_schema":
        stated = _stated(call, wanted["json_schema"].get("schema", {}))
        yield replace(stated, response_format=_JSON_OBJECT)
        yield replace(stated, response_format=None)
    else:
        yield replace(_stated(call, None), response_format=None)


def _stated(call: ChatCall, schema: Any) -> ChatCall:
    """State the format in the system message, where the server does not enforce it."""
    words = "Answer with one JSON object and nothing else."
    if schema is not None:
        words += f" It fits this JSON schema: {msgspec.json.encode(schema).decode()}"
    first, *rest = call.messages
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str):
        return replace(call, messages=({**first, "content": f"{first['content']}\n\n{words}"}, *rest))
    return replace(call, messages=({"role": "system", "content": words}, *call.messages))


def _first_recorded(attempts: Attempts, forms: list[ChatCall], level: int) -> int:
    """Issue the question in the form to begin with; a tape that only plays decides by what it holds.

    When it was recorded, another call may have learned the form already that this one asks for now, or not yet.
    """
    if attempts.tape is not None and not attempts.tape.records:
        level = 0
    attempts.issue(forms[level])
    first = attempts.call, attempts.request, attempts.slot
    for lower in range(level, len(forms)):
        if lower != level:
            attempts.issue(forms[lower])
        if attempts.is_answerable():
            return lower
    attempts.call, attempts.request, attempts.slot = first  # nothing recorded: the miss is about what was asked for
    return level


def _next_level(error: LLMError, *, level: int, levels: int) -> int | None:
    """Return the form to try after this error (never the first, 0), None where another form would not help."""
    if level + 1 >= levels:
        return None
    if isinstance(error, IgnoredFormatError):
        return levels - 1  # silently ignored: a weaker format would be, too
    if isinstance(error, BadRequestError) and not isinstance(error, ContextLengthError):
        return level + 1 if error.status in (400, 422) else None
    named = isinstance(error, ServerError) and error.status == 500 and _NAMES_FORMAT.search(error.message)
    return level + 1 if named else None


class IgnoredFormatError(DecodeError):
    """The text is not what `response_format` asked for; `text` is what came."""

    def __init__(self, message: str, *, text: str = "", **facts: Any) -> None:
        super().__init__(message, **facts)
        self.text = text


async def _check(completion: Completion, check: Validate) -> None:
    for choice in completion.choices:
        if choice.message.tool_calls:
            continue
        text = choice.message.content or ""
        facts: dict[str, Any] = {"text": text, "status": 200, "request_id": completion.request_id}
        if choice.finish_reason == "length":
            raise TruncatedError(
                f"Expected a whole JSON answer, got one cut at the token limit after {len(text)} characters; "
                "raise max_tokens",
                **facts,
            )
        try:
            if hasattr(checking := check(text), "__await__"):  # a worker process checks what its owner received
                await checking
        except ValueError as error:
            raise IgnoredFormatError(f"Expected the answer in the format asked for: {error}", **facts) from error


def checker(wanted: Mapping[str, Any]) -> Validate:
    r"""Return the check of a response_format: JSON, of the schema's shape where there is one.

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
    raise ValueError(f"JSON expected, got {text[:200]!r}")
