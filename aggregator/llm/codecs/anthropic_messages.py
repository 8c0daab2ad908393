"""OpenAI-shaped messages and tools in Anthropic's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.errors import ConfigError
from aggregator.llm.codecs.wire import json_object, read
from aggregator.llm.messages import as_data
from aggregator.llm.openings import Mark

_CHOICES = {"auto": "auto", "required": "any", "any": "any", "none": "none"}


class _Own(Struct, gc=False):
    content: list[dict[str, Any]] = []


_OWN = msgspec.json.Decoder(_Own)


def system_of(messages: Sequence[Mapping[str, Any]]) -> str | list[dict[str, Any]] | None:
    """The system prompt, which stands apart here: one text as it is, several (or parts) as blocks, in order."""
    contents = [message.get("content") for message in messages if message["role"] in ("system", "developer")]
    if len(contents) == 1 and isinstance(contents[0], str):
        return contents[0] or None
    return [block for content in contents for block in _blocks(content)] or None


def messages_of(messages: Sequence[Mapping[str, Any]], mark: Mark | None = None) -> list[dict[str, Any]]:
    """The conversation; results of one turn's tools go into one user message, as the API demands.

    The opening that ends at `mark` is marked to be cached.

    >>> messages_of([{"role": "tool", "tool_call_id": "a", "content": "1"}, {"role": "tool", "tool_call_id": "b",
    ...     "content": "2"}])[0]["content"][1]
    {'type': 'tool_result', 'tool_use_id': 'b', 'content': '2'}
    """
    turns: list[dict[str, Any]] = []
    results: list[dict[str, Any]] | None = None
    for position, message in enumerate(messages):
        role = message["role"]
        if role in ("system", "developer"):
            continue
        if role in ("tool", "function"):
            if results is None:
                results = []
                turns.append({"role": "user", "content": results})
            results.append(_tool_result(message))
            continue
        results = None
        if mark is not None and mark.message == position:
            turns.append({"role": role, "content": _marked(str(message["content"]), mark.length)})
        elif role == "assistant":
            turns.append({"role": "assistant", "content": _assistant(message)})
        else:
            content = message.get("content")
            turns.append({"role": "user", "content": content if isinstance(content, str) else _blocks(content)})
    return turns


def _marked(text: str, length: int) -> list[dict[str, Any]]:
    opening = {"type": "text", "text": text[:length], "cache_control": {"type": "ephemeral"}}
    return [opening, {"type": "text", "text": text[length:]}]


def _assistant(message: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    content, calls, source = message.get("content"), message.get("tool_calls"), getattr(message, "source", None)
    if isinstance(content, str) and not calls and source is None:
        return content
    blocks = _blocks(content)
    for call in calls or ():
        function = call.get("function") or {}
        arguments = json_object(function.get("arguments"))
        blocks.append({"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": arguments})
    return blocks if source is None else _as_it_came(source, blocks)


def _as_it_came(source: bytes, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks that an answer of this API came in, each in its place: signed thinking may not be moved or left out.

    `blocks` where they say something else, since what was signed is no part of a message that was changed.
    """
    own = read(source, _OWN).content
    return [block for block in own if not _is_empty(block)] if _said(own) == _said(blocks) else blocks


def _said(blocks: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]]:
    texts = [text for block in blocks if block.get("type") == "text" and isinstance(text := block.get("text"), str)]
    calls = [(block.get("id"), block.get("input")) for block in blocks if block.get("type") == "tool_use"]
    return "".join(texts), calls


def _is_empty(block: Mapping[str, Any]) -> bool:
    return block.get("type") == "text" and not block.get("text")


def _tool_result(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    block = {"type": "tool_result", "tool_use_id": message.get("tool_call_id") or message.get("name")}
    return {**block, "content": content if isinstance(content, str) else _blocks(content)}


def _blocks(content: Any) -> list[dict[str, Any]]:
    """Content as blocks; an empty text is left out, since the API refuses one."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [_block(part) for part in content or ()]


def _block(part: Mapping[str, Any]) -> dict[str, Any]:
    """One part as a block; what is already a block of this API stays as it is."""
    if part["type"] != "image_url":
        return dict(part)
    url = part["image_url"]["url"]
    data = as_data(url)
    source = {"type": "base64", "media_type": data[0], "data": data[1]} if data else {"type": "url", "url": url}
    return {"type": "image", "source": source} | ({"cache_control": c} if (c := part.get("cache_control")) else {})


def tool_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function as this API's tool; a tool of the provider's own stays as it is."""
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return tool
    named = {"name": function.get("name"), "description": function.get("description")}
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    return {**{name: value for name, value in named.items() if value is not None}, "input_schema": schema}


def tool_choice_of(choice: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI's `tool_choice`; one that is already of this API stays as it is.

    >>> tool_choice_of("required")
    {'type': 'any'}
    """
    if isinstance(choice, str):
        if choice not in _CHOICES:
            raise ConfigError(f"Expected tool_choice of auto, required, none or a function, got {choice!r}")
        return {"type": _CHOICES[choice]}
    function = choice.get("function")
    return {"type": "tool", "name": function.get("name")} if isinstance(function, Mapping) else choice
