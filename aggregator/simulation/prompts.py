"""How the simulated model reads the prompts of `aggregator.training.prompts`, and lays out its replies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from aggregator.checks import is_number
from aggregator.simulation.aggregator import Block
from aggregator.simulation.language import split_prompt
from aggregator.simulation.optimizer import Case, Parameter, Proposed, bounds

Role = Literal["agent", "optimizer", "aggregator"]

TERMINATE = "TERMINATE"
UNCHANGED = "No change is needed."

_HEADING = re.compile(r"^#([A-Z]\w*)[ \t]*$", re.MULTILINE)
_FACT = re.compile(r"(confidence|support|score|feedback): (.*)")
_CUT = re.compile(r"\s*(?:…|\.\.\.|\[cut\])\s*$")


class MalformedError(ValueError):
    """A request that this API would refuse."""


def text_of(message: Mapping[str, Any]) -> str:
    """Return a message's text; content parts are joined without a separator."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))


def role_of(messages: Sequence[Mapping[str, Any]]) -> Role:
    """Return the role, by the headings of the first user message."""
    headings = set(sections_of(_question(messages)))
    if "CurrentValue" in headings:
        return "aggregator"
    return "optimizer" if {"Parameters", "Feedback"} <= headings else "agent"


def sections_of(text: str) -> dict[str, str]:
    r"""Split a user message at its heading lines.

    >>> sections_of("#Score\n0.5\n\n#Feedback\nToo short.")
    {'Score': '0.5', 'Feedback': 'Too short.'}
    """
    _, *rest = _HEADING.split(text)
    return {heading: body.strip() for heading, body in zip(rest[::2], rest[1::2], strict=True)}


def case_of(messages: Sequence[Mapping[str, Any]]) -> Case:
    """Read the example that an optimizer is asked about."""
    sections = sections_of(_question(messages))
    seen = shown_text(sections.get("Transcript", ""))
    return Case(
        parameters={name: _parameter(name, facts) for name, facts in _object(sections["Parameters"]).items()},
        seen=_CUT.sub("", seen),
        cut=bool(_CUT.search(seen)),
        output=sections.get("Output", ""),
        score=_float(sections.get("Score", "")),
        feedback=sections["Feedback"],
    )


def blocks_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Block, list[Block]]:
    """Read the current value and the suggestions that an aggregator is asked about."""
    sections = sections_of(_question(messages))
    suggested = [_block(body) for heading, body in sections.items() if heading.startswith("SuggestedValue")]
    return _block(sections["CurrentValue"]), suggested


_QUESTIONS = ("user: ", "Inputs: ")  # of a call to a model; of a record of GEPA's


def shown_text(transcript: str) -> str:
    r"""Return the question of a transcript: its last user message, of a prompt in one message the last paragraph.

    >>> shown_text("LLM call\n  system: Be kind.\n  user: My parcel is lost.\n  reply: sales")
    'My parcel is lost.'
    """
    lines = transcript.split("\n")
    at = max((i for i, line in enumerate(lines) if line.lstrip().startswith(_QUESTIONS)), default=None)
    if at is None:
        return ""
    first = lines[at].lstrip()
    indent = len(lines[at]) - len(first)
    if not first.endswith(": |"):
        return first.partition(": ")[2]
    block = []
    for line in lines[at + 1 :]:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        block.append(line.strip())
    text = "\n".join(block)
    return text if any(line.lstrip().startswith("system: ") for line in lines[:at]) else split_prompt(text)[1]


def reply_text(proposed: Proposed, response_format: Any = None) -> str:
    """Lay out new values with their reasons as both roles reply, TERMINATE where nothing should change.

    A `response_format` makes it JSON in every case. A schema is kept to as constrained decoding does: every required
    key is there, null for no change, and numbers stay within the schema's limits.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if not proposed and kind not in {"json_object", "json_schema"}:
        return TERMINATE
    reply: dict[str, Any] = {f"reasoning_{name}": why for name, (_, why) in proposed.items()}
    reply["suggestion"] = {name: value for name, (value, _) in proposed.items()}
    if kind == "json_schema":
        reply = _within(reply, response_format["json_schema"].get("schema", {}))
    return json.dumps(reply, indent=2)


def is_choice(response_format: Any) -> bool:
    """Return True if a schema asks for the number of a suggestion instead of new values."""
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind != "json_schema":
        return False
    suggestion = response_format["json_schema"].get("schema", {}).get("properties", {}).get("suggestion", {})
    return list(suggestion.get("properties", {})) == ["choice"]


def _within(reply: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties", {})
    inner = properties.get("suggestion", {})
    limits = inner.get("properties", {})
    suggestion = {name: _limited(value, limits.get(name, {})) for name, value in reply["suggestion"].items()}
    unchanged = {name: None for name in inner.get("required", ()) if name not in suggestion}
    needed = [name for name in schema.get("required", ()) if name != "suggestion" and name not in reply]
    reasons = {name: reply[name] for name in reply if name != "suggestion"} | dict.fromkeys(needed, UNCHANGED)
    return {**reasons, "suggestion": suggestion | unchanged}


def _limited(value: Any, schema: Mapping[str, Any]) -> Any:
    """Keep a number within the limits that a schema states."""
    if not is_number(value):
        return value
    for option in schema.get("anyOf", [schema]):
        value = min(max(value, option.get("minimum", value)), option.get("maximum", value))
    return value


def _question(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the first user message: what follows it repeats the question."""
    return next((text_of(message) for message in messages if message["role"] == "user"), "")


def _parameter(name: str, facts: Any) -> Parameter:
    if not isinstance(facts, Mapping) or "value" not in facts:
        return Parameter(name, facts)
    kind = facts.get("type", "")
    minimum, maximum = bounds(kind if isinstance(kind, str) else json.dumps(kind))
    about = f"{facts.get('description', '')} {facts.get('constraint', '')}"
    return Parameter(name, facts["value"], about, minimum, maximum)


def _block(body: str) -> Block:
    facts: dict[str, str] = {}
    while found := _FACT.match(body):
        facts[found[1]] = found[2]
        body = body[found.end() :].lstrip("\n")
    weight = _float(facts.get("confidence", "")) or 0.0
    return Block(weight * (_float(facts.get("support", "")) or 1.0), _object(body))


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise MalformedError(f"Expected a JSON object in a section, got {text[:80]!r}: {error}") from error
    if not isinstance(found, dict):
        raise MalformedError(f"Expected a JSON object in a section, got {text[:80]!r}")
    return found


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
