"""From a model's reply to values that the parameters accept, without guessing.

`parse_reply` reads the reply, `typed` converts what it suggests. A reply that is cut off, ambiguous or unreadable is a
SuggestionError whose text can be quoted to the model; a value that does not fit is refused with its reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from msgspec import Struct

from aggregator.agents import values as values_of_types
from aggregator.errors import ParameterError, SuggestionError
from aggregator.records import Values
from aggregator.training import rungs
from aggregator.training.schemas import response_schema

__all__ = ["Reply", "construct_update_dict", "extract_llm_suggestion", "parse_reply", "response_schema", "typed"]

MAX_REPLY = 2_000_000
"""Characters; a longer reply is refused unread."""

_EXPECTED = 'Expected one JSON object {"reasoning": "...", "suggestion": {<parameter>: <value>}} or only TERMINATE'
_QUOTED = 240
_NAMES_SHOWN = 12
_NEAR_WITHIN = 200
_INVISIBLE = " \t\r\n\ufeff\u200b"
_AROUND_WORD = _INVISIBLE + "`\"'*_.!"
_TAG = re.compile(r"<(?P<end>/)?(?:think|thinking|thought|reasoning)>", re.IGNORECASE)


class Reply(Struct, frozen=True, kw_only=True):
    """What a reply says. `suggestion` is None for TERMINATE; `rung` names what reading it took, as `fence+lenient`."""

    suggestion: dict[str, Any] | None = None
    reasoning: str = ""
    terminate: bool = False
    rung: str = "json"


def parse_reply(text: str) -> Reply:
    """Read a reply in the aggregator's form; SuggestionError where that would take guessing.

    TERMINATE counts only as the whole reply. The outermost key is `suggestion` in any case; its value is an object, or
    null for no change. An object without that key is no answer, even if its keys are parameters: prompts quote those.
    Time grows linearly with the reply's length.

    >>> parse_reply('<think>hm</think>Here: {"suggestion": {"k": 3,}}')
    Reply(suggestion={'k': 3}, reasoning='', terminate=False, rung='think+prose+lenient')
    >>> parse_reply("`TERMINATE`.").terminate
    True
    """
    try:
        return _parse(_checked(text))
    except SuggestionError as error:
        raise SuggestionError(f"{_EXPECTED}, got {error}. The reply: {_shortened(text)}") from None


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise SuggestionError(f"{type(text).__name__}, not text")
    if len(text) > MAX_REPLY:
        raise SuggestionError(f"{len(text)} characters; at most {MAX_REPLY} are read")
    if not (body := text.strip(_INVISIBLE)):
        raise SuggestionError("an empty reply")
    return body


def _parse(body: str) -> Reply:
    body, steps = _after_thinking(body)
    if body.strip(_AROUND_WORD).upper() == "TERMINATE":
        return Reply(terminate=True, rung="+".join([*steps, "terminate"]))
    if (unquoted := _unquoted(body)) is not None:
        body, steps = unquoted, [*steps, "string"]
    found = rungs.read_whole(body)
    if found is None or not _suggestion_keys(found):
        found, way = _only_answer(body)
        return _reply(found, [*steps, *way])
    return _reply(found, [*steps, "json"])


def _after_thinking(body: str) -> tuple[str, list[str]]:
    """Cut off the thinking before the answer; nothing is read inside of it, nor is a tag inside of an object one.

    Thinking may begin unmarked (the prompt's template opened it) and may stand after some words.
    """
    steps: list[str] = []
    while (tag := _TAG.match(body)) and not tag["end"]:
        end = next((tag.end() for tag in _TAG.finditer(body) if tag["end"]), None)
        if end is None:
            raise SuggestionError(f"thinking that was cut off: {tag.group()} is never closed")
        body, steps = body[end:].strip(_INVISIBLE), ["think"]
    if not _TAG.search(body):
        return body, steps
    tags = _tags_outside_objects(body)
    if tags and not tags[-1]["end"]:
        raise SuggestionError(f"thinking that was cut off: {tags[-1].group()} is never closed")
    return (body[tags[-1].end() :].strip(_INVISIBLE), ["think"]) if tags else (body, steps)


def _tags_outside_objects(body: str) -> list[re.Match[str]]:
    tags: list[re.Match[str]] = []
    position = 0
    for region in rungs.regions(body):
        tags += _TAG.finditer(body, position, region.start)
        position = region.end
    return tags + list(_TAG.finditer(body, position))


def _unquoted(body: str) -> str | None:
    """Undo one JSON encoding: the whole reply is a JSON string that holds the reply."""
    if not (body.startswith('"') and body.endswith('"')):
        return None
    try:
        return str(json.loads(body, strict=False)).strip(_INVISIBLE)
    except ValueError:
        return None


def _only_answer(body: str) -> tuple[dict[str, Any], list[str]]:
    """Find the one object of a reply that holds a suggestion, and name the way to it."""
    answers: list[tuple[dict[str, Any], list[str]]] = []
    others: list[str] = []
    for region in rungs.regions(body):
        if region.truncated:
            raise SuggestionError(f"an object that is cut off: {region.problem}; it begins at character {region.start}")
        if not _suggestion_keys(region.keys):
            others += region.keys
            continue
        found, rung = rungs.read(body, region)
        answers.append((found, [*_place(body, region), rung]))
    if not answers:
        raise SuggestionError(f"objects without it, of the keys {_listed(others)}" if others else "no such object")
    first = _suggested(answers[0][0])
    if any(not rungs.same(first, _suggested(found)) for found, _ in answers[1:]):
        raise SuggestionError(f"an ambiguous reply: {len(answers)} objects that suggest different things")
    return answers[0]


def _place(body: str, region: rungs.Region) -> list[str]:
    if region.start == 0 and region.end == len(body):
        return []
    before = body[: region.start].rstrip()
    return ["fence" if before.rpartition("\n")[2].lstrip().startswith("```") else "prose"]


def _suggestion_keys(keys: Mapping[str, Any] | Sequence[str]) -> list[str]:
    return [key for key in keys if key.strip().casefold() == "suggestion"]


def _suggested(found: dict[str, Any]) -> Any:
    """The value of the one suggestion key; two of different case must agree, as equal keys must."""
    values = [found[key] for key in _suggestion_keys(found)]
    if not all(rungs.same(values[0], value) for value in values[1:]):
        raise SuggestionError("an ambiguous reply: two suggestion keys with different values")
    return values[0]


def _reply(found: dict[str, Any], way: list[str]) -> Reply:
    suggestion = _suggested(found)
    if suggestion is None:
        suggestion = {}
    if not isinstance(suggestion, dict):
        raise SuggestionError(f'"suggestion" as {_shortened(suggestion, 60)}, which is no object')
    rungs.canonical(found)  # refuses text that could not be written again
    reasons = [value for key, value in found.items() if key.strip().casefold().startswith("reason")]
    reasoning = "\n".join(value if isinstance(value, str) else json.dumps(value) for value in reasons)
    return Reply(suggestion=suggestion, reasoning=reasoning, rung="+".join(way))


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

    A value that does not fit and an unknown name are left out, or ParameterError with `ignore_extraction_error=False`.
    """
    values, refused = typed(suggestion, parameters, null_is_unchanged=False)
    if refused and not ignore_extraction_error:
        raise ParameterError("; ".join(refused.values()))
    return {parameter: values[parameter.name] for parameter in parameters if parameter.name in values}


def typed(
    suggestion: Mapping[str, Any], parameters: Sequence[Any], *, null_is_unchanged: bool = True
) -> tuple[Values, dict[str, str]]:
    """Convert a suggestion; returns the accepted values by parameter name, and the reason for each refused key.

    Keys are names or py_names, exactly. null leaves a parameter unchanged unless its type takes null: a strict schema
    makes the model write every key. The text TERMINATE is refused as a value; it is the word for no change.
    """
    known = {name: parameter for parameter in parameters for name in (parameter.py_name, parameter.name)}
    values: Values = {}
    refused: dict[str, str] = {}
    for key, raw in suggestion.items():
        try:
            parameter = _known(key, known)
            value = _converted(parameter, _agreed(suggestion, parameter))
        except ParameterError as error:
            if raw is not None or key not in known or not null_is_unchanged:
                refused[key] = str(error)
        else:
            values[parameter.name] = value
    return values, refused


def _known(key: str, known: Mapping[str, Any]) -> Any:
    if key not in known:
        near = get_close_matches(key[:_NEAR_WITHIN], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the parameters are {_listed(list(known))}"
        raise ParameterError(f"Expected the name of a parameter, got {_shortened(key, 60)}; {hint}")
    if not getattr(known[key], "trainable", True):
        raise ParameterError(f"Expected a trainable parameter, got {key!r}, which is fixed - at $.suggestion.{key}")
    return known[key]


def _agreed(suggestion: Mapping[str, Any], parameter: Any) -> Any:
    """The raw value of a parameter, which may stand under both of its names only where they agree."""
    first, *others = [suggestion[name] for name in {parameter.name: 0, parameter.py_name: 0} if name in suggestion]
    if not all(rungs.same(first, other) for other in others):
        raise ParameterError(f"Expected one value, got two different ones - at $.suggestion.{parameter.py_name}")
    return first


def _converted(parameter: Any, raw: Any) -> Any:
    """Convert by the parameter's own rule; one that has none (Trace's) by the type of its value."""
    if isinstance(raw, str) and raw.strip() == "TERMINATE":
        trouble = "Expected a value, got 'TERMINATE', which means no change, and only as the whole reply"
        raise ParameterError(f"{trouble} - at $.suggestion.{parameter.py_name}")
    if hasattr(parameter, "convert"):
        return parameter.convert(raw)
    try:
        return values_of_types.convert(raw, values_of_types.infer_type(parameter.data))
    except values_of_types.Unfit as unfit:
        raise ParameterError(f"{unfit.reason} - at $.suggestion.{parameter.py_name}{unfit.path}") from None


def _shortened(value: Any, limit: int = _QUOTED) -> str:
    """Quote a value, the middle left out where it is long: the beginning and the end tell most."""
    if isinstance(value, str) and len(value) > limit:
        return f"{value[: limit // 2]!r} ... {value[-limit // 2 :]!r} ({len(value)} characters)"
    return values_of_types.shorten(value, limit)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
