"""OpenAI-shaped messages, tools and formats as the items of the Responses API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.errors import ConfigError
from aggregator.llm.codecs.wire import read

CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
"""The kinds of calls, with the field that holds what the model wrote."""

_CHOICES = ("auto", "required", "none")
_NO_PARAMETERS = {"type": "object", "properties": {}}


class _Own(Struct, gc=False):
    output: list[dict[str, Any]] = []


_OWN = msgspec.json.Decoder(_Own)


def items_of(messages: Sequence[Mapping[str, Any]], address: str = "") -> list[dict[str, Any]]:
    """Return the conversation as input items. Answers from `address` go back as the items that they came in.

    Those of another server do not: it alone can decrypt their reasoning.

    >>> items_of([{"role": "user", "content": "Hi"}, {"role": "tool", "tool_call_id": "c", "content": "1"}])[1]
    {'type': 'function_call_output', 'call_id': 'c', 'output': '1'}
    """
    items: list[dict[str, Any]] = []
    custom: set[Any] = set()  # the output of a custom tool has a kind of its own
    for message in messages:
        role = message["role"]
        if role == "assistant":
            own = _assistant(message, address)
            custom |= {item.get("call_id") for item in own if item.get("type") == "custom_tool_call"}
            items += own
        elif role in ("tool", "function"):
            call_id = message.get("tool_call_id") or message.get("name")
            kind = "custom_tool_call_output" if call_id in custom else "function_call_output"
            items.append({"type": kind, "call_id": call_id, "output": _content(message, "input_text")})
        else:
            items.append({"role": role, "content": _content(message, "input_text")})
    return items


def _assistant(message: Mapping[str, Any], address: str) -> list[dict[str, Any]]:
    content = _content(message, "output_text")
    items: list[dict[str, Any]] = [{"role": "assistant", "content": content}] if content else []
    items += [_call(call) for call in message.get("tool_calls") or ()]
    source = getattr(message, "source", None)
    if source is None or getattr(message, "origin", None) not in (None, address):
        return items
    return _as_it_came(source, items)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    custom, function = call.get("custom"), call.get("function") or {}
    if isinstance(custom, Mapping):
        kind = {"type": "custom_tool_call", "name": custom.get("name"), "input": custom.get("input") or ""}
    else:
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = "" if arguments is None else msgspec.json.encode(arguments).decode()
        kind = {"type": "function_call", "name": function.get("name"), "arguments": arguments}
    return {**kind, "call_id": call.get("id")}


def _as_it_came(source: bytes, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the items of an answer unchanged and in their order: encrypted reasoning belongs to what follows it.

    `items` if they differ in text or calls, since the reasoning is not that of a changed message.
    """
    own = read(source, _OWN).output
    return own if _said(own) == _said(items) else items


def _said(items: Iterable[Mapping[str, Any]]) -> tuple[str, list[Any]]:
    """Return the text and the calls of items."""
    texts: list[str] = []
    calls: list[Any] = []
    for item in items:
        kind = item.get("type") or "message"
        if kind == "message":
            texts.append(output_text(item.get("content")))
        elif isinstance(kind, str) and kind in CALLS:
            calls.append((item.get("call_id"), item.get(CALLS[kind])))
    return "".join(texts), calls


def output_text(content: Any) -> str:
    """Return the text of a message item: a text, or parts of which those of another kind are skipped.

    >>> output_text([{"type": "output_text", "text": "4"}, {"type": "refusal", "refusal": "No."}])
    '4'
    """
    if isinstance(content, str):
        return content
    return "".join(
        [
            text
            for part in (content if isinstance(content, list) else ())
            if isinstance(part, dict)
            and part.get("type", "text") in ("output_text", "text")
            and isinstance(text := part.get("text"), str)
        ]
    )


def _content(message: Mapping[str, Any], text_kind: str) -> str | list[dict[str, Any]]:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return [_part(part, text_kind) for part in content]


def _part(part: Mapping[str, Any], text_kind: str) -> dict[str, Any]:
    """Return one part in this API's words; a part that already is in them stays as it is."""
    kind = part["type"]
    if kind == "text":
        return {"type": text_kind, "text": part.get("text", "")}
    if kind == "image_url":
        image = part["image_url"]
        detail = {"detail": image["detail"]} if image.get("detail") else {}
        return {"type": "input_image", "image_url": image.get("url"), **detail}
    if kind == "file" and isinstance(part.get("file"), Mapping):
        return {"type": "input_file", **part["file"]}
    return dict(part)


def tool_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a function or custom tool in this API's flat form; a tool of the provider's own stays as it is.

    `strict` is sent as False unless given: this API turns it on by default, chat completions does not.

    >>> tool_of({"type": "function", "function": {"name": "f"}})["strict"]
    False
    """
    function, custom = tool.get("function"), tool.get("custom")
    if isinstance(function, Mapping):
        parameters = function.get("parameters") or _NO_PARAMETERS
        return {"type": "function", **function, "parameters": parameters, "strict": bool(function.get("strict"))}
    if isinstance(custom, Mapping):
        form = custom.get("format")
        grammar = form.get("grammar") if isinstance(form, Mapping) else None
        flat = {"format": {"type": "grammar", **grammar}} if isinstance(grammar, Mapping) else {}
        return {"type": "custom", **custom, **flat}
    return tool


def tool_choice_of(choice: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Return OpenAI's `tool_choice` in this API's flat form.

    >>> tool_choice_of({"type": "function", "function": {"name": "f"}})
    {'type': 'function', 'name': 'f'}
    """
    if isinstance(choice, str):
        choice = "required" if choice == "any" else choice
        if choice not in _CHOICES:
            raise ConfigError(f"Expected tool_choice of auto, required, none or a function, got {choice!r}")
        return choice
    kind = str(choice.get("type"))
    inner = choice.get(kind)
    if not isinstance(inner, Mapping):
        return choice
    if kind == "allowed_tools":
        return {"type": kind, **inner, "tools": [tool_choice_of(tool) for tool in inner.get("tools") or ()]}
    return {"type": kind, **inner}


def format_of(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return OpenAI's `response_format` as `text.format`.

    >>> format_of({"type": "json_schema", "json_schema": {"name": "n", "schema": {}}})
    {'type': 'json_schema', 'name': 'n', 'schema': {}}
    """
    stated = wanted.get("json_schema")
    return {"type": wanted["type"], **(stated if isinstance(stated, Mapping) else {})}
