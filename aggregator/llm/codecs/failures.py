"""Error answers of every provider, and rate-limit headers: class, message, waiting time.

Twenty-two error shapes were seen in recordings. They are read by searching for the few names of a message, at any
depth, not by one case per provider. Rate-limit headers describe a bucket that refills continuously, so the missing part
returns at (limit - remaining) / reset per second; a server that sends no reset (Azure, Mistral) states its limits per
minute.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from math import isfinite
from typing import Any, TypeVar

from msgspec import Struct

from aggregator.errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    ContextLengthError,
    DecodeError,
    LLMError,
    NotFoundError,
    PermissionDeniedError,
    QuotaError,
    RateLimitError,
    ResponseError,
    ServerError,
)
from aggregator.llm.calls import RateHeaders
from aggregator.llm.codecs.wire import parse
from aggregator.records import HTTPReply

E = TypeVar("E", bound=LLMError)

_MESSAGE_KEYS = ("message", "msg", "detail", "error", "errors", "error_message", "error_description", "title", "reason")
_OTHER_REQUEST_IDS = ("request-id", "apim-request-id", "x-ms-request-id", "x-amzn-requestid")
_MAX_MESSAGE = 2000
_DEEPEST = 20
_SHORT = 8

_BY_STATUS: dict[int, type[APIStatusError]] = {
    401: AuthenticationError,
    402: QuotaError,  # "insufficient balance": DeepSeek, OpenRouter
    403: PermissionDeniedError,
    404: NotFoundError,
    408: ServerError,
    409: ServerError,
    424: ServerError,  # a dependency of the server failed: Bedrock's models
    425: ServerError,
    429: RateLimitError,
}
_QUOTA_WORDS = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "billing_error"}
_CONTEXT_WORDS = {"context_length_exceeded", "exceed_context_size_error", "context_window_exceeded"}
_CONTEXT_TEXT = re.compile(
    r"maximum context length|context (?:length|window|size|limit)\b.*\bexceed"
    r"|exceed\w*\b.*\bcontext (?:length|window|size|limit)"
    r"|prompt is too long|input (?:is )?too long|reduce the length of the (?:messages|prompt)"
    r"|(?:input|prompt) token count.*exceed|too large for model with \d+ maximum",
    re.IGNORECASE | re.DOTALL,
)
_STATUS_OF_WORD = {  # for an error inside a 200, which has no error status
    "authentication_error": 401,
    "invalid_api_key": 401,
    "unauthenticated": 401,
    "permission_error": 403,
    "permission_denied": 403,
    "not_found_error": 404,
    "not_found": 404,
    "model_not_found": 404,
    "invalid_request_error": 400,
    "invalid_argument": 400,
    "context_length_exceeded": 400,
    "exceed_context_size_error": 400,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "resource_exhausted": 429,
    "insufficient_quota": 429,
    "request_too_large": 413,
    "api_error": 500,
    "server_error": 500,
    "internal_server_error": 500,
    "internal": 500,
    "unavailable": 503,
    "service_unavailable": 503,
    "deadline_exceeded": 504,
    "overloaded_error": 529,
}


# ---- errors of a status or inside an answer


class Fault(Struct, frozen=True, kw_only=True):
    """An error body's content: `words` are its codes and types, the most specific first; `status` is its number."""

    message: str = ""
    words: tuple[str, ...] = ()
    status: int | None = None
    request_id: str | None = None
    retry_delay: float | None = None


def status_error(reply: HTTPReply, provider: str, secrets: tuple[str, ...] = ()) -> APIStatusError:
    """Return the error of a reply of status >= 300; its message never contains `secrets`."""
    fault = read_fault(reply.body)
    message = fault.message or reply.reason or _phrase(reply.status)
    if 300 <= reply.status < 400:
        message = f"redirected to {reply.headers.get('location', 'nowhere')!r}; give that address as base_url"
    return _build(classify(reply.status, fault), reply, fault, provider, secrets, reply.status, message)


def fault_inside(data: Any, reply: HTTPReply, provider: str, secrets: tuple[str, ...] = ()) -> LLMError:
    """Return the error inside an answer of status 200; ResponseError if its kind is unknown."""
    fault = fault_of({"error": data})
    status = fault.status or next(
        (_STATUS_OF_WORD[w] for w in map(str.lower, fault.words) if w in _STATUS_OF_WORD), None
    )
    kind: type[LLMError] = classify(status, fault) if status else ResponseError
    return _build(
        kind, reply, fault, provider, secrets, status or reply.status, fault.message or "an error without words"
    )


def fault_in_event(data: bytes) -> Any:
    """Return the content of an event named `error`, for `fault_inside`.

    It may have the `error` key or not, and be JSON or text.
    """
    try:
        body = parse(data)
    except DecodeError:
        return data.decode("utf-8", errors="replace") or "an error without words"
    return (body.get("error") or body) if isinstance(body, dict) else body


def _build(
    kind: type[E], reply: HTTPReply, fault: Fault, provider: str, secrets: tuple[str, ...], status: int, message: str
) -> E:
    code = fault.words[0] if fault.words else None
    error = kind(
        f"{provider} answered {status}{f' ({code})' if code else ''}: {_without(message, secrets)[:_MAX_MESSAGE]}",
        status=status,
        code=code,
        request_id=request_id(reply.headers) or fault.request_id,
        retry_after=retry_after(reply.headers) or fault.retry_delay,
    )
    return scrub(error, secrets)


def scrub(error: E, secrets: Iterable[str]) -> E:
    """Return the same error with authentication values removed from its message and code."""
    error.message = _without(error.message, secrets)
    error.code = error.code and _without(error.code, secrets)
    error.args = (error.message,)
    return error


def _without(text: str, secrets: Iterable[str]) -> str:
    """Return a text without secrets; short ones, mostly placeholders such as `token`, are replaced as whole words.

    >>> _without("sk-12345678x, token, max_tokens", ["sk-12345678", "token"])
    '***x, ***, max_tokens'
    """
    for secret in filter(None, secrets):
        if len(secret) >= _SHORT:
            text = text.replace(secret, "***")
        else:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
    return text


def classify(status: int, fault: Fault) -> type[APIStatusError]:
    """Return the class of an error, by its status, or by the provider's message if that is more specific.

    >>> classify(429, Fault(words=("insufficient_quota",))).__name__
    'QuotaError'
    """
    if status in (400, 413, 422) and _is_context_overflow(fault):
        return ContextLengthError
    if status == 429 and _QUOTA_WORDS.intersection(map(str.lower, fault.words)):
        return QuotaError
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status >= 500:
        return ServerError
    return BadRequestError if status >= 400 else APIStatusError


def _is_context_overflow(fault: Fault) -> bool:
    words = {word.lower() for word in fault.words}
    if words & _CONTEXT_WORDS:
        return True
    return "rate_limit_exceeded" not in words and _CONTEXT_TEXT.search(fault.message) is not None


# ---- reading the error of a body


def read_fault(body: bytes) -> Fault:
    """Read an error body of any shape: JSON, server-sent events, HTML, text or nothing.

    >>> read_fault(b'{"detail": "Unauthorized"}').message
    'Unauthorized'
    """
    text = body.strip()
    if text.startswith((b"data:", b"event:")):
        lines = [line[5:] for line in text.splitlines() if line.startswith(b"data:")]
        text = lines[0].strip() if lines else b""
    if not text:
        return Fault()
    try:
        return fault_of(parse(text))
    except DecodeError:
        return Fault(message=_plain(text.decode("utf-8", errors="replace")))


def fault_of(data: Any) -> Fault:
    """Read a parsed error body."""
    if isinstance(data, list) and data:  # Gemini without alt=sse wraps its error in an array
        data = data[0]
    message = _message(data)
    if not isinstance(data, dict):
        return Fault(message=message)
    inner = data.get("error")
    several = data.get("errors")  # Cloudflare's list
    nodes = [node for node in (inner, data, *(several if isinstance(several, list) else ())) if isinstance(node, dict)]
    numbers = [node.get(key) for node in nodes for key in ("code", "status", "raw_status_code")]
    return Fault(
        message=_with_upstream(message, nodes[0]),
        words=_words(nodes),
        status=next((n for n in map(_as_status, numbers) if n), None),
        request_id=_text(data.get("request_id")),
        retry_delay=_retry_delay(nodes[0].get("details")),
    )


def _message(node: Any, depth: int = 0) -> str:
    """Return the message, under any of its names; a list (FastAPI's 422) gives each of its entries."""
    if isinstance(node, str):
        return node.strip()
    if depth > _DEEPEST:
        return ""
    if isinstance(node, list):
        return "; ".join(filter(None, (_message(item, depth + 1) for item in node[:5])))
    if not isinstance(node, dict):
        return ""
    found = next(filter(None, (_message(node.get(key), depth + 1) for key in _MESSAGE_KEYS)), "")
    where = node.get("loc")
    return f"{found} at {'.'.join(map(str, where))}" if found and isinstance(where, list) else found


def _with_upstream(message: str, node: dict[str, Any]) -> str:
    """Add the message of OpenRouter's upstream to its own "Provider returned error"."""
    metadata = node.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    if isinstance(raw, str) and raw.strip():
        upstream = read_fault(raw.encode()).message
        return f"{message}: {upstream}" if upstream and upstream not in message else message
    return message


def _words(nodes: list[dict[str, Any]]) -> tuple[str, ...]:
    found = [node.get(key) for node in nodes for key in ("code", "status", "type")]
    words = [str(word) for word in found if _is_word(word)]
    numeric = [word for word in words if word.isdigit()]  # "3051", "429": a name is more specific
    return tuple(dict.fromkeys([word for word in words if not word.isdigit()] + numeric))


def _is_word(value: Any) -> bool:
    """Return True for a name, or a number of the provider; an HTTP status would only repeat the status."""
    if isinstance(value, str):
        return value not in ("", "error")
    return type(value) is int and value > 0 and not 100 <= value < 600


def _as_status(value: Any) -> int | None:
    number = int(value) if isinstance(value, str) and re.fullmatch("[0-9]{3}", value) else value
    return number if isinstance(number, int) and 400 <= number < 600 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _plain(text: str) -> str:
    """Return a page's title, or the text without its tags."""
    title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    text = title.group(1) if title else re.sub(r"<[^>]*>", " ", text)
    return " ".join(text.split())[:500]


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "no explanation"


def request_id(headers: Mapping[str, str]) -> str | None:
    """Return the request id for the provider's support."""
    if "x-request-id" in headers:  # nearly always; this runs for every answer
        return headers["x-request-id"]
    for name in _OTHER_REQUEST_IDS:
        if name in headers:
            return headers[name]
    return None


# ---- when to try again


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait, from `retry-after-ms` or `retry-after` (seconds or a date); zero is missing.

    >>> retry_after({"retry-after-ms": "0", "retry-after": "1"})
    1.0
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        try:
            seconds = float(value) * unit
        except ValueError:
            seconds = _until(value, headers.get("date", "")) if value else 0.0
        if 0.0 < seconds < float("inf"):
            return seconds
    return None


def _until(date: str, now: str) -> float:
    """Return the seconds until an HTTP date, by the server's own clock if it has one."""
    try:
        then = parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError, TypeError):
        return 0.0
    try:
        return then - parsedate_to_datetime(now).timestamp()
    except (ValueError, OverflowError, TypeError):
        return then - time.time()


def _retry_delay(details: Any) -> float | None:
    """Gemini's RetryInfo: `details: [{"retryDelay": "48s"}]`."""
    for detail in details if isinstance(details, list) else ():
        delay = detail.get("retryDelay") if isinstance(detail, dict) else None
        found = re.fullmatch(r"(\d+(?:\.\d+)?)s", delay) if isinstance(delay, str) else None
        if found and float(found.group(1)) > 0:
            return float(found.group(1))
    return None


def should_retry(headers: Mapping[str, str]) -> bool | None:
    """Return the value of `x-should-retry`, None without one."""
    return {"true": True, "false": False}.get(headers.get("x-should-retry", "").strip().lower())


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


# ---- rate-limit headers


class Headroom(Struct, frozen=True):
    """The remaining number, and the seconds until there is one more."""

    remaining: float
    seconds_each: float


def headroom(headers: Mapping[str, str], names: Iterable[RateHeaders], *, now: float | None = None) -> Headroom | None:
    """Return the limits in the headers under the first of these names, or None if none can be read.

    `now` is Unix time, for resets given as a date.

    >>> names = [RateHeaders("x-ratelimit-remaining", "x-ratelimit-limit", "x-ratelimit-reset")]
    >>> headroom({"x-ratelimit-remaining": "10", "x-ratelimit-limit": "60", "x-ratelimit-reset": "25s"}, names)
    Headroom(remaining=10.0, seconds_each=0.5)
    """
    for name in names:
        if name.remaining not in headers:
            continue
        remaining, limit = _number(headers[name.remaining]), _number(headers.get(name.limit, ""))
        if remaining is None:
            return None
        reset = seconds(headers.get(name.reset, ""), now=now)
        if reset is not None:
            return Headroom(remaining, reset / max((limit or 0.0) - remaining, 1.0))
        return Headroom(remaining, 60.0 / limit) if limit else None
    return None


def reset_wait(headers: Mapping[str, str], names: Iterable[RateHeaders], *, now: float | None = None) -> float | None:
    """Return the seconds until an exhausted limit is full again; None if the headers name none.

    >>> names = [RateHeaders("x-ratelimit-remaining", "x-ratelimit-limit", "x-ratelimit-reset")]
    >>> reset_wait({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1700000030000"}, names, now=1700000000)
    30.0
    """
    for name in names:
        if name.reset and _number(headers.get(name.remaining, "")) == 0:
            wait = seconds(headers.get(name.reset, ""), now=now)
            if wait:
                return wait
    return None


def seconds(text: str, *, now: float | None = None) -> float | None:
    """Read a time until reset: `6ms`, `12.967s`, `1m30s`, bare seconds, a Unix time (also in ms) or a date of RFC 3339.

    >>> seconds("1m30s"), seconds("6ms"), seconds("500"), seconds("1970-01-01T00:01:00Z", now=0), seconds("soon")
    (90.0, 0.006, 500.0, 60.0, None)
    """
    text = text.strip()
    found = _DURATION.findall(text)
    if found and "".join(a + b for a, b in found) == text:
        return sum(float(amount) * _SECONDS[unit] for amount, unit in found)
    now = time.time() if now is None else now
    try:
        bare = float(text)
    except ValueError:
        return _seconds_until(text, now)
    if not isfinite(bare):
        return None
    if bare > 1e12:  # a Unix time in milliseconds
        return max(0.0, bare / 1e3 - now)
    return max(0.0, bare - now) if bare > 1e9 else bare


def _seconds_until(text: str, now: float) -> float | None:
    try:
        then = datetime.fromisoformat(text)
        return max(0.0, then.timestamp() - now) if then.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if isfinite(number) else None
