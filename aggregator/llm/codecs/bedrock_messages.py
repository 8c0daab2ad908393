"""OpenAI-shaped messages and tools in the words of Bedrock's Converse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.errors import ConfigError
from aggregator.llm.codecs.wire import json_object, read
from aggregator.llm.messages import as_data
from aggregator.llm.openings import Mark
from aggregator.llm.schemas import UNENFORCED, closed

_CHOICES = {"auto": "auto", "required": "any", "any": "any"}
_CACHE_POINT: dict[str, Any] = {"cachePoint": {"type": "default"}}


class _OwnMessage(Struct, frozen=True, gc=False):
    content: list[dict[str, Any]] = []


class _OwnOutput(Struct, frozen=True, gc=False):
    message: _OwnMessage = _OwnMessage()


class _Own(Struct, gc=False):
    output: _OwnOutput = _OwnOutput()


_OWN = msgspec.json.Decoder(_Own)


def system_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the system prompt as blocks; None if there is none."""
    system = [message for message in messages if message["role"] in ("system", "developer")]
    return [block for message in system for block in _blocks(message.get("content"), "$.system")] or None


def messages_of(messages: Sequence[Mapping[str, Any]], mark: Mark | None = None) -> list[dict[str, Any]]:
    """Return the conversation. Turns of one role in a row become one, since this API wants roles to alternate.

    The opening that ends at `mark` is followed by a cache point.

    >>> messages_of([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    [{'role': 'user', 'content': [{'text': 'a'}, {'text': 'b'}]}]
    """
    turns: list[dict[str, Any]] = []
    for position, message in enumerate(messages):
        where = f"$.messages[{position}]"
        role = message["role"]
        if role in ("system", "developer"):
            continue
        if mark is not None and mark.message == position:
            blocks = _marked(str(message["content"]), mark.length)
        elif role in ("tool", "function"):
            role, blocks = "user", [_tool_result(message, where)]
        elif role == "assistant":
            blocks = _assistant(message, where)
        else:
            role, blocks = "user", _blocks(message.get("content"), where)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return turns


def _marked(text: str, length: int) -> list[dict[str, Any]]:
    return [{"text": text[:length]}, _CACHE_POINT, {"text": text[length:]}]


def _assistant(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    blocks = _blocks(message.get("content"), where)
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        arguments = json_object(function.get("arguments"))
        blocks.append({"toolUse": {"toolUseId": call.get("id"), "name": function.get("name"), "input": arguments}})
    source = getattr(message, "source", None)
    if source is None:
        return blocks
    own = read(source, _OWN).output.message.content
    return own if _said(own) == _said(blocks) else blocks  # signed thinking is not that of a changed message


def _said(blocks: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]]:
    """Return the text and the calls of blocks."""
    texts = [text for block in blocks if isinstance(text := block.get("text"), str)]
    uses = [use for block in blocks if isinstance(use := block.get("toolUse"), Mapping)]
    return "".join(texts), [(use.get("toolUseId"), use.get("input")) for use in uses]


def _tool_result(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    call_id = message.get("tool_call_id") or message.get("name")
    content = _blocks(message.get("content"), where) or [{"text": " "}]  # an empty result is refused
    return {"toolResult": {"toolUseId": call_id, "content": content}}


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    """Return content as blocks. A blank text is left out, since the API refuses one; cache marks become blocks."""
    blocks: list[dict[str, Any]] = []
    parts: Sequence[Mapping[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts or ():
        kind = part["type"]
        if kind == "text":
            blocks += [{"text": part["text"]}] if part.get("text", "").strip() else []
        elif kind == "image_url":
            blocks.append({"image": _image(part["image_url"]["url"], where)})
        elif kind in part:
            blocks.append({kind: part[kind]})  # a block of this API: document, video, guardContent, cachePoint
        else:
            raise ConfigError(
                f"Expected a part of type text or image_url, or a block of Converse as {{'type': {kind!r}, {kind!r}: "
                f"{{…}}}}, got {part!r} - at {where}"
            )
        if blocks and part.get("cache_control"):
            blocks.append(_CACHE_POINT)
    return blocks


def _image(url: str, where: str) -> dict[str, Any]:
    data = as_data(url)
    if data is None:
        raise ConfigError(f"Expected an image as bytes, since Bedrock fetches no address, got {url!r} - at {where}")
    kind = data[0].rpartition("/")[2].replace("jpg", "jpeg")
    return {"format": kind, "source": {"bytes": data[1]}}


def tool_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a function as this API's tool; a tool of its own stays as it is.

    >>> tool_of({"type": "function", "function": {"name": "f"}})
    {'toolSpec': {'name': 'f', 'inputSchema': {'json': {'type': 'object', 'properties': {}}}}}
    """
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return tool
    named = {name: value for name in ("name", "description") if (value := function.get(name)) is not None}
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    return {"toolSpec": {**named, "inputSchema": {"json": schema}}}


def tool_choice_of(choice: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return OpenAI's `tool_choice` in this API's words; one that is in them already stays as it is.

    >>> tool_choice_of("required")
    {'any': {}}
    """
    if isinstance(choice, str):
        if choice not in _CHOICES:
            raise ConfigError(f"Expected tool_choice of auto, required or a function for bedrock, got {choice!r}")
        return {_CHOICES[choice]: {}}
    function = choice.get("function")
    return {"tool": {"name": function.get("name")}} if isinstance(function, Mapping) else choice


def output_config_of(wanted: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the schema that the answer must fit, as a text, which this API wants; None for any other format."""
    if wanted is None or wanted.get("type") != "json_schema":
        return None
    stated = wanted.get("json_schema") or {}
    text = msgspec.json.encode(closed(stated.get("schema", {}), UNENFORCED)).decode()
    schema = {"name": stated.get("name", "answer"), "schema": text}
    return {"textFormat": {"type": "json_schema", "structure": {"jsonSchema": schema}}}
