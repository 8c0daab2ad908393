"""OpenAI-shaped messages and tools in Gemini's words."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from aggregator.errors import ConfigError
from aggregator.llm.codecs.wire import json_object
from aggregator.llm.messages import as_data, text_of

_MODES = {"auto": "AUTO", "required": "ANY", "any": "ANY", "none": "NONE"}
_SIGNING = re.compile(r"gemini-(?:[3-9]|\d\d)")
# Models from Gemini 3 on refuse a function call without its signature; this is the documented stand-in where the
# call was made by another model or the caller's history lost it.
_NO_SIGNATURE = "skip_thought_signature_validator"


def system_of(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The system prompt, which stands apart here, one part for each message."""
    texts = [text_of(message.get("content")) for message in messages if message["role"] in ("system", "developer")]
    parts = [{"text": text} for text in texts if text]
    return {"parts": parts} if parts else None


def contents_of(messages: Sequence[Mapping[str, Any]], model: str) -> list[dict[str, Any]]:
    """The conversation; the results of one turn's tools go into one content.

    >>> contents_of([{"role": "user", "content": "Hi"}], "gemini-2.5-flash")
    [{'role': 'user', 'parts': [{'text': 'Hi'}]}]
    """
    contents: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # a result names its function here, not the call
    for message in messages:
        role = message["role"]
        if role in ("system", "developer"):
            continue
        if role in ("tool", "function"):
            part = _result(message, names)
            if contents and "functionResponse" in contents[-1]["parts"][-1]:
                contents[-1]["parts"].append(part)
            else:
                contents.append({"role": "user", "parts": [part]})
            continue
        parts = _parts(message.get("content"))
        for call in message.get("tool_calls") or ():
            function = call.get("function") or {}
            names[str(call.get("id"))] = str(function.get("name"))
            parts.append(_call(call, model))
        contents.append({"role": "model" if role == "assistant" else "user", "parts": parts or [{"text": ""}]})
    return contents


def _call(call: Mapping[str, Any], model: str) -> dict[str, Any]:
    function = call.get("function") or {}
    made: dict[str, Any] = {"name": function.get("name"), "args": json_object(function.get("arguments"))}
    part: dict[str, Any] = {"functionCall": made}
    google = (call.get("extra_content") or {}).get("google") or {}  # as Google's own OpenAI-compatible API has it
    if google.get("thought_signature"):
        part["thoughtSignature"] = google["thought_signature"]
    elif _SIGNING.search(model):
        part["thoughtSignature"] = _NO_SIGNATURE
    return part


def _result(message: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tool's result; the API wants an object, so a text that is none stands under `result`."""
    text = text_of(message.get("content"))
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        value = text
    name = message.get("name") or names.get(str(message.get("tool_call_id"))) or str(message.get("tool_call_id"))
    return {"functionResponse": {"name": name, "response": value if isinstance(value, dict) else {"result": value}}}


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"text": content}] if content else []
    return [_part(part) for part in content or ()]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """One part; what is already a part of this API stays as it is, without the `type` it has not."""
    if part["type"] == "text":
        return {"text": part.get("text") or ""}
    if part["type"] != "image_url":
        return {name: value for name, value in part.items() if name != "type"}
    url = part["image_url"]["url"]
    data = as_data(url)
    if data:
        return {"inlineData": {"mimeType": data[0], "data": data[1]}}
    kind = mimetypes.guess_type(url.partition("?")[0])[0] or "image/jpeg"
    return {"fileData": {"fileUri": url, "mimeType": kind}}


def tools_of(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    """Functions as declarations; tools of the provider's own stay as they are."""
    if not tools:
        return None
    declared = [_declaration(tool["function"]) for tool in tools if isinstance(tool.get("function"), Mapping)]
    own = [tool for tool in tools if not isinstance(tool.get("function"), Mapping)]
    return [*([{"functionDeclarations": declared}] if declared else []), *own]


def _declaration(function: Mapping[str, Any]) -> dict[str, Any]:
    declared = {
        "name": function.get("name"),
        "description": function.get("description"),
        "parametersJsonSchema": function.get("parameters"),
    }
    return {name: value for name, value in declared.items() if value is not None}


def tool_config_of(choice: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI's `tool_choice`; one that is already of this API stays as it is.

    >>> tool_config_of({"type": "function", "function": {"name": "f"}})
    {'functionCallingConfig': {'mode': 'ANY', 'allowedFunctionNames': ['f']}}
    """
    if isinstance(choice, str):
        if choice not in _MODES:
            raise ConfigError(f"Expected tool_choice of auto, required, none or a function, got {choice!r}")
        return {"functionCallingConfig": {"mode": _MODES[choice]}}
    function = choice.get("function")
    if not isinstance(function, Mapping):
        return choice
    return {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": [function.get("name")]}}
