"""Ask a model for values of parameters: the schema of the reply, its conversion to values, and one repair call.

A truncated, ambiguous or unreadable reply raises a SuggestionError whose text the repair call quotes; an invalid value
is refused with a reason. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from aggregator.agents import parameters as values_of_types
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import (
    BadRequestError,
    ContentFilterError,
    LLMError,
    ParameterError,
    PermissionDeniedError,
    SuggestionError,
    TruncatedError,
    ends_run,
)
from aggregator.llm.models import complete_own
from aggregator.protocols import ChatModel
from aggregator.records import Values
from aggregator.text import list_names, quote_ends
from aggregator.training.prompts import repair_messages, shorter_messages
from aggregator.training.replies import parse_reply, same

# ---- the schema of a reply, for `response_format`

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


# ---- from a suggestion to values

_NEAR_WITHIN = 200


def extract_llm_suggestion(response: str, ignore_extraction_error: bool = True) -> dict[str, Any]:
    r"""Extract the suggestion from the response; {} for TERMINATE.

    A response that cannot be read without guessing gives {}, or SuggestionError with `ignore_extraction_error=False`.

    >>> extract_llm_suggestion('```json\n{"suggestion": {"k": 3}}\n```')
    {'k': 3}
    """
    try:
        return parse_reply(response).suggestion or {}
    except SuggestionError:
        if not ignore_extraction_error:
            raise
        return {}


def construct_update_dict(
    parameters: Sequence[Any], suggestion: Mapping[str, Any], ignore_extraction_error: bool = True
) -> dict[Any, Any]:
    """Convert the suggestion into each parameter's own type and return {parameter: value}.

    An invalid value and an unknown name are left out, or ParameterError with `ignore_extraction_error=False`.
    """
    values, refused = convert_suggestion(suggestion, parameters, null_is_unchanged=False)
    if refused and not ignore_extraction_error:
        raise ParameterError("; ".join(refused.values()))
    return {parameter: values[parameter.name] for parameter in parameters if parameter.name in values}


def convert_suggestion(
    suggestion: Mapping[str, Any], parameters: Sequence[Any], *, null_is_unchanged: bool = True
) -> tuple[Values, dict[str, str]]:
    """Convert a suggestion; returns the accepted values by parameter name, and the reason for each refused key.

    Keys are names or py_names, exactly. null leaves a parameter unchanged unless its type allows null: a strict schema
    requires every key. The text TERMINATE is refused as a value, because it means no change.
    """
    known: dict[str, Any] = {parameter.name: parameter for parameter in parameters}
    if not suggestion.keys() <= known.keys():
        known = {key: parameter for parameter in parameters for key in (parameter.py_name, parameter.name)}
    values: Values = {}
    refused: dict[str, str] = {}
    for key, raw in suggestion.items():
        if (parameter := known.get(key)) is None:
            near = get_close_matches(key[:_NEAR_WITHIN], list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the parameters are {list_names(list(known))}"
            refused[key] = f"Expected the name of a parameter, got {quote_ends(key, 60)}; {hint}"
            continue
        try:
            values[parameter.name] = _convert(parameter, key, suggestion)
        except ParameterError as error:
            if raw is not None or not null_is_unchanged:
                refused[key] = str(error)
    return values, refused


def _convert(parameter: Any, key: str, suggestion: Mapping[str, Any]) -> Any:
    """Convert by the parameter's own rule, or for Trace's parameters by the type of the value.

    A value may be given under both names of a parameter if the two agree.
    """
    raw = suggestion[key]
    if not getattr(parameter, "trainable", True):
        raise ParameterError(f"Expected a trainable parameter, got {key!r}, which is fixed - at $.suggestion.{key}")
    if len(suggestion) > 1 and (name := parameter.py_name) != parameter.name:
        other = parameter.name if key == name else name
        if other in suggestion and not same(raw, suggestion[other]):
            raise ParameterError(f"Expected one value, got two different ones - at $.suggestion.{name}")
    if isinstance(raw, str) and raw.strip() == "TERMINATE":
        trouble = "Expected a value, got 'TERMINATE', which means no change, and only as the whole reply"
        raise ParameterError(f"{trouble} - at $.suggestion.{parameter.py_name}")
    if hasattr(parameter, "convert"):
        return parameter.convert(raw)
    try:
        return values_of_types.convert(raw, values_of_types.infer_type(parameter.data))
    except values_of_types.Unfit as unfit:
        raise ParameterError(f"{unfit.reason} - at $.suggestion.{parameter.py_name}{unfit.path}") from None


# ---- the call

Parameters = Sequence[ParameterNode[Any]]


class Answer(Struct, frozen=True, kw_only=True):
    """Values of the parameters' own types; `error` names what could not be used, even after the repair call."""

    values: Values = {}
    reasoning: str = ""
    error: str | None = None


Refuse = Callable[[Values], Mapping[str, str]]
"""Returns the reason for each value that is refused, by parameter name."""

Read = Callable[[str, Parameters], Answer]
"""Reads a reply into values for these parameters."""


def read_reply(text: str, parameters: Parameters, *, ignored: Collection[str] = ()) -> Answer:
    """Read one reply into values of the parameters' own types; names in `ignored` are left out."""
    try:
        reply = parse_reply(text)
    except SuggestionError as error:
        return Answer(error=str(error))
    if reply.terminate or reply.suggestion is None:
        return Answer(reasoning=reply.reasoning)
    suggestion = reply.suggestion
    if ignored:
        suggestion = {key: value for key, value in suggestion.items() if key not in ignored}
    values, refused = convert_suggestion(suggestion, parameters)
    return Answer(values=values, reasoning=reply.reasoning, error="; ".join(refused.values()) or None)


def leave_out(answer: Answer, refused: Mapping[str, str]) -> Answer:
    """Return the answer without refused values; their reasons are added to its error."""
    values = {name: value for name, value in answer.values.items() if name not in refused}
    reasons = [reason for reason in (answer.error, *refused.values()) if reason]
    return replace(answer, values=values, error="; ".join(reasons))


async def ask(
    llm: ChatModel,
    messages: list[dict[str, str]],
    parameters: Parameters,
    *,
    max_tokens: int,
    temperature: float | None = None,
    seed: int | None = None,
    read: Read = read_reply,
    structured: bool = True,
    schema: Callable[[Parameters], dict[str, Any]] | None = None,
    refuse: Refuse | None = None,
) -> Answer:
    """Return the model's suggestion for the parameters; raises LLMError if the call itself failed.

    A reply that cannot be read without guessing, and a value that cannot become its parameter's type or that `refuse`
    refuses, is requested once more with the reason quoted. What is still invalid is left out and named in `error`. A
    truncated reply is not quoted: the second one must be shorter, and has twice the room. If the second call itself is
    refused (too long, a filter), the first reply is used. `schema` makes the `response_format`. With `structured=False`
    the reply has the form that `read` expects: no schema is sent, and there is no second call.
    """
    given: dict[str, Any] = {"temperature": temperature, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None}
    if structured:  # validate=str: the client accepts any text, `read` judges it
        options |= {"response_format": (schema or response_schema)(parameters), "validate": str}

    async def once(messages: list[dict[str, str]], limit: int) -> tuple[str, Answer, bool]:
        try:
            completion = await complete_own(llm, messages, max_tokens=limit, **options)
        except TruncatedError as error:
            return error.text, Answer(error=str(error)), True
        if completion.finish_reason == "length":
            return completion.text, Answer(error=f"the reply was cut at the limit of {limit} tokens"), True
        text = completion.text
        answer = read(text, parameters)
        refused = None if refuse is None else refuse(answer.values)
        return text, leave_out(answer, refused) if refused else answer, False

    text, answer, is_cut = await once(messages, max_tokens)
    if answer.error is None or not structured:
        return answer
    again = shorter_messages(messages, text, max_tokens) if is_cut else repair_messages(messages, text, answer.error)
    try:
        _, repaired, _ = await once(again, 2 * max_tokens if is_cut else max_tokens)
    except (BadRequestError, ContentFilterError, PermissionDeniedError) as error:
        if ends_run(error):
            raise
        return answer
    return repaired


async def ask_or_fail(*arguments: Any, **options: Any) -> Answer | LLMError:
    """Call `ask`, but return an error that another call may not meet; raises what ends a run."""
    try:
        return await ask(*arguments, **options)
    except LLMError as error:
        if ends_run(error):
            raise
        return error
