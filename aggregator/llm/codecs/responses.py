"""OpenAI's Responses API, whole answers and streams: our calls to its items, its items to our answers.

Built against recorded exchanges of OpenAI, Azure, xAI, DeepSeek, Bedrock, ChatGPT's Codex backend and mistral.rs. The
server stores nothing: `store` is false for models of OpenAI and xAI, and reasoning is encrypted and sent back with the
next turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from aggregator.errors import APIStatusError, ConfigError, LLMError, ResponseError
from aggregator.llm.calls import ChatCall, Target
from aggregator.llm.codecs.base import CompletingCodec, Event, EventReader, JSONCodec, words
from aggregator.llm.codecs.failures import fault_in_event, request_id
from aggregator.llm.codecs.openai import OpenAIChat
from aggregator.llm.codecs.wire import read, with_rest
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, ToolCall, Usage

CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
"""The kinds of calls, with the field of the model's text."""

_CHOICES = ("auto", "required", "none")
_NO_PARAMETERS = {"type": "object", "properties": {}}


# ---- messages -> request


class _Own(Struct, gc=False):
    output: list[dict[str, Any]] = []


_OWN = msgspec.json.Decoder(_Own)


def items_of(messages: Sequence[Mapping[str, Any]], address: str = "") -> list[dict[str, Any]]:
    """Return the conversation as input items. Answers from `address` are sent back as their original items.

    Those of another server are converted, because only that server can decrypt their reasoning.

    >>> items_of([{"role": "user", "content": "Hi"}, {"role": "tool", "tool_call_id": "c", "content": "1"}])[1]
    {'type': 'function_call_output', 'call_id': 'c', 'output': '1'}
    """
    items: list[dict[str, Any]] = []
    custom: set[Any] = set()  # the output of a custom tool has another item type
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
    """Return the items of an answer unchanged and in order: encrypted reasoning belongs to the next item.

    `items` if they differ in text or calls, because the reasoning does not match a changed message.
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
    """Return the text of a message item: a text, or parts, of which other kinds are skipped.

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
    """Return one part in this API's format; a part that already has it is returned unchanged."""
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
    """Return a function or custom tool in this API's flat form; a built-in tool of the provider is returned unchanged.

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


_REASONS = re.compile(r"(?:ft:)?(?:o\d|gpt-(?:[5-9]|[12]\d)(?!\d)(?!\S*-chat)|(?:gpt-\S*)?codex|grok-(?:[4-9]|\d\d))")
_KEEPS_NOTHING = re.compile(r"(?:ft:)?(?:gpt-|chatgpt-|grok-)")
_ENCRYPTED = ("reasoning.encrypted_content",)
_PLAIN = "no encrypted reasoning"
_USD_A_TICK = 1e-10  # xAI counts cost in ticks


# ---- reply -> completion


class Item(Struct, gc=False):
    """One item of the output: a message, reasoning, a call, or a kind that is not read."""

    type: Any = None  # Any: an item of an unknown kind may hold anything, and must not affect the others
    content: Any = None
    summary: Any = None
    call_id: Any = None
    name: Any = None
    phase: Any = None
    arguments: Any = None
    input: Any = None


class _InputDetails(Struct, gc=False):
    cached_tokens: int | None = None


class _OutputDetails(Struct, gc=False):
    reasoning_tokens: int | None = None


class WireUsage(Struct, gc=False):
    """Token counts; `input_tokens` includes cached ones, `output_tokens` reasoning."""

    input_tokens: int | None = None
    input_tokens_details: _InputDetails | None = None
    output_tokens: int | None = None
    output_tokens_details: _OutputDetails | None = None
    total_tokens: int | None = None
    cost: Any = None
    cost_in_usd_ticks: int | None = None


class _Incomplete(Struct, gc=False):
    reason: str | None = None


class Answer(Struct, gc=False):
    """A response object; `body` is the JSON of its output if that is not the reply's own."""

    id: str | None = None
    error: Any = None
    incomplete_details: _Incomplete | None = None
    model: str | None = None
    output: list[Item] | None = None
    status: str | None = None
    usage: WireUsage | None = None
    service_tier: str | None = None
    body: msgspec.UnsetType | bytes | None = None


DECODER = msgspec.json.Decoder(Answer)


# ---- streams


class ResponseStream(EventReader):
    """Reads a stream of response events; the deltas are those of the output text.

    The last event holds the whole response. Servers that leave its output empty have sent each item when it was done,
    or the text alone.
    """

    def __init__(self, codec: CompletingCodec, call: ChatCall) -> None:
        super().__init__(codec, call)
        self._items: dict[int, msgspec.Raw] = {}
        self._texts: dict[tuple[int, int], str] = {}
        self._end: bytes | None = None

    def event(self, event: Event) -> str:
        """Process one event and return its text."""
        found = read(event.data, _EVENT_DECODER)
        kind = found.type if isinstance(found.type, str) else event.name
        if kind == "error" or found.error:
            reply = HTTPReply(status=200, body=event.data, headers={})
            raise self.codec.fault(found.error or fault_in_event(event.data), reply)
        place = (found.output_index or 0, found.content_index or 0)
        if kind == "response.output_text.delta":
            self._texts[place] = self._texts.get(place, "") + _text(found.delta)
            return _text(found.delta)
        if kind == "response.output_text.done" and place not in self._texts:  # a server that sends no deltas
            self._texts[place] = _text(found.text)
            return _text(found.text)
        if kind == "response.output_item.done" and bytes(found.item):
            self._items[place[0]] = found.item
        elif kind in _ENDS:
            self._end = bytes(found.response) or None
        return ""

    def whole(self) -> bool:
        """Return True once the event with the whole response has arrived."""
        return self._end is not None

    def build(self, reply: HTTPReply) -> Completion:
        """Read the response of the last event, with the earlier items if it has none."""
        body = self._end or b"{}"
        answer = read(body, DECODER)
        if not answer.output and (self._items or self._texts):
            parts = [{"type": "output_text", "text": text} for _, text in sorted(self._texts.items())]
            items: list[Any] = [item for _, item in sorted(self._items.items())] or [
                {"type": "message", "content": parts}
            ]
            body = msgspec.json.encode({"output": items})
            answer.output = read(body, DECODER).output
        answer.body = body
        return self.codec.completion(answer, reply)


class _Event(Struct, gc=False):
    type: Any = None
    delta: Any = None
    text: Any = None
    output_index: int | None = None
    content_index: int | None = None
    item: msgspec.Raw = msgspec.Raw()
    response: msgspec.Raw = msgspec.Raw()
    error: Any = None


_EVENT_DECODER = msgspec.json.Decoder(_Event)
_ENDS = tuple([f"response.{word}" for word in ("completed", "incomplete", "failed", "cancelled", "done")])


# ---- the codecs


class OpenAIResponses(JSONCodec[Answer]):
    """The codec of the Responses API, bound to one server."""

    decoder = DECODER
    reader = ResponseStream
    finish_words = words(
        stop="completed", length="max_output_tokens max_tokens length incomplete", content_filter="content_filter"
    )
    requests = OpenAIChat.requests
    tokens = OpenAIChat.tokens
    lacks = frozenset({"n", "seed", "stop"})
    corrections = (_PLAIN,)
    limit_fields = ("max_output_tokens", "max_completion_tokens", "max_tokens")
    count_fields = ()
    kept_headers = OpenAIChat.kept_headers

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._url = self.address()

    def address(self) -> str:
        """Return the address of calls."""
        address, question, query = self.target.base_url.partition("?")
        return f"{address.rstrip('/')}/responses{question}{query}"

    def encode(self, call: ChatCall) -> HTTPRequest:
        """Return the request; raises ConfigError for several answers, a seed or stop texts, which this API lacks."""
        self.refuse_lacking(call)
        wanted = call.response_format
        fields: dict[str, Any] = {
            "model": call.model,
            "input": items_of(call.messages, self.target.base_url),
            "max_output_tokens": call.max_tokens,
            "temperature": call.temperature,
            "top_p": call.top_p,
            "text": None if wanted is None else {"format": format_of(wanted)},
            "tools": None if call.tools is None else [tool_of(tool) for tool in call.tools],
            "tool_choice": None if call.tool_choice is None else tool_choice_of(call.tool_choice),
            "stream": call.stream or None,
            **_memory(call),
        }
        body = {name: value for name, value in fields.items() if value is not None}
        if call.extra:
            body = _with_extra(body, call.extra)
        if body.get("background") and not call.stream:
            raise ConfigError(
                "Expected no background=True in extra, got it: such an answer has to be fetched later. Ask without it, "
                "with a longer timeout, or stream"
            )
        return self.post(self._url, body, call)

    def corrected(self, call: ChatCall, error: APIStatusError) -> ChatCall | None:
        """Obey a refusal to encrypt reasoning, by a model that does not reason although its name looks like it."""
        if "encrypted content is not supported" not in error.message.lower():
            return None
        return replace(call, corrections=call.corrections | {_PLAIN})

    def completion(self, answer: Answer, reply: HTTPReply) -> Completion:
        """Convert a parsed response to a Completion; raises LLMError if it failed or is not finished."""
        status, output = answer.status, answer.output
        if answer.error or output is None or status not in (None, "completed", "incomplete"):
            raise self._failure(answer, reply)
        message = _message(output, answer.body or reply.body, self.target.base_url)
        word = (answer.incomplete_details and answer.incomplete_details.reason) or status
        reason = self.finish_reason(word)
        if message.tool_calls and reason == "stop":
            reason = "tool_calls"
        choice = Choice(message=message, finish_reason=reason, raw_finish_reason=word)
        usage = _usage(answer.usage or WireUsage())
        tier = answer.service_tier
        return self.completed(reply, [choice], usage=usage, model=answer.model, answer_id=answer.id, service_tier=tier)

    def _failure(self, answer: Answer, reply: HTTPReply) -> LLMError:
        """Return the error of a response that failed, was cancelled or is not finished."""
        if answer.error:
            return self.fault(answer.error, reply)
        if answer.status in (None, "completed", "incomplete", "failed"):
            return self.empty("a response with output", reply)
        return ResponseError(
            f"Expected a completed response from {self.target.provider}, got one that is {answer.status}",
            status=reply.status,
            code=answer.status,
            request_id=request_id(reply.headers),
        )


class AzureResponses(OpenAIResponses):
    """The codec of the Responses API on Azure; the model's name is the deployment's, and is sent only in the body."""

    def address(self) -> str:
        """Return the address of calls: the `/openai/v1` API, or the older one under an api-version."""
        address, _, query = self.target.base_url.partition("?")
        resource = re.sub(r"/(?:openai(?:/.*)?|models)$", "", address.rstrip("/"))
        version = self.target.options.get("api_version")
        if not query and version:
            query = f"api-version={quote(str(version))}"
        if address.rstrip("/").endswith("/openai/v1") or not query:
            return f"{resource}/openai/v1/responses"
        return f"{resource}/openai/responses?{query}"


def _memory(call: ChatCall) -> dict[str, Any]:
    """Return the fields that request reasoning instead of storing it on the server.

    A model of an unknown name keeps the server's defaults: a model that does not reason refuses the encrypted form, and
    without it a server that stores nothing could not find the reasoning again.
    """
    if _REASONS.match(call.model) and _PLAIN not in call.corrections:
        return {"store": False, "include": _ENCRYPTED}
    return {"store": False} if _KEEPS_NOTHING.match(call.model) else {}


def _with_extra(body: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the user's own fields into the body; those of chat completions are renamed.

    >>> _with_extra({"text": {"format": {}}}, {"verbosity": "low", "reasoning_effort": "high"})
    {'text': {'format': {}, 'verbosity': 'low'}, 'reasoning': {'effort': 'high'}}
    """
    given = dict(extra)
    for old, (field, name) in {"reasoning_effort": ("reasoning", "effort"), "verbosity": ("text", "verbosity")}.items():
        if old in given:
            given[field] = {name: given.pop(old), **(given.get(field) or {})}
    for old in ("max_completion_tokens", "max_tokens"):
        if old in given:
            given.setdefault("max_output_tokens", given.pop(old))
    if isinstance(given.get("text"), Mapping):
        given["text"] = {**body.get("text", {}), **given["text"]}
    return {**body, **given}


def _message(output: list[Item], body: bytes, address: str) -> Message:
    """Return the items as one message. Several messages (a commentary, then the answer) become one text."""
    texts: list[str] = []
    refusals: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    other: dict[str, None] = {}
    for item in output:
        kind = _text(item.type or "message")
        if kind == "message":
            texts.append(output_text(item.content))
            refusals.append(_texts(item.content, "refusal"))
        elif kind in CALLS:
            given = getattr(item, CALLS[kind])
            arguments = given if isinstance(given, str) else msgspec.json.encode(given or {}).decode()
            calls.append(ToolCall(id=_text(item.call_id), name=_text(item.name), arguments=arguments))
        elif kind != "reasoning":
            other[kind] = None
        else:
            thoughts.append(_texts(item.content, "text") or _texts(item.summary, "text"))
    is_plain = len(output) == 1 and bool(texts) and output[0].phase is None and not any(refusals)
    return Message(
        content="".join(texts) if any(texts) or (texts and not calls) else None,
        reasoning="\n\n".join(filter(None, thoughts)) or None,
        tool_calls=tuple(calls),
        refusal="".join(refusals) or None,
        source=None if is_plain else body,
        other=tuple(other),
        origin=None if is_plain else address,
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _texts(parts: Any, name: str) -> str:
    """Join one field of all parts that have it."""
    found = [part.get(name) for part in (parts if isinstance(parts, list) else ()) if isinstance(part, dict)]
    return "".join(map(_text, found))


def _usage(usage: WireUsage) -> Usage:
    given, answered = usage.input_tokens_details, usage.output_tokens_details
    cost = float(usage.cost) if type(usage.cost) in (int, float) else None
    if cost is None and usage.cost_in_usd_ticks is not None:
        cost = usage.cost_in_usd_ticks * _USD_A_TICK
    return Usage(
        input_tokens=usage.input_tokens,
        output_tokens=with_rest(usage.output_tokens, usage.input_tokens, usage.total_tokens),
        cached_tokens=None if given is None else given.cached_tokens,
        reasoning_tokens=None if answered is None else answered.reasoning_tokens,
        cost=cost,
    )
