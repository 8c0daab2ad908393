"""Requests and answers of any client and every known API as our records.

OpenAI (chat, Responses, completions, embeddings) and compatible APIs such as Mistral's, Anthropic, Gemini, Bedrock,
Ollama, Cohere. Answers are read by our codecs if one knows the API, else by the usual fields of text and tokens.
Nothing here raises: an unreadable request is a question without an API, an unreadable reply an answer without text.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from aggregator.cassettes.matching import canonical, decode_json
from aggregator.cassettes.payloads import decode_event, event_spans
from aggregator.cassettes.rules import host_of
from aggregator.checks import is_number
from aggregator.errors import LLMError
from aggregator.llm.calls import ChatCall, Codec, Limits, Target
from aggregator.llm.ledger import believed
from aggregator.llm.providers import providers
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message


class Question(Struct, frozen=True, kw_only=True):
    """A request to a model; `api` is "" if its format is unknown, and `messages` then holds the body as a text.

    `limits` are the request's. `is_free` is True for requests without a model: GET, a count of tokens.
    """

    api: str = ""
    provider: str = ""
    model: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    limits: Limits = Limits()
    is_free: bool = False
    base_url: str = ""


# Questions

_PATHS = (  # the end of the path, and the API; the first match wins
    (r"/chat/completions$", "chat"),
    (r"/responses$", "responses"),
    (r"/v1/messages$|/messages$|:(?:stream)?rawpredict$", "anthropic"),
    (r":(?:stream)?generatecontent$", "gemini"),
    (r"/model/[^/]+/converse(?:-stream)?$", "bedrock"),
    (r"/model/[^/]+/invoke(?:-with-response-stream)?$", "invoke"),
    (r"/api/(?:chat|generate)$", "ollama"),
    (r"/v[12]/chat$", "cohere"),
    (r"/embeddings$|/api/embed$|/v[12]/embed$|:(?:batch)?embedcontents?$", "embeddings"),
    (r"/completions$", "completions"),
)
_FREE = re.compile(r"/count_tokens$|:counttokens$|/tokenize$|/input_tokens$", re.IGNORECASE)
_LIMITS = (
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "max_tokens_to_sample"),
    *("generationConfig.maxOutputTokens", "inferenceConfig.maxTokens", "options.num_predict"),
    *("textGenerationConfig.maxTokenCount", "max_gen_len"),
)
_COUNTS = ("n", "candidate_count", "generationConfig.candidateCount", "num_generations")
_USUAL = {
    "anthropic": "anthropic",
    "gemini": "gemini",
    "bedrock": "bedrock",
    "invoke": "bedrock",
    "ollama": "ollama",
    "cohere": "cohere",
}
_HOSTS = (
    (r"\.openai\.azure\.com$|\.cognitiveservices\.azure\.com$|\.services\.ai\.azure\.com$", "azure"),
    (r"^bedrock-runtime[.-]", "bedrock"),
    (r"aiplatform\.googleapis\.com$", "vertex"),
    (r"^api\.cohere\.", "cohere"),
)
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_UNKNOWN_LIMIT = 20_000  # number of characters that are shown of a body of an unknown API


def read_question(request: HTTPRequest) -> Question:
    """Return the question in a request; in an unknown format it has no API.

    >>> body = b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}'
    >>> asked = read_question(HTTPRequest(url="http://x/v1/chat/completions", body=body, headers={}))
    >>> asked.api, asked.model, asked.messages[0]["content"], asked.limits.tokens
    ('chat', 'm', 'Hi', 5)
    """
    path = urlsplit(request.url).path
    if request.method in ("GET", "HEAD", "OPTIONS", "DELETE") or _FREE.search(path):
        return Question(is_free=True)
    body = _json_of(request.body)
    if not isinstance(body, dict):
        body = {}
    api = _api_of(path, body)
    if not api:
        kind = request.headers.get("content-type", request.headers.get("Content-Type", ""))
        shown = canonical(request.body, (), kind) if kind.startswith("multipart/") else request.body  # no boundary
        text = shown[:_UNKNOWN_LIMIT].decode(errors="replace") if _is_text(shown) else ""
        return Question(messages=({"role": "request", "content": text},) if text else ())
    return Question(
        api=api,
        provider=_provider_of(request.url, api),
        model=read_model(request),
        messages=tuple(_messages_in(api, body)),
        limits=Limits(_figure(body, _LIMITS), _figure(body, _COUNTS) or 1),
        base_url=f"{urlsplit(request.url).scheme}://{urlsplit(request.url).netloc}",
    )


def _api_of(path: str, body: Mapping[str, Any]) -> str:
    """Return the API by the end of the path, if the body fits it; else by the body alone."""
    fields = {
        "chat": ("messages",),
        "responses": ("input", "prompt"),
        "anthropic": ("messages",),
        "gemini": ("contents",),
        "bedrock": ("messages",),
        "invoke": tuple(body),
        "ollama": ("messages", "prompt"),
        "cohere": ("messages", "message"),
        "embeddings": ("input", "texts", "prompt", "content", "requests", "inputs", "images"),
        "completions": ("prompt",),
    }
    for pattern, api in _PATHS:
        if re.search(pattern, path.rstrip("/"), re.IGNORECASE) and any(field in body for field in fields[api]):
            return api
    is_chat = isinstance(messages := body.get("messages"), list) and messages and "role" in (_dict(messages[0]))
    return "chat" if is_chat and "model" in body else ""


@cache
def _by_host() -> dict[str, str]:
    found = {host_of(one.base_url): one.name for one in providers().values() if one.base_url}
    return {host: name for host, name in found.items() if host not in _LOCAL and "{" not in host}


def _provider_of(url: str, api: str) -> str:
    """Return the provider by the request's host; else the API's own one, as for a proxy."""
    host = host_of(url)
    named = next((name for pattern, name in _HOSTS if re.search(pattern, host)), None)
    return named or _by_host().get(host) or _USUAL.get(api, "openai")


def _figure(body: Mapping[str, Any], paths: Sequence[str]) -> int | None:
    for path in paths:
        node: Any = body
        for name in path.split("."):
            node = _dict(node).get(name)
        if type(node) is int and node > 0:
            return node
    return None


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _messages_in(api: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the messages of a request in OpenAI's shape, each content a text."""
    if api == "embeddings":
        yield {"role": "embed", "content": _text_of(next((body[name] for name in body if name != "model"), ""))}
        return
    system = body.get("system") or body.get("instructions") or body.get("preamble")
    system = system or body.get("systemInstruction") or body.get("system_instruction")
    if system:
        yield {"role": "system", "content": _text_of(system)}
    messages: list[Any] = []
    for name in ("chat_history", "messages", "contents", "input"):
        messages += _list(body.get(name))
    for message in messages:
        yield _message_of(message)
    for name in ("message", "prompt", "inputText"):
        if isinstance(body.get(name), str):
            yield {"role": "user", "content": body[name]}


def _message_of(message: Any) -> dict[str, Any]:
    if isinstance(message, str):
        return {"role": "user", "content": message}
    found = _dict(message)
    role = found.get("role") or ("assistant" if found.get("type") in _CALLED else "tool")
    text = _text_of(found.get("content") if "content" in found else found)
    shown = {"role": {"model": "assistant", "CHATBOT": "assistant", "USER": "user"}.get(role, role), "content": text}
    calls = found.get("tool_calls")
    return {**shown, "tool_calls": calls} if calls else shown


_CALLED = ("function_call", "custom_tool_call", "reasoning")
_TEXTS = ("text", "content", "thinking", "output", "parts", "message", "input_text", "refusal", "summary")
_CALLS = ("toolUse", "functionCall", "tool_use", "function_call", "function")
_RESULTS = ("toolResult", "functionResponse")


def _text_of(value: Any) -> str:
    """Return the texts of a message's content, whatever its parts are named; pictures and the like by their type."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(text for part in value if (text := _text_of(part)))
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    kind = value.get("type")
    call = next((value[name] for name in _CALLS if isinstance(value.get(name), dict)), None)
    if call is None and kind in ("tool_use", "function_call"):
        call = value
    if call is not None:
        given: Any = next((call[name] for name in ("arguments", "args", "input") if name in call), {})
        return f"tool call: {call.get('name')}({given if isinstance(given, str) else _json(given)})"
    result = next((value[name] for name in _RESULTS if isinstance(value.get(name), dict)), None)
    if result is not None:
        return _text_of(result.get("content") or _json(result.get("response")))
    texts = [_text_of(value[name]) for name in _TEXTS if value.get(name)]
    return "\n".join(text for text in texts if text) or (f"[{kind}]" if isinstance(kind, str) else _other(value))


def _other(value: Mapping[str, Any]) -> str:
    return next((f"[{name}]" for name in ("inlineData", "fileData", "image", "document") if name in value), "")


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _is_text(data: bytes) -> bool:
    return b"\0" not in data[:2000] and data[:2000].decode(errors="ignore").encode() == data[:2000]


# Answers


def read_answer(asked: Question, reply: HTTPReply) -> Completion:
    """Return the answer of status < 300 to a question, as far as it can be read; missing tokens are None."""
    codec = _codec(asked)
    found: Completion | None = None
    if codec is not None:
        call = ChatCall(model=asked.model, messages=())
        try:
            if _is_streamed(reply):
                reader = codec.stream(call)
                reader.feed(reply.body)
                found = reader.finish(reply)
            else:
                found = codec.decode(reply, call)
        except LLMError:
            pass  # cut short, withheld, or in a shape that only its own client knows
    if found is None or not (found.text or found.tool_calls):
        message = Message(content=_answer_text(asked, reply))
        found = replace(found or Completion(choices=()), choices=(Choice(message=message),))
    usage = believed(found)
    if usage.input_tokens is None and usage.output_tokens is None:
        stated = read_usage(reply)
        fitting = {name: int(stated[name]) for name in ("input_tokens", "output_tokens") if name in stated}
        usage = replace(usage, **fitting)
        if asked.api == "embeddings" and fitting:
            usage = replace(usage, output_tokens=fitting.get("output_tokens", 0))
    return replace(found, usage=usage, model=found.model or asked.model)


def read_failure(asked: Question, reply: HTTPReply) -> LLMError:
    """Return the error of an answer with an error status."""
    from aggregator.llm.codecs.failures import status_error

    codec = _codec(asked)
    return status_error(reply, asked.provider or "the server", ()) if codec is None else codec.error(reply)


def _codec(asked: Question) -> Codec | None:
    """Return the codec of an API, or None."""
    formats = {"chat": "openai", "anthropic": "anthropic", "gemini": "gemini", "bedrock": "bedrock"}
    if asked.api == "completions":
        formats = {"completions": "openai"}
    target = Target(provider=asked.provider, model=asked.model, base_url=asked.base_url)
    table = providers()
    if asked.api == "responses":
        return table["openai"].apis["responses"](target)
    return table[formats[asked.api]].codec(target) if asked.api in formats else None


_FRAMES = "application/vnd.amazon.eventstream"


def _is_streamed(reply: HTTPReply) -> bool:
    return reply.headers.get("content-type", "").startswith(_FRAMES) or bool(event_spans(reply.body))


def is_stream(reply: HTTPReply) -> bool:
    """Return True for an answer that is a stream of events, lines or frames."""
    return _is_streamed(reply)


def _answer_text(asked: Question, reply: HTTPReply) -> str:
    """Return the text of an answer of any API, with the pieces of a stream joined."""
    if asked.api == "embeddings":
        return "[embeddings]"
    if not asked.api:
        text = reply.body[:_UNKNOWN_LIMIT]
        return text.decode(errors="replace") if _is_text(text) else f"[{len(reply.body)} bytes]"
    return "".join(_piece_in(part) for part in _answers(reply, whole=True))


def _piece_in(value: Any) -> str:
    """Return the text in an answer, or in an event of a stream."""
    if isinstance(value, list):
        return "".join(_piece_in(part) for part in value)
    if not isinstance(value, dict):
        return ""
    kind = value.get("type")
    if isinstance(kind, str) and kind.endswith((".done", "_done", "completed", "-end")):
        return ""  # the text already came in pieces
    if isinstance(value.get("delta"), str):
        return value["delta"] if "text" in str(kind) or kind is None else ""
    inner = ("choices", "delta", "message", "candidates", "content", "parts", "contentBlockDelta", "output", "outputs")
    for name in (*inner, "results", "generations", "generation", "completion", "response", "text", "outputText"):
        found = value.get(name)
        if isinstance(found, str) and found:
            return found
        if isinstance(found, dict | list) and (text := _piece_in(found)):
            return text
    return ""


# Model and tokens in any format

LARGEST_FIGURE = 1e15
_MODEL_FIELDS = ("model", "modelId", "model_id", "engine", "modelVersion", "model_name")
_MODEL_IN_PATH = re.compile(r"/(?:models?|deployments|engines)/([^/?]+?)(?::[a-zA-Z]+)?(?:[/?#]|$)")
_INPUT = (
    *("input_tokens", "prompt_tokens", "promptTokenCount", "inputTokens", "inputTokenCount"),
    *("prompt_eval_count", "prompt_token_count", "inputTextTokenCount"),
)
_OUTPUT = (
    *("output_tokens", "completion_tokens", "candidatesTokenCount", "outputTokens", "outputTokenCount"),
    *("eval_count", "generation_token_count", "tokenCount"),
)
_MORE_INPUT = (  # these providers leave them out of the input
    *("cache_read_input_tokens", "cache_creation_input_tokens", "cacheReadInputTokens", "cacheWriteInputTokens"),
)
_MORE_OUTPUT = ("thoughtsTokenCount",)
_HOLDERS = (
    *("usage", "usageMetadata", "tokens", "billed_units", "meta", "response", "message", "delta", "x_groq", "metadata"),
    *("amazon-bedrock-invocationMetrics", "results"),
)
"""The keys under which an answer, or an event of a stream, has its figures, at any depth."""
_HINT = re.compile(rb"oken|eval_count|usage|modelId|\"bytes\"", re.IGNORECASE)


def read_model(request: HTTPRequest, reply: HTTPReply | None = None) -> str:
    """Return the requested model from request, address or answer, or ""."""
    if asked := _model_in(_json_of(request.body)):
        return asked
    named = _MODEL_IN_PATH.search(request.url)  # of Gemini, Bedrock and Azure
    if named:
        return unquote(named[1]).partition(":generate")[0]
    answers = () if reply is None else _answers(reply)
    return next((model for answer in answers if (model := _model_in(answer))), "")


def read_usage(reply: HTTPReply) -> dict[str, int | float]:
    """Return the tokens in an answer: `input_tokens` and `output_tokens`, each only if stated."""
    found: dict[str, int | float] = {}
    for answer in _answers(reply):
        found |= _usage_in(answer)  # the last event of a stream has the sum
    for side in ("input", "output"):
        count = reply.headers.get(f"x-amzn-bedrock-{side}-token-count", "")
        if count.isdigit() and f"{side}_tokens" not in found:
            found[f"{side}_tokens"] = int(count)
    return dict(sorted(found.items()))


def is_figure(amount: Any) -> bool:
    """Return True for a number that can be summed and printed; another tool's file may hold any other."""
    return is_number(amount) and 0 <= amount < LARGEST_FIGURE


def _json_of(body: bytes) -> Any:
    try:
        return decode_json(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _model_in(value: Any) -> str:
    for name in _MODEL_FIELDS if isinstance(value, dict) else ():
        if isinstance(model := value.get(name), str) and model:
            return model
    inner = value.get("response") or value.get("message") if isinstance(value, dict) else None
    return _model_in(inner) if isinstance(inner, dict) else ""


def _answers(reply: HTTPReply, *, whole: bool = False) -> Iterator[Any]:
    """Yield the JSON of an answer: one document, or the events of a stream, unless `whole` only those with figures."""
    if reply.headers.get("content-type", "").startswith(_FRAMES):
        yield from _frames(reply.body)
        return
    spans = event_spans(reply.body)
    if not spans:
        document = _json_of(reply.body)
        yield from document if isinstance(document, list) else (document,)  # Gemini streams a list
    for start, end in spans:
        event = reply.body[start:end]
        if whole or _HINT.search(event):
            yield decode_event(event)


def _frames(body: bytes) -> Iterator[Any]:
    """Yield the payloads of an AWS event stream; those of `invoke` wrap a model's own event."""
    start = 0
    while start + 16 <= len(body):
        size, head = (int.from_bytes(body[at : at + 4], "big") for at in (start, start + 4))
        if size < head + 16 or start + size > len(body):
            return
        payload = _json_of(body[start + 12 + head : start + size - 4])
        if isinstance(payload, dict) and isinstance(payload.get("bytes"), str):
            try:
                payload = _json_of(base64.b64decode(payload["bytes"]))
            except ValueError:
                payload = None
        yield payload
        start += size


def _usage_in(value: Any) -> dict[str, int | float]:
    """Return the tokens that an answer or an event states, in any provider's fields."""
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    if not isinstance(value, dict):
        return {}
    found: dict[str, int | float] = {}
    for holder in _HOLDERS:
        if isinstance(value.get(holder), dict | list):
            found = _usage_in(value[holder]) | found
    for side, names, more in (("input", _INPUT, _MORE_INPUT), ("output", _OUTPUT, _MORE_OUTPUT)):
        tokens = next((value[name] for name in names if is_figure(value.get(name))), None)
        if tokens is not None:
            found[f"{side}_tokens"] = tokens + _sum_of(value, more)
    if not found and is_figure(value.get("total_tokens")):  # of an embedding
        found["input_tokens"] = value["total_tokens"]
    return found


def _sum_of(value: Mapping[str, Any], names: tuple[str, ...]) -> int | float:
    figures: list[int | float] = [value[name] for name in names if is_figure(value.get(name))]
    return sum(figures)
