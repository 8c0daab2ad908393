"""Gemini's generateContent, as AI Studio and Vertex AI serve it: contents and tools, whole answers and streams."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct, field

from aggregator.errors import ConfigError, ContentFilterError, LLMError
from aggregator.llm.calls import ChatCall
from aggregator.llm.codecs.base import CompletingCodec, Event, EventReader, JSONCodec, words
from aggregator.llm.codecs.failures import request_id
from aggregator.llm.codecs.wire import fit, json_object, parse, read, with_rest
from aggregator.llm.messages import as_data, text_of
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, ToolCall, Usage

_MODES = {"auto": "AUTO", "required": "ANY", "any": "ANY", "none": "NONE"}
_SIGNING = re.compile(r"gemini-(?:[3-9]|\d\d)")
# Models from Gemini 3 on refuse a function call without its signature; this is the documented placeholder for calls
# made by another model or without their signature.
_NO_SIGNATURE = "skip_thought_signature_validator"


# ---- messages -> request


def system_of(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the system prompt, a separate field in this API, with one part for each message."""
    texts = [text_of(message.get("content")) for message in messages if message["role"] in ("system", "developer")]
    parts = [{"text": text} for text in texts if text]
    return {"parts": parts} if parts else None


def contents_of(messages: Sequence[Mapping[str, Any]], model: str) -> list[dict[str, Any]]:
    """Return the conversation; tool results of one turn share one content.

    >>> contents_of([{"role": "user", "content": "Hi"}], "gemini-2.5-flash")
    [{'role': 'user', 'parts': [{'text': 'Hi'}]}]
    """
    contents: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # here a result names its function, not the call
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
    google = (call.get("extra_content") or {}).get("google") or {}  # as in Google's own OpenAI-compatible API
    if google.get("thought_signature"):
        part["thoughtSignature"] = google["thought_signature"]
    elif _SIGNING.search(model):
        part["thoughtSignature"] = _NO_SIGNATURE
    return part


def _result(message: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a tool's result; the API requires an object, so any other text is stored under `result`."""
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
    """Return one part; a part in this API's format is returned unchanged, without `type`."""
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
    """Return functions as declarations; the provider's own tools are unchanged."""
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
    """Return OpenAI's `tool_choice` for this API; one in its format is returned unchanged.

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


_NUMBERS = {  # Vertex with enum-encoding
    0: "FINISH_REASON_UNSPECIFIED",
    1: "STOP",
    2: "MAX_TOKENS",
    3: "SAFETY",
    4: "RECITATION",
    5: "OTHER",
    6: "BLOCKLIST",
    7: "PROHIBITED_CONTENT",
    8: "SPII",
    9: "MALFORMED_FUNCTION_CALL",
    10: "MODEL_ARMOR",
}


# ---- reply -> completion


class _Call(Struct, gc=False):
    id: str | None = None
    name: str | None = None
    args: Any = None


class _Part(Struct, gc=False):
    text: str | None = None
    thought: Any = None
    functionCall: _Call | None = None  # noqa: N815 - the API's own names here and below
    thoughtSignature: str | None = None  # noqa: N815
    inlineData: msgspec.Raw = msgspec.Raw()  # noqa: N815
    fileData: msgspec.Raw = msgspec.Raw()  # noqa: N815
    executableCode: msgspec.Raw = msgspec.Raw()  # noqa: N815
    codeExecutionResult: msgspec.Raw = msgspec.Raw()  # noqa: N815


_OTHER = ("inlineData", "fileData", "executableCode", "codeExecutionResult")


class _Content(Struct, gc=False):
    parts: list[_Part] | None = None


class _Candidate(Struct, gc=False):
    content: _Content | None = None
    finishReason: str | int | None = None  # noqa: N815
    finishMessage: str | None = None  # noqa: N815
    index: int | None = None


class _Feedback(Struct, gc=False):
    blockReason: str | int | None = None  # noqa: N815
    blockReasonMessage: str | None = None  # noqa: N815


class _Usage(Struct, gc=False):
    promptTokenCount: int | None = None  # noqa: N815
    candidatesTokenCount: int | None = None  # noqa: N815
    thoughtsTokenCount: int | None = None  # noqa: N815
    cachedContentTokenCount: int | None = None  # noqa: N815
    toolUsePromptTokenCount: int | None = None  # noqa: N815
    totalTokenCount: int | None = None  # noqa: N815


class Answer(Struct, gc=False):
    """A whole answer, or one chunk of a stream."""

    candidates: list[_Candidate] | None = None
    promptFeedback: _Feedback | None = None  # noqa: N815
    usageMetadata: _Usage | None = None  # noqa: N815
    modelVersion: str | None = None  # noqa: N815
    responseId: str | None = None  # noqa: N815
    error: Any = None


_DECODER = msgspec.json.Decoder(Answer)


# ---- streams


class _Growing(Struct, gc=False):
    parts: list[_Part] = field(default_factory=list)
    finish: str | int | None = None


class GenerateStream(EventReader):
    """Reads a stream of partial answers; the deltas are the first candidate's text, without thoughts."""

    def __init__(self, codec: CompletingCodec, call: ChatCall) -> None:
        super().__init__(codec, call)
        self._answer = Answer()
        self._candidates: dict[int, _Growing] = {}

    def event(self, event: Event) -> str:
        """Process one event and return its text."""
        return self.chunk(read(event.data, _DECODER))

    def chunk(self, chunk: Answer) -> str:
        """Process one partial answer and return its text."""
        if chunk.error:
            raise self.codec.fault(chunk.error, HTTPReply(status=200, body=b"", headers={}))
        self._answer.responseId = chunk.responseId or self._answer.responseId
        self._answer.modelVersion = chunk.modelVersion or self._answer.modelVersion
        self._answer.usageMetadata = chunk.usageMetadata or self._answer.usageMetadata
        self._answer.promptFeedback = chunk.promptFeedback or self._answer.promptFeedback
        text = ""
        for candidate in chunk.candidates or ():
            growing = self._candidates.setdefault(candidate.index or 0, _Growing())
            growing.finish = growing.finish if candidate.finishReason is None else candidate.finishReason
            parts = (candidate.content.parts if candidate.content is not None else None) or []
            growing.parts += parts
            if not candidate.index:
                text += "".join([part.text for part in parts if part.text and not part.thought])
        return text

    def whole(self) -> bool:
        """Return True once every candidate has a finish reason, or the prompt was blocked."""
        if not self._candidates:
            return self._answer.promptFeedback is not None
        return all(candidate.finish is not None for candidate in self._candidates.values())

    def build(self, reply: HTTPReply) -> Completion:
        """Build the answer from the candidates."""
        self._answer.candidates = [
            _Candidate(content=_Content(parts=growing.parts), finishReason=growing.finish, index=index)
            for index, growing in sorted(self._candidates.items())
        ]
        return self.codec.completion(self._answer, reply)


# ---- the codec


class GeminiGenerate(JSONCodec[Answer]):
    """The codec of generateContent, bound to one server; the key is sent in a header, never in the address."""

    decoder = _DECODER
    reader = GenerateStream
    finish_words = words(
        stop="stop finish_reason_unspecified",
        length="max_tokens",
        content_filter="""
            safety recitation language blocklist prohibited_content spii model_armor
            image_safety image_prohibited_content image_recitation""",
        tool_calls="function_call",  # from compatible servers; Gemini itself sends stop
    )
    limit_fields = ("generationConfig.maxOutputTokens",)
    count_fields = ("generationConfig.candidateCount",)

    def url(self, call: ChatCall) -> str:
        """The address for this call."""
        model = call.model if "/" in call.model else f"models/{call.model}"
        method = "streamGenerateContent?alt=sse" if call.stream else "generateContent"
        return f"{self.target.base_url.rstrip('/')}/{model}:{method}"

    def encode(self, call: ChatCall) -> HTTPRequest:
        """Return the request; options that were not set are not sent."""
        fields: dict[str, Any] = {
            "systemInstruction": system_of(call.messages),
            "contents": contents_of(call.messages, call.model),
            "tools": tools_of(call.tools),
            "toolConfig": None if call.tool_choice is None else tool_config_of(call.tool_choice),
            "generationConfig": _generation_config(call),
        }
        body = {name: value for name, value in fields.items() if value is not None}
        extra = dict(call.extra)
        if isinstance(
            more := extra.get("generationConfig"), Mapping
        ):  # adds to our options, and replaces only named ones
            extra["generationConfig"] = {**body.get("generationConfig", {}), **more}
        return self.post(self.url(call), {**body, **extra}, call)

    def decode(self, reply: HTTPReply, call: ChatCall) -> Completion:
        """Read an answer; raises LLMError if the prompt was blocked or no candidate came."""
        if reply.body.lstrip().startswith(b"["):  # a stream requested without alt=sse
            return self._from_array(reply, call)
        return super().decode(reply, call)

    def completion(self, answer: Answer, reply: HTTPReply) -> Completion:
        """Turn a parsed answer into a Completion."""
        if answer.error:
            raise self.fault(answer.error, reply)
        candidates = [c for c in answer.candidates or () if c.content is not None or c.finishReason is not None]
        if not candidates:
            raise self._nothing(answer, reply)
        choices = [self._choice(candidate, i) for i, candidate in enumerate(candidates)]
        usage = _usage(answer.usageMetadata) if answer.usageMetadata is not None else Usage()
        return self.completed(reply, choices, usage=usage, model=answer.modelVersion, answer_id=answer.responseId)

    def _from_array(self, reply: HTTPReply, call: ChatCall) -> Completion:
        reader = GenerateStream(self, call)
        for chunk in parse(reply.body):
            reader.chunk(fit(chunk, Answer))
        return reader.build(reply)

    def _nothing(self, answer: Answer, reply: HTTPReply) -> LLMError:
        feedback = answer.promptFeedback
        if feedback is None or feedback.blockReason is None:
            return self.empty("candidates", reply)
        reason = str(feedback.blockReason)
        detail = f": {feedback.blockReasonMessage}" if feedback.blockReasonMessage else ""
        return ContentFilterError(
            f"{self.target.provider} blocked the prompt ({reason}){detail}; change the prompt or the filter",
            code=reason,
            status=reply.status,
            request_id=request_id(reply.headers),
        )

    def _choice(self, candidate: _Candidate, position: int) -> Choice:
        word = candidate.finishReason
        parts = (candidate.content.parts if candidate.content is not None else None) or ()
        texts = [part.text for part in parts if part.text and not part.thought]
        thoughts = [part.text for part in parts if part.text and part.thought]
        calls = _tool_calls(parts)
        return Choice(
            message=Message(
                content="".join(texts) if texts else None,
                reasoning="".join(thoughts) if thoughts else None,
                tool_calls=calls,
                other=tuple([kind for kind in _OTHER if any(getattr(part, kind) for part in parts)]),
            ),
            finish_reason=self.finish_reason(_NUMBERS.get(word, "OTHER") if isinstance(word, int) else word),
            raw_finish_reason=None if word is None else str(word),
            index=position if candidate.index is None else candidate.index,
        )


def _generation_config(call: ChatCall) -> dict[str, Any] | None:
    config: dict[str, Any] = {
        "maxOutputTokens": call.max_tokens,
        "temperature": call.temperature,
        "topP": call.top_p,
        "candidateCount": call.n,
        "seed": call.seed,
        "stopSequences": [call.stop] if isinstance(call.stop, str) else call.stop,
    }
    wanted = call.response_format or {}
    if wanted.get("type") in ("json_object", "json_schema"):
        config["responseMimeType"] = "application/json"
    if wanted.get("type") == "json_schema":
        config["responseJsonSchema"] = (wanted.get("json_schema") or {}).get("schema")
    return {name: value for name, value in config.items() if value is not None} or None


def _tool_calls(parts: Sequence[_Part]) -> tuple[ToolCall, ...]:
    """Return the function calls; those without an id get one that is unique within their turn."""
    signed = [(part.functionCall, part.thoughtSignature) for part in parts if part.functionCall is not None]
    return tuple(
        [
            ToolCall(
                id=call.id or f"call_{i}",
                name=call.name or "",
                arguments=msgspec.json.encode({} if call.args is None else call.args).decode(),
                signature=signature,
            )
            for i, (call, signature) in enumerate(signed)
        ]
    )


def _usage(usage: _Usage) -> Usage:
    """Return the usage; the API counts thinking separately from candidates, and its tools' results from the prompt."""
    given, answered, thought = usage.promptTokenCount, usage.candidatesTokenCount, usage.thoughtsTokenCount
    if given is not None:
        given += max(usage.toolUsePromptTokenCount or 0, 0)
    output = None if answered is None and thought is None else (answered or 0) + max(thought or 0, 0)
    return Usage(
        input_tokens=given,
        output_tokens=with_rest(output, given, usage.totalTokenCount),
        cached_tokens=usage.cachedContentTokenCount,
        reasoning_tokens=thought,
    )
