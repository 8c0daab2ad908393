"""The usual chat completion in narrow types: what nearly every server answers nearly always.

One choice with a message; content that is text or null; calls of functions, their arguments as text; one of OpenAI's
four finish reasons; thinking as text or not at all; token counts. msgspec's own validation refuses all else (an error,
several choices, parts, custom tools, other words), and the lenient types of `openai_answers` read it from its start.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from aggregator.llm.codecs.openai_answers import WireUsage
from aggregator.records import FinishReason, ToolCall


class _Function(Struct, gc=False):
    name: str
    arguments: str


class _ToolCall(Struct, gc=False):
    function: _Function
    id: str = ""


class _Detail(Struct, gc=False):
    text: str | None = None
    summary: str | None = None


class _Message(Struct, gc=False):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: list[_Detail] | None = None
    function_call: None = None


class _Choice(Struct, gc=False, kw_only=True):
    index: int = 0
    message: _Message
    finish_reason: FinishReason
    error: None = None


class _UsualAnswer(Struct, gc=False, kw_only=True):
    id: str = ""
    model: str = ""
    choices: tuple[_Choice]
    usage: WireUsage
    error: None = None
    cost: Any = None


# Fields stand in the order in which servers send them: msgspec looks for the next one first.
decode_usual = msgspec.json.Decoder(_UsualAnswer).decode


def told_calls(calls: list[_ToolCall]) -> tuple[ToolCall, ...]:
    """Turn calls of functions into ours."""
    return tuple([ToolCall(id=c.id, name=c.function.name, arguments=c.function.arguments) for c in calls])


def told(details: list[_Detail]) -> str | None:
    """The thinking where its details alone tell it; OpenRouter's are often encrypted."""
    return "".join([detail.text or detail.summary or "" for detail in details]) or None
