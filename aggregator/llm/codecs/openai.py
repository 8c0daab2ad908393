"""OpenAI's chat completions, as OpenAI and the many compatible servers send them; Azure's and Ollama's variants.

Ollama drops the oldest messages, and then the middle of the prompt, beyond `num_ctx` tokens (2,048 or 4,096 unless set)
without an error. Its count of prompt tokens reveals it, because it is far below the prompt's minimum.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from aggregator.errors import APIStatusError, ContentFilterError, EmptyResponseError, ModelWarning, ResponseError
from aggregator.llm.calls import ChatCall, RateHeaders, Target
from aggregator.llm.codecs.base import JSONCodec, words
from aggregator.llm.codecs.failures import request_id
from aggregator.llm.codecs.openai_answers import (
    DECODER,
    Answer,
    ChatStream,
    WireChoice,
    WireMessage,
    as_it_came,
    message_of,
    usage_of,
)
from aggregator.llm.messages import Mark, Turn, text_of
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest

_REASONING_MODEL = re.compile(
    r"(?:ft:)?(?:o\d|gpt-(?:[5-9]|1\d)(?!\d)|codex)", re.IGNORECASE
)  # gpt-35 is Azure's name for 3.5
_NEWER, _OLDER, _NO_THOUGHTS = "max_completion_tokens", "max_tokens", "no thinking"
_UNKNOWN = re.compile(r"unsupported|not supported|unknown|unrecognized|unexpected|not permitted|extra", re.IGNORECASE)
_USAGE = {"include_usage": True}
_LEFT = "x-ratelimit-remaining-{}", "x-ratelimit-limit-{}", "x-ratelimit-reset-{}"


# ---- chat completions


class _Body(Struct, omit_defaults=True, gc=False):
    """A request's body; fields at their defaults are not sent."""

    model: str
    messages: Sequence[Mapping[str, Any]]
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    response_format: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    stream: bool = False
    stream_options: Mapping[str, Any] | None = None


class OpenAIChat(JSONCodec[Answer]):
    """The codec of chat completions, bound to one server.

    Options of the target: `max_tokens` is the default limit, `seed` the field of the seed; with `by_name` the model's
    name decides the field of the limit, with `stream_options` usage is requested in streams.
    """

    decoder = DECODER
    reader = ChatStream
    finish_words = words(
        stop="stop eos eos_token end_turn stop_sequence complete finish_reason_unspecified",
        length="length max_tokens max_output_tokens model_length model_context_window_exceeded",  # Mistral; Anthropic
        tool_calls="tool_calls tool_use tool_call function_call",
        content_filter="content_filter refusal safety recitation blocklist prohibited_content spii sensitive",  # z.ai
    )
    limit_fields = ("max_tokens", "max_completion_tokens")
    corrections = (_NEWER, _OLDER, _NO_THOUGHTS)
    requests: tuple[RateHeaders, ...] = (
        RateHeaders(*[name.format("requests") for name in _LEFT]),
        RateHeaders(*[name.format("req-minute") for name in _LEFT]),  # Mistral
        RateHeaders(*[name.format("requests-minute") for name in _LEFT]),  # Hugging Face
        RateHeaders("x-ratelimit-remaining", "x-ratelimit-limit", "x-ratelimit-reset"),  # OpenRouter, Together
    )
    tokens: tuple[RateHeaders, ...] = (
        RateHeaders(*[name.format("tokens") for name in _LEFT]),
        RateHeaders(*[name.format("tokens-minute") for name in _LEFT]),
    )
    kept_headers = ("openai-beta", "openai-version", "openai-processing-ms", "x-ratelimit-*")

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._by_name: bool = target.options.get("by_name", False)
        self._cap: int | None = target.options.get("max_tokens")
        self._seed: str = target.options.get("seed", "seed")
        self.marks = target.options.get("marks")
        self._usage_is_asked: bool = target.options.get("stream_options", True)
        address, question, query = target.base_url.partition("?")
        self._url = f"{address.rstrip('/')}/chat/completions{question}{query}"

    def url(self, call: ChatCall) -> str:
        """The address for calls of this model."""
        return self._url

    def encode(self, call: ChatCall) -> HTTPRequest:
        """Return the request; options that were not set are not sent."""
        cap = call.max_tokens
        newer = self._takes_newer(call) if call.corrections else self._by_name and _is_reasoning(call.model)
        if cap is None and not newer and "max_completion_tokens" not in call.extra:
            cap = self._cap
        mark = None if self.marks is None else self.mark(call)
        body = _Body(
            model=call.model,
            messages=self._messages(call) if mark is None else _marked(self._messages(call), mark),
            max_completion_tokens=cap if newer else None,
            max_tokens=None if newer else cap,
            temperature=call.temperature,
            top_p=call.top_p,
            n=call.n,
            seed=call.seed,
            stop=call.stop,
            response_format=call.response_format,
            tools=call.tools,
            tool_choice=call.tool_choice,
            stream=call.stream,
            stream_options=_USAGE if call.stream and self._usage_is_asked else None,
        )
        url = self.url(call)
        if call.extra or (call.seed is not None and self._seed != "seed"):
            return self.post(url, {**self._renamed(body), **call.extra}, call)
        return self.post(url, body, call)

    def _takes_newer(self, call: ChatCall) -> bool:
        """Return True if the limit is sent as max_completion_tokens: by the server's hint, else by the model's name."""
        if call.corrections and not call.corrections.isdisjoint((_NEWER, _OLDER)):
            return _NEWER in call.corrections
        return self._by_name and _is_reasoning(call.model)

    def _messages(self, call: ChatCall) -> Sequence[Mapping[str, Any]]:
        """Return the messages; an answer with tool calls has its thinking, for the server that gave it."""
        for message in call.messages:
            if type(message) is Turn:
                break
        else:
            return call.messages
        keeps = _NO_THOUGHTS not in call.corrections
        return [as_it_came(message, self.target.base_url, keeps=keeps) for message in call.messages]

    def corrected(self, call: ChatCall, error: APIStatusError) -> ChatCall | None:
        """Return the call as corrected by a refusal: the other name of the limit, or no thinking sent back."""
        text = error.message
        if _NEWER in text and not self._takes_newer(call):
            wanted = _NEWER
        elif _UNKNOWN.search(text) is None:
            return None
        elif _NEWER in text:
            wanted = _OLDER
        elif "reasoning_content" in text or "reasoning_details" in text:
            wanted = _NO_THOUGHTS
        else:
            return None
        return replace(call, corrections=call.corrections | {wanted})

    def _renamed(self, body: _Body) -> dict[str, Any]:
        """Return the body's fields under this server's names."""
        fields = ((name, getattr(body, name)) for name in body.__struct_fields__)
        given = {name: value for name, value in fields if value is not None and value is not False}
        return {self._seed if name == "seed" else name: value for name, value in given.items()}

    def completion(self, answer: Answer, reply: HTTPReply) -> Completion:
        """Convert a parsed answer to a Completion; raises if it is an error or has no message."""
        if answer.error:
            raise self.fault(answer.error, reply)
        if not answer.choices:
            raise self.empty("choices", reply)
        choices: list[Choice] = []
        for choice in answer.choices:
            choices.append(self._choice(choice, len(choices), reply))
        return self.completed(
            reply,
            choices,
            usage=usage_of(answer),
            model=answer.model,
            answer_id=answer.id,
            service_tier=answer.service_tier,
        )

    def error(self, reply: HTTPReply) -> APIStatusError:
        """Return the error of an error status; for a model of the Responses API it explains how to call that."""
        error = super().error(reply)
        if "v1/responses" in error.message:
            error.message = f'{error.message} - ask it by LLM(…, api="responses")'
            error.args = (error.message,)
        return error

    def _choice(self, choice: WireChoice, position: int, reply: HTTPReply) -> Choice:
        if choice.error:  # OpenRouter, if its upstream failed half way
            raise self.fault(choice.error, reply)
        message = choice.message or choice.delta
        if message is None:
            if choice.text is None:
                raise self._no_message(choice, reply)
            message = WireMessage(content=choice.text)
        return Choice(
            message=message_of(message, self.target.base_url),
            finish_reason=self.finish_reason(choice.finish_reason),
            raw_finish_reason=choice.finish_reason,
            index=position if choice.index is None else choice.index,
        )

    def _no_message(self, choice: WireChoice, reply: HTTPReply) -> ResponseError:
        filtered = self.finish_reason(choice.finish_reason) == "content_filter"
        kind = ContentFilterError if filtered else EmptyResponseError
        return kind(
            f"Expected a message from {self.target.provider}, got a choice without one "
            f"(finish_reason {choice.finish_reason!r}){'; change the prompt or the filter' if filtered else ''}",
            status=reply.status,
            code=choice.finish_reason,
            request_id=request_id(reply.headers),
        )


@lru_cache(maxsize=256)
def _is_reasoning(model: str) -> bool:
    return _REASONING_MODEL.match(model.rpartition("/")[2]) is not None


def _marked(messages: Sequence[Mapping[str, Any]], mark: Mark) -> list[Mapping[str, Any]]:
    """Return the messages with the mark that gateways pass on to Anthropic and Gemini."""
    text = messages[mark.message]["content"]
    opening = {"type": "text", "text": text[: mark.length], "cache_control": {"type": "ephemeral"}}
    parts = [opening, {"type": "text", "text": text[mark.length :]}]
    return [*messages[: mark.message], {**messages[mark.message], "content": parts}, *messages[mark.message + 1 :]]


# ---- Azure and Ollama


class AzureChat(OpenAIChat):
    """The codec of Azure OpenAI; the model's name is the deployment's.

    The address may be the resource (`https://NAME.openai.azure.com`), a deployment's path, or a `/models` path of
    Azure AI. Without any api-version the resource's `/openai/v1` API is called, which needs none.
    """

    # Its limits are per minute; its resets have no fixed unit and may be missing.
    requests = (RateHeaders("x-ratelimit-remaining-requests", "x-ratelimit-limit-requests"),)
    tokens = (RateHeaders("x-ratelimit-remaining-tokens", "x-ratelimit-limit-tokens"),)

    def url(self, call: ChatCall) -> str:
        """The address for this call."""
        address, _, query = self.target.base_url.partition("?")
        address = address.rstrip("/")
        version = self.target.options.get("api_version")
        if not query and version:
            query = f"api-version={quote(str(version))}"
        if address.endswith("/openai/v1"):
            return f"{address}/chat/completions"
        if "/deployments/" not in address and not address.endswith("/models"):
            address = address.removesuffix("/openai")
            if not query:
                return f"{address}/openai/v1/chat/completions"
            address = f"{address}/openai/deployments/{quote(call.model, safe='')}"
        return f"{address}/chat/completions{'?' if query else ''}{query}"


_SHORTEST = 8_000  # characters: fewer fit into any context
_USUAL = 4.0  # characters of a token of English text, by OpenAI's rule of thumb
_MOST = 6.5  # no tokenizer exceeds this in running text; lower for code and for other languages
_RUN = re.compile(r"(\s)\s+|(\S)\2{3,}")  # blanks and rules are one token each, however long
_CONTEXT = 2048  # the smallest context; all common ones are multiples
_NEAR = 2


def characters(call: ChatCall) -> int:
    """Return the minimum number of characters of a prompt, with runs of one character counted once.

    >>> characters(ChatCall(model="m", messages=({"role": "user", "content": "a      b ======="},)))
    5
    """
    texts: list[str] = [text_of(message.get("content")) for message in call.messages]
    if call.tools:
        texts.append(msgspec.json.encode(call.tools).decode())
    return sum(len(_RUN.sub(" ", text)) for text in texts)


def is_cut(given: int, length: int) -> bool:
    """Return True if a prompt of `length` characters must have more than `given` tokens.

    This is so if there would be more characters per token than tokenizers reach, and also, for a prompt that is longer
    by the usual ratio, if the count is a context size, give or take two.

    >>> is_cut(4096, 60_000), is_cut(4095, 18_000), is_cut(4100, 18_000)
    (True, True, False)
    """
    if length < _SHORTEST or given <= 0:
        return False
    is_context = given + _NEAR >= _CONTEXT and (given + _NEAR) % _CONTEXT <= 2 * _NEAR
    return length > given * _MOST or (is_context and length > given * _USUAL)


class OllamaStream(ChatStream):
    """A streamed answer of Ollama."""

    def finish(self, reply: HTTPReply) -> Completion:
        """Return the whole answer; warns if the prompt was truncated."""
        return check_context(self.codec, super().finish(reply), self.call)


class OllamaChat(OpenAIChat):
    """The codec of Ollama's chat completions."""

    reader = OllamaStream

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.has_warned = False

    def decode(self, reply: HTTPReply, call: ChatCall) -> Completion:
        """Read an answer; warns if the prompt was truncated."""
        return check_context(self, super().decode(reply, call), call)


def check_context(codec: Any, completion: Completion, call: ChatCall) -> Completion:
    """Return the answer unchanged; warns, once per client, if its prompt was truncated."""
    given = completion.usage.input_tokens
    if given is None or codec.has_warned or not is_cut(given, length := characters(call)):
        return completion
    codec.has_warned = True
    warnings.warn(
        f"Expected Ollama to read about {round(length / _USUAL):,} tokens of {call.model}'s prompt, got {given:,}: the "
        f"prompt was probably cut at the context of the server, and the answer is about the rest. Set "
        f"OLLAMA_CONTEXT_LENGTH for the server or num_ctx in the Modelfile, or shorten the prompt",
        ModelWarning,
        stacklevel=2,
    )
    return completion
