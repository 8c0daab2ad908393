"""Model and tokens of any recorded exchange: in our own facts, or in the words of its provider, streams included.

OpenAI (chat, Responses, embeddings) and what speaks as it does, Anthropic, Gemini, Bedrock, Cohere, Ollama.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

import msgspec

from aggregator.cassettes.exchanges import Exchange
from aggregator.cassettes.matching import decode_json
from aggregator.cassettes.payloads import decode_event, event_spans
from aggregator.checks import is_number

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
_MORE_INPUT = (  # which these providers leave out of the input
    *("cache_read_input_tokens", "cache_creation_input_tokens", "cacheReadInputTokens", "cacheWriteInputTokens"),
)
_MORE_OUTPUT = ("thoughtsTokenCount",)
_HOLDERS = (
    *("usage", "usageMetadata", "tokens", "billed_units", "meta", "response", "message", "delta", "x_groq", "metadata"),
    *("amazon-bedrock-invocationMetrics", "results"),
)
"""Where an answer, or an event of a stream, holds its figures, at any depth of these."""
_HINT = re.compile(rb"oken|eval_count|usage|modelId|\"bytes\"", re.IGNORECASE)
_EVENT_STREAM = "application/vnd.amazon.eventstream"


def model_of(exchange: Exchange) -> str:
    """Return the model that was asked: what we noted, else what request, address or answer say, else ""."""
    if exchange.facts.model:
        return exchange.facts.model
    asked = _model_in(_json_of(exchange.request.body))
    if asked:
        return asked
    named = _MODEL_IN_PATH.search(exchange.request.url)  # of Gemini, Bedrock and Azure
    if named:
        return unquote(named[1]).partition(":generate")[0]
    return next((model for answer in _answers(exchange) if (model := _model_in(answer))), "")


def usage_of(exchange: Exchange) -> dict[str, int | float]:
    """Return the tokens and cost of an exchange: what we noted, else what the answer says of itself."""
    if exchange.facts.usage:
        return {name: amount for name, amount in exchange.facts.usage.items() if is_figure(amount)}
    found: dict[str, int | float] = {}
    for answer in _answers(exchange):
        found |= _usage_in(answer)  # the last event of a stream says the sum
    headers = exchange.reply.headers
    for side in ("input", "output"):
        count = headers.get(f"x-amzn-bedrock-{side}-token-count", "")
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


def _answers(exchange: Exchange) -> Iterator[Any]:
    """Yield the JSON of an answer: one document, or the events of a stream that may hold figures."""
    reply = exchange.reply
    if reply.headers.get("content-type", "").startswith(_EVENT_STREAM):
        yield from _frames(reply.body)
        return
    spans = event_spans(reply.body)
    if not spans:
        whole = _json_of(reply.body)
        yield from whole if isinstance(whole, list) else (whole,)  # Gemini streams a list
    for start, end in spans:
        event = reply.body[start:end]
        if _HINT.search(event):
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
    """Return the tokens that an answer or an event states, wherever its provider puts them."""
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
