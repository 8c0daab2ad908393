"""The codecs against real recordings, compared with a plain parse of the same JSON."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

from aggregator.errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    ContentFilterError,
    ContextLengthError,
    LLMError,
    NotFoundError,
    PermissionDeniedError,
    QuotaError,
    RateLimitError,
    ResponseError,
    ServerError,
)
from aggregator.llm.calls import ChatCall, Codec
from aggregator.llm.names import resolve
from aggregator.records import HTTPReply

RECORDINGS = Path(__file__).parents[2].parent / "shared" / "data" / "real_exchanges"

pytestmark = pytest.mark.skipif(
    not RECORDINGS.is_dir(),
    reason="needs the recordings in ../shared/data/real_exchanges, which are not part of the project",
)

MODELS = {
    "openai_compatible": "openai/recorded",
    "anthropic": "anthropic/recorded",
    "gemini": "gemini/recorded",
}
CALL = ChatCall(model="recorded", messages=({"role": "user", "content": "?"},))


class Exchange(NamedTuple):
    """One recorded answer."""

    provider: str
    status: int
    headers: dict[str, str]
    body: str

    @property
    def reply(self) -> HTTPReply:
        headers = {name.lower(): str(value) for name, value in self.headers.items()}
        return HTTPReply(status=self.status, body=self.body.encode(), headers=headers)


class Reading(NamedTuple):
    """What a plain parse of an answer finds."""

    text: str
    finish: str
    usage: tuple[int | None, int | None, int | None, int | None]
    tools: list[str]


def recorded(name: str) -> Iterator[Exchange]:
    with gzip.open(RECORDINGS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield Exchange(row["provider"], row["status"], row["response_headers"], row["response_body"] or "")


def codec(name: str) -> Codec:
    return resolve(MODELS[name], env={}).codec


def plain_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, dict):
        return json.dumps(content)
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    text = str(content)
    if text.lstrip().startswith("<think>"):
        text = re.sub(r"^\s*<think>.*?(</think>\s*|$)", "", text, flags=re.DOTALL)
    return text


def read_openai(body: dict[str, Any]) -> Reading:
    choice = body["choices"][0]
    message = choice["message"]
    usage = body.get("usage") or {}
    given = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    for other in ("prompt_cache_hit_tokens", "cached_tokens", "num_cached_tokens"):
        given = usage.get(other) if given is None else given
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", usage.get("reasoning_tokens"))
    finish = {"function_call": "tool_calls", "": "stop", None: "stop", "eos": "stop"}
    tools = [call["function"]["name"] for call in message.get("tool_calls") or () if "function" in call]
    legacy = (message.get("function_call") or {}).get("name")
    return Reading(
        plain_text(message.get("content")),
        finish.get(choice.get("finish_reason"), choice.get("finish_reason")),
        (usage.get("prompt_tokens"), usage.get("completion_tokens"), given, thought),
        tools or ([legacy] if legacy else []),
    )


def read_anthropic(body: dict[str, Any]) -> Reading:
    usage = body["usage"]
    cached, written = usage.get("cache_read_input_tokens"), usage.get("cache_creation_input_tokens")
    finish = {"max_tokens": "length", "tool_use": "tool_calls", "refusal": "content_filter"}
    return Reading(
        "".join(block["text"] for block in body["content"] if block["type"] == "text"),
        finish.get(body["stop_reason"], "stop"),
        (
            usage["input_tokens"] + (cached or 0) + (written or 0),
            usage["output_tokens"],
            cached,
            (usage.get("output_tokens_details") or {}).get("thinking_tokens"),
        ),
        [block["name"] for block in body["content"] if block["type"] == "tool_use"],
    )


def read_gemini(body: dict[str, Any]) -> Reading:
    candidate = body["candidates"][0]
    parts = (candidate.get("content") or {}).get("parts") or []
    usage = body.get("usageMetadata") or {}
    counts = [usage[name] for name in ("candidatesTokenCount", "thoughtsTokenCount") if name in usage]
    finish = {"MAX_TOKENS": "length", 2: "length", "SAFETY": "content_filter", "MODEL_ARMOR": "content_filter"}
    return Reading(
        "".join(part.get("text", "") for part in parts if not part.get("thought")),
        finish.get(candidate.get("finishReason"), "stop"),
        (
            usage["promptTokenCount"] + usage.get("toolUsePromptTokenCount", 0)
            if "promptTokenCount" in usage
            else None,
            sum(counts) if counts else None,
            usage.get("cachedContentTokenCount"),
            usage.get("thoughtsTokenCount"),
        ),
        [part["functionCall"]["name"] for part in parts if "functionCall" in part],
    )


READERS: dict[str, Callable[[dict[str, Any]], Reading]] = {
    "openai_compatible": read_openai,
    "anthropic": read_anthropic,
    "gemini": read_gemini,
}


def same_text(ours: str, plain: str) -> bool:
    return ours == plain or (plain.startswith("{") and ours.startswith("{") and json.loads(ours) == json.loads(plain))


@pytest.mark.requirement("client 6: recorded answers, all", "built 1: codecs of every family")
@pytest.mark.parametrize("name", sorted(READERS))
def test_every_recorded_answer_is_read_correctly(name: str) -> None:
    """Text, finish reason, usage and tools equal a plain parse; a body without a message is a typed error."""
    wrong: list[tuple[Reading, Reading | str, str]] = []
    count = 0
    for exchange in recorded(name):
        count += 1
        try:
            plain = READERS[name](json.loads(exchange.body))
        except (ValueError, LookupError):
            with pytest.raises((ResponseError, APIStatusError)):
                codec(name).decode(exchange.reply, CALL)
            continue
        try:
            ours = codec(name).decode(exchange.reply, CALL)
        except ContentFilterError:
            if plain.text or plain.finish != "content_filter":
                wrong.append((plain, "content filter", exchange.body[:300]))
            continue
        usage = ours.usage
        found = Reading(
            ours.text,
            ours.finish_reason,
            (usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens),
            [call.name for call in ours.tool_calls],
        )
        if not same_text(found.text, plain.text) or found[1:] != plain[1:]:
            wrong.append((plain, found, exchange.body[:300]))
    assert wrong == []
    assert count >= 100


STATUS_CLASSES = {
    400: (BadRequestError, ContextLengthError),
    401: (AuthenticationError,),
    402: (QuotaError,),
    403: (PermissionDeniedError,),
    404: (NotFoundError,),
    413: (BadRequestError, ContextLengthError),
    422: (BadRequestError, ContextLengthError),
    429: (RateLimitError, QuotaError),
}


@pytest.mark.requirement("client 8: recorded errors, all")
def test_every_recorded_error_has_its_class_and_message() -> None:
    """The class follows from the status; the message is the provider's, if it gave one, and never empty."""
    wrong = []
    for exchange in recorded("errors"):
        family = {"anthropic": "anthropic", "gemini": "gemini", "vertex": "gemini"}.get(exchange.provider)
        error: LLMError = codec(family or "openai_compatible").error(exchange.reply)
        expected = STATUS_CLASSES.get(exchange.status, (ServerError,))
        stated = re.search(r'"message"\s*:\s*"((?:[^"\\]|\\.)+)"', exchange.body)
        words = json.loads(f'"{stated.group(1)}"') if stated else ""
        if (
            type(error) not in expected
            or not error.message
            or words not in error.message
            or error.status != exchange.status
        ):
            wrong.append((exchange, error))
    assert wrong == []


JUNK: list[Any] = [None, "", "x", "5", 0, 1.5, -1, True, [], {}, [None], {"a": 1}, 1e300, "\ud83d"]
VITAL = {
    "choices",
    "message",
    "candidates",
    "content",
    "parts",
    "usage",
    "usageMetadata",
}  # these cannot be lost unnoticed


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.mark.requirement("client 6: every field may be absent or odd")
@pytest.mark.parametrize("name", sorted(READERS))
def test_one_damaged_field_loses_at_most_that_field(name: str) -> None:
    """If any field of a recorded answer is null, without its type or invalid, the answer is still read."""
    random = Random(7)
    bound = codec(name)
    for exchange in list(recorded(name))[:60]:
        if len(exchange.body) > 20_000:
            continue
        whole = bound.decode(exchange.reply, CALL)
        for path in list(places(json.loads(exchange.body))):
            body = json.loads(exchange.body)
            node = body
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = deepcopy(random.choice(JUNK))
            last = next(key for key in reversed(path) if isinstance(key, str))
            damaged = HTTPReply(status=200, body=json.dumps(body).encode(), headers={})
            try:
                found = bound.decode(damaged, CALL)
            except LLMError:
                assert last in VITAL, path
                continue
            if last not in VITAL | {"text", "thought", "type"}:
                assert found.text == whole.text, path
            if last not in VITAL and "oken" not in last:
                assert found.usage.input_tokens == whole.usage.input_tokens, path


def test_no_recorded_header_is_read_as_a_wait() -> None:
    """`retry-after` also comes with status 200, where it is ignored."""
    answers = [exchange for exchange in recorded("anthropic") if "retry-after" in {h.lower() for h in exchange.headers}]
    assert all(codec("anthropic").decode(exchange.reply, CALL).choices for exchange in answers)
