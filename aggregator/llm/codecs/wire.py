"""Typed decoding that bends: what fits is read, what does not fit is dropped, only what is no JSON object fails."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from aggregator import __version__
from aggregator.errors import ConfigError, DecodeError
from aggregator.llm.calls import Target
from aggregator.records import FinishReason, HTTPRequest

T = TypeVar("T")

REFUSED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for a body that is not of the wanted shape, or no JSON."""

_MAX_REPAIRS = 32
_PATH = re.compile(r"at `\$(.*)`$")
_STEP = re.compile(r"\.([^.\[]+)|(\[[^\]]*\])")


def read(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode a JSON object into the decoder's struct; raises DecodeError for anything else.

    The fast path is msgspec's. Only a body that it refuses (a field of another type, NaN, a lone surrogate, a byte
    order mark) takes the slow one.
    """
    try:
        return decoder.decode(body)
    except REFUSED:
        return fit(parse(body), decoder.type)


def parse(body: bytes) -> Any:
    r"""Parse JSON as forgivingly as the standard library can; raises DecodeError.

    >>> parse(b'\xef\xbb\xbf {"a": NaN}')
    {'a': nan}
    """
    text = body.decode("utf-8-sig", errors="replace")
    try:
        return _paired(json.loads(text, strict=False))
    except (ValueError, RecursionError):
        raise DecodeError(f"Expected a JSON body, got {excerpt(text)}") from None


def _paired(value: Any) -> Any:
    """Replace lone surrogates, which some servers cut a character into, and which no UTF-8 text can hold."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_paired(item) for item in value]
    if isinstance(value, dict):
        return {_paired(name): _paired(item) for name, item in value.items()}
    return value


def fit(data: Any, kind: type[T]) -> T:
    """Convert parsed JSON to a struct, dropping the fields that do not fit; raises DecodeError.

    >>> class Answer(msgspec.Struct):
    ...     id: str | None = None
    ...     total: int | None = None
    >>> fit({"id": 7, "total": "12"}, Answer)
    Answer(id=None, total=12)
    """
    for _ in range(_MAX_REPAIRS):
        try:
            return msgspec.json.decode(msgspec.json.encode(data), type=kind, strict=False)
        except msgspec.ValidationError as error:
            found = _PATH.search(str(error))
            steps = [name or index for name, index in _STEP.findall(found.group(1))] if found else []
            if not steps or not isinstance(data, dict):
                break
            _drop(data, steps)
    raise DecodeError(f"Expected a JSON object, got {excerpt(json.dumps(data, default=str))}")


def _drop(node: Any, steps: list[str]) -> None:
    """Remove what stands at a path; `[...]` is every element, since msgspec does not say which."""
    head, *rest = steps
    if head.startswith("["):
        if not isinstance(node, list):
            return
        if not rest:
            node[:] = [item for item in node if isinstance(item, dict)]
        for item in node if rest else ():
            _drop(item, rest)
    elif isinstance(node, dict):
        if rest:
            _drop(node.get(head), rest)
        else:
            node.pop(head, None)


def json_object(text: Any, where: str) -> dict[str, Any]:
    """The arguments of a tool call that goes back to a model, as an object; raises ConfigError.

    >>> json_object('{"city": "Bern"}', "$")
    {'city': 'Bern'}
    """
    if isinstance(text, Mapping):
        return dict(text)
    try:
        value = msgspec.json.decode(text) if text else {}
    except (msgspec.DecodeError, TypeError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"Expected the arguments of a tool call as a JSON object, got {text!r} - at {where}")
    return value


def excerpt(body: str | bytes, limit: int = 200) -> str:
    """The start of a body as it can stand in an error message.

    >>> excerpt(b" ")
    'nothing'
    """
    text = (body if isinstance(body, str) else body.decode("utf-8", errors="replace")).strip()
    if not text:
        return "nothing"
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}… ({len(text)} characters)"


OPEN, CLOSE = "<think>", "</think>"
BEFORE_THINKING = "< \n\t\r"  # an answer that begins with none of these does not begin with a tag


def split_thinking(content: str) -> tuple[str, str]:
    r"""Split an answer into (text, reasoning); an answer cut while thinking has no text.

    >>> split_thinking("<think>two and two</think>\n\n4")
    ('4', 'two and two')
    """
    if content[:1] not in BEFORE_THINKING or not (start := content.lstrip()).startswith(OPEN):
        return content, ""
    reasoning, _, text = start[len(OPEN) :].partition(CLOSE)
    return text.lstrip(), reasoning.strip()


class ThinkingFilter:
    """The same over a stream: `feed` returns the text alone, and holds back what may still turn out to be a tag."""

    def __init__(self) -> None:
        self._held = ""
        self._state = "start"

    def feed(self, delta: str) -> str:
        """Take the next piece of content and return what of it is certainly text."""
        if self._state == "text":
            return delta
        self._held += delta
        if self._state == "start":
            start = self._held.lstrip()
            if OPEN.startswith(start[: len(OPEN)]) and len(start) < len(OPEN):
                return ""
            if not start.startswith(OPEN):
                return self.flush()
            self._state, self._held = "thinking", start[len(OPEN) :]
        if self._state == "thinking":
            _, closed, rest = self._held.partition(CLOSE)
            if not closed:
                return ""
            self._state, self._held = "after", rest
        self._held = self._held.lstrip()
        return self.flush() if self._held else ""

    def flush(self) -> str:
        """Return what was held back once it is known to be text, at the latest when the stream ends."""
        if self._state == "thinking":
            return ""
        held, self._held, self._state = self._held, "", "text"
        return held


# Only what can be decoded everywhere: eight recorded exchanges came as brotli to clients that could not read it.
ACCEPT_ENCODING = "gzip, deflate"
_USER_AGENT = f"aggregator/{__version__}"
_to_json = msgspec.json.Encoder().encode


class Envelope:
    """Makes the requests of one target; headers are built once, unless the key is a function."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._fixed = None if callable(target.api_key) else self._dressed(target.api_key)

    def post(self, url: str, body: Mapping[str, Any] | Struct, *, stream: bool = False) -> HTTPRequest:
        """Build a request. The body keeps the order of its keys: the same call gives the same bytes."""
        plain, streamed, secrets = self._fixed or self._dressed(api_key(self._target))
        return HTTPRequest(url=url, body=_to_json(body), headers=streamed if stream else plain, secrets=secrets)

    def _dressed(self, key: str | None) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
        """The headers of a plain and of a streamed request, and the secrets in them."""
        headers = {
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": ACCEPT_ENCODING,
            "user-agent": _USER_AGENT,
            **self._target.headers,
        }
        if key:
            headers[self._target.auth] = f"Bearer {key}" if self._target.auth == "authorization" else key
        return headers, {**headers, "accept": "text/event-stream"}, (key,) if key else ()


def api_key(target: Target) -> str | None:
    """The key of the moment."""
    return target.api_key() if callable(target.api_key) else target.api_key


def secrets(target: Target) -> tuple[str, ...]:
    """The very values that authenticate, which no message and no file may hold."""
    key = api_key(target)
    return (key,) if key else ()


_WORDS: dict[FinishReason, tuple[str, ...]] = {
    "stop": ("stop", "eos", "end_turn", "stop_sequence", "pause_turn", "complete", "finish_reason_unspecified"),
    "length": (
        "length",
        "max_tokens",
        "max_output_tokens",
        "model_length",  # Mistral
        "model_context_window_exceeded",  # Anthropic
    ),
    "tool_calls": ("tool_calls", "tool_use", "tool_call", "function_call"),
    "content_filter": (
        "content_filter",
        "refusal",  # Anthropic
        "safety",
        "recitation",
        "language",
        "blocklist",
        "prohibited_content",
        "spii",
        "image_safety",
        "image_prohibited_content",
        "image_recitation",
        "model_armor",
    ),
}
REASONS: dict[str | None, FinishReason] = {word: reason for reason, words in _WORDS.items() for word in words}
REASONS |= {word.upper(): reason for word, reason in REASONS.items() if word}  # Gemini shouts


def finish_reason(word: str | None) -> FinishReason:
    """Normalise a provider's word; an unknown one, or none, reads as `stop` (the word stays in `raw_finish_reason`).

    >>> finish_reason("MAX_TOKENS"), finish_reason("end_turn"), finish_reason(None)
    ('length', 'stop', 'stop')
    """
    return REASONS.get(word, "stop")
