"""OpenAI's chat completions, as OpenAI and the many servers that speak it really send them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from msgspec import Struct
from msgspec.structs import replace

from aggregator.errors import APIStatusError, ContentFilterError, DecodeError, EmptyResponseError, ResponseError
from aggregator.llm.calls import ChatCall, StreamReader, Target
from aggregator.llm.codecs.failures import fault_inside, request_id, status_error
from aggregator.llm.codecs.openai_answers import (
    DECODER,
    Answer,
    WireChoice,
    WireMessage,
    decode_usual,
    message_of,
    other_cached_tokens,
    told,
    told_calls,
    usage_of,
    usd,
)
from aggregator.llm.codecs.openai_stream import ChatStream
from aggregator.llm.codecs.sse import read_other
from aggregator.llm.codecs.wire import (
    BEFORE_THINKING,
    REASONS,
    REFUSED,
    Envelope,
    excerpt,
    finish_reason,
    read,
    secrets,
    split_thinking,
)
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, Usage

_REASONING_MODEL = re.compile(r"(?:ft:)?(?:o\d|gpt-[5-9]|gpt-\d\d|codex)")
_USAGE = {"include_usage": True}


class _Body(Struct, omit_defaults=True, gc=False):
    """A request's body; what was not said is not sent."""

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


class OpenAIChat:
    """The codec of chat completions, bound to one server."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._envelope = Envelope(target)
        self._urls: dict[str, str] = {}
        host = urlsplit(target.base_url).hostname or ""
        self._official = host.endswith(("api.openai.com", ".azure.com"))
        self._cap: int | None = target.options.get("max_tokens")
        self._seed: str = target.options.get("seed", "seed")
        self._usage_is_asked: bool = target.options.get("stream_options", True)

    def url(self, call: ChatCall) -> str:
        """Where calls of this model are posted."""
        address, question, query = self.target.base_url.partition("?")
        return f"{address.rstrip('/')}/chat/completions{question}{query}"

    def encode(self, call: ChatCall) -> HTTPRequest:
        """Return the request; what was not said is not sent."""
        cap = call.max_tokens
        if cap is None and "max_completion_tokens" not in call.extra:
            cap = self._cap
        newer = cap is not None and self._official and _REASONING_MODEL.match(call.model) is not None
        body = _Body(
            model=call.model,
            messages=call.messages,
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
        url = self._urls.get(call.model) or self._urls.setdefault(call.model, self.url(call))
        if call.extra or (call.seed is not None and self._seed != "seed"):
            return self._envelope.post(url, {**self._renamed(body), **call.extra}, stream=call.stream)
        return self._envelope.post(url, body, stream=call.stream)

    def _renamed(self, body: _Body) -> dict[str, Any]:
        """The body's fields under this server's names."""
        fields = ((name, getattr(body, name)) for name in body.__struct_fields__)
        said = {name: value for name, value in fields if value is not None and value is not False}
        return {self._seed if name == "seed" else name: value for name, value in said.items()}

    def decode(self, reply: HTTPReply, call: ChatCall) -> Completion:
        """Read an answer: the usual shape here and at once, any other by way of the lenient types.

        One long function: every answer takes it, and each call of a further one would cost 2 % of the whole.
        """
        try:
            answer = decode_usual(reply.body)
        except REFUSED:
            return self.decode_unusual(reply, call)
        (choice,) = answer.choices
        message, reason = choice.message, choice.finish_reason
        content, calls, details = message.content, message.tool_calls, message.reasoning_details
        reasoning = message.reasoning_content or message.reasoning or (told(details) if details else None)
        if content and content[0] in BEFORE_THINKING:
            content, thought = split_thinking(content)
            reasoning = (reasoning or "") + thought or None
        usage, headers = answer.usage, reply.headers
        cost = answer.cost if usage.cost is None else usage.cost
        prompt, output = usage.prompt_tokens_details, usage.completion_tokens_details
        cached = prompt.cached_tokens if prompt is not None else None
        thinking = output.reasoning_tokens if output is not None else None
        return Completion(
            choices=(
                Choice(
                    message=Message(
                        content=content,
                        reasoning=reasoning,
                        tool_calls=told_calls(calls) if calls else (),
                        refusal=message.refusal or None,
                    ),
                    finish_reason=reason,
                    raw_finish_reason=reason,
                    index=choice.index,
                ),
            ),
            usage=Usage(
                input_tokens=usage.prompt_tokens,
                output_tokens=usage.completion_tokens,
                cached_tokens=other_cached_tokens(usage) if cached is None else cached,
                reasoning_tokens=usage.reasoning_tokens if thinking is None else thinking,
                cost=None if cost is None else usd(cost),
            ),
            model=answer.model,
            id=answer.id,
            request_id=headers["x-request-id"] if "x-request-id" in headers else request_id(headers),
            milliseconds=reply.milliseconds,
            replayed=reply.replayed,
            raw=reply.body,
        )

    def decode_unusual(self, reply: HTTPReply, call: ChatCall) -> Completion:
        """Read an answer in whatever shape it came."""
        try:
            return self.completion(read(reply.body, DECODER), reply)
        except DecodeError as error:
            return read_other(error, reply, self.stream(call))

    def completion(self, answer: Answer, reply: HTTPReply) -> Completion:
        """Turn a parsed answer into a Completion; raises where it is an error or holds no message."""
        if answer.error:
            raise fault_inside(answer.error, reply, self.target.provider, secrets(self.target))
        choices = answer.choices
        if not choices:
            raise EmptyResponseError(
                f"Expected choices from {self.target.provider}, got none in {excerpt(reply.body)}",
                status=reply.status,
                request_id=request_id(reply.headers),
            )
        return Completion(
            choices=(self._choice(choices[0], 0, reply),)
            if len(choices) == 1
            else tuple([self._choice(choice, i, reply) for i, choice in enumerate(choices)]),
            usage=usage_of(answer),
            model=answer.model or "",
            id=answer.id or "",
            request_id=request_id(reply.headers),
            milliseconds=reply.milliseconds,
            replayed=reply.replayed,
            raw=reply.body,
        )

    def error(self, reply: HTTPReply) -> APIStatusError:
        """Return the error of an error status."""
        return status_error(reply, self.target.provider, secrets(self.target))

    def stream(self, call: ChatCall) -> StreamReader:
        """Return a reader for a streamed answer."""
        return ChatStream(self, call, self.completion)

    def _choice(self, choice: WireChoice, position: int, reply: HTTPReply) -> Choice:
        if choice.error:  # OpenRouter, where its upstream failed half way
            raise fault_inside(choice.error, reply, self.target.provider, secrets(self.target))
        message = choice.message or choice.delta
        if message is None:
            if choice.text is None:
                raise self._no_message(choice, reply)
            message = WireMessage(content=choice.text)
        return Choice(
            message=message_of(message),
            finish_reason=REASONS.get(choice.finish_reason, "stop"),
            raw_finish_reason=choice.finish_reason,
            index=position if choice.index is None else choice.index,
        )

    def _no_message(self, choice: WireChoice, reply: HTTPReply) -> ResponseError:
        filtered = finish_reason(choice.finish_reason) == "content_filter"
        kind = ContentFilterError if filtered else EmptyResponseError
        return kind(
            f"Expected a message from {self.target.provider}, got a choice without one "
            f"(finish_reason {choice.finish_reason!r}){'; change the prompt or the filter' if filtered else ''}",
            status=reply.status,
            code=choice.finish_reason,
            request_id=request_id(reply.headers),
        )


def settle_azure(target: Target, env: Mapping[str, str]) -> Target:
    """Take the api-version from the environment; one in the address itself wins. A token of Entra is no API key."""
    if isinstance(target.api_key, str) and target.api_key.startswith("eyJ"):  # as every JSON web token begins
        target = replace(target, auth="authorization")
    version = env.get("OPENAI_API_VERSION") or env.get("AZURE_API_VERSION")
    return replace(target, options={**target.options, "api_version": version}) if version else target


class AzureChat(OpenAIChat):
    """The codec of Azure OpenAI; the model's name is the deployment's.

    The address may be the resource (`https://NAME.openai.azure.com`), a deployment's path, or a `/models` path of
    Azure AI. Without any api-version the resource's `/openai/v1` API is called, which needs none.
    """

    def url(self, call: ChatCall) -> str:
        """Where this call is posted."""
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
