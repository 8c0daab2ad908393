"""The base class of codecs for JSON APIs, and server-sent events without I/O.

A codec declares its typed answer, its finish reasons and its headers, and implements `encode` and `completion`. Reading
bodies of any shape, errors, streams in one piece and the request's envelope are implemented here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import Struct

from aggregator import __version__
from aggregator.errors import (
    APIConnectionError,
    APIStatusError,
    ConfigError,
    DecodeError,
    EmptyResponseError,
    LLMError,
    ResponseError,
)
from aggregator.llm.calls import ChatCall, Codec, Limits, RateHeaders, StreamReader, Target
from aggregator.llm.codecs.failures import fault_inside, fault_of, request_id, reset_wait, scrub, status_error
from aggregator.llm.codecs.wire import excerpt, parse, read
from aggregator.llm.messages import Mark, find_mark
from aggregator.records import Choice, Completion, FinishReason, HTTPReply, HTTPRequest, Usage

DONE = b"[DONE]"


# ---- server-sent events


class Event(NamedTuple):
    """One event: its name ("" by default) and its data."""

    name: str
    data: bytes


class EventParser:
    r"""Splits bytes into events: CRLF, LF or CR, comments, several data lines, bytes cut anywhere.

    >>> EventParser().feed(b': keep-alive\n\nevent: ping\ndata: {}\n\ndata: half')
    [Event(name='ping', data=b'{}')]
    """

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # of an incomplete line
        self._name = ""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[Event]:
        """Feed the next bytes and return the events they complete."""
        if b"\n" not in data and b"\r" not in data and self._rest[-1:] != [b"\r"]:
            self._rest.append(data)
            return []
        text = b"".join([*self._rest, data])
        held = b"\r" if text.endswith(b"\r") else b""  # possibly the first half of CRLF
        *lines, rest = text.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = [rest, held] if held else [rest]
        return [event for line in lines if (event := self._line(line))]

    def flush(self) -> list[Event]:
        """Return the last event if the stream ended without its empty line."""
        return self.feed(b"\n\n")

    def _line(self, line: bytes) -> Event | None:
        if not line:
            event = Event(self._name, b"\n".join(self._data)) if self._data else None
            self._name, self._data = "", []
            return event
        field, _, value = line.removeprefix(b"\xef\xbb\xbf").partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value.decode("utf-8", errors="replace")
        elif field == b"error":  # older llama.cpp
            self._name, self._data = "error", [value]
        return None


class CompletingCodec(Codec, Protocol):
    """A codec that converts its own typed answer, which a stream adds up to, to a Completion."""

    def completion(self, answer: Any, reply: HTTPReply) -> Completion:
        """Convert the typed answer to a Completion; raises LLMError."""
        ...

    def fault(self, data: Any, reply: HTTPReply) -> LLMError:
        """Return the error in an answer of status 200."""
        ...


_SILENT = ("ping", "keepalive")
_FIRST_HALF = re.compile(
    rb'((?<!\\)\\u[dD][89abAB][0-9a-fA-F]{2}|[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})(?=")'
)
_SECOND_HALF = re.compile(rb'(?<=")(?=\\u[dD][c-fC-F]|[\x80-\xbf])')
"""The two parts of a character that was split over the ends of two texts: of a surrogate pair, of its UTF-8 bytes."""


class EventReader:
    """The part of a StreamReader that no provider changes; a subclass reads its own events.

    `event` processes one event and returns its text, `whole` returns True if the answer is complete, `build` builds the
    answer.
    """

    def __init__(self, codec: CompletingCodec, call: ChatCall) -> None:
        self.codec = codec
        self.call = call
        self._parser = EventParser()
        self._events = 0
        self.heard = 0  # events that are part of the answer: comments and pings only keep the connection open
        self._half = b""  # the first part of a character, whose second part is in a later event
        self.done = False  # the server sent [DONE], as gateways do for every API

    def event(self, event: Event) -> str:
        """Process one event and return its text."""
        raise NotImplementedError

    def whole(self) -> bool:
        """Return True if the answer is complete."""
        raise NotImplementedError

    def build(self, reply: HTTPReply) -> Completion:
        """Build the answer."""
        raise NotImplementedError

    def feed(self, data: bytes) -> list[str]:
        """Feed the next bytes, cut anywhere, and return the text deltas they complete."""
        return self._read(self._parser.feed(data))

    def finish(self, reply: HTTPReply) -> Completion:
        """Return the whole answer; raises APIConnectionError if the stream was cut."""
        with suppress(DecodeError):  # half an event: the stream was cut, which is detected below
            self._read(self._parser.flush())
        if not self._events and not is_event_stream(reply.body):  # the server ignored `stream`
            return self.codec.decode(reply, self.call)
        if not self._events or not self.whole():
            raise APIConnectionError(
                f"Expected the stream to end with a finish reason, got its end after {len(reply.body)} bytes",
                status=reply.status,
                request_id=request_id(reply.headers),
            )
        return self.build(reply)

    def _read(self, events: list[Event]) -> list[str]:
        self._events += len(events)
        texts = []
        for event in events:
            if event.data.strip() == DONE:
                self.done = True
            elif event.data.strip():
                self.heard += event.name not in _SILENT
                if self._half or b"\\u" in event.data or not event.data.isascii():
                    event = Event(event.name, self._joined(event.data))  # noqa: PLW2901 - the same one, repaired
                if text := self.event(event):
                    texts.append(text)
        return texts

    def _joined(self, data: bytes) -> bytes:
        """Return an event's data with the first part of a split character moved to the event with the second."""
        if self._half and _SECOND_HALF.search(data) is not None:
            half, self._half = self._half, b""
            data = _SECOND_HALF.sub(lambda _: half, data, count=1)
        if (found := _FIRST_HALF.search(data)) is not None:
            self._half = found.group()
            data = _FIRST_HALF.sub(b"", data, count=1)
        return data


def is_event_stream(body: bytes) -> bool:
    """Return True if a body holds events, whatever its content type."""
    return body.lstrip().startswith((b"data:", b"event:", b":", b"id:", b"retry:"))


def read_other(error: DecodeError, reply: HTTPReply, reader: StreamReader | None) -> Completion:
    """Read a body that is not a JSON object.

    It may be a stream in one piece (from a cassette, or unrequested); otherwise its error is raised.
    """
    if reader is None or not is_event_stream(reply.body):
        error.status, error.request_id = reply.status, request_id(reply.headers)
        raise error
    reader.feed(reply.body)
    return reader.finish(reply)


A = TypeVar("A")

# Only encodings that every client can decode: eight recorded exchanges were brotli for clients that could not read
# it.
ACCEPT_ENCODING = "gzip, deflate"
_DEEPEST = 200
_USER_AGENT = f"aggregator/{__version__}"
_PLAIN = (str, int, float)


def _plain(value: Any) -> Any:
    """Return a value of a subclass of JSON's types as the type itself, such as numpy's float64 and str_."""
    kind = next((kind for kind in _PLAIN if isinstance(value, kind)), None)
    if kind is not None:
        return kind(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError


_encode = msgspec.json.Encoder(enc_hook=_plain).encode


# ---- requests


def to_json(body: Any) -> bytes:
    """Return a request's body as JSON; raises ConfigError with the unsupported value and its path."""
    try:
        return _encode(body)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        found = _not_json(body, "$")
        raise ConfigError(
            "Expected a request that JSON can hold, got " + (f"{found[1]} - at {found[0]}" if found else str(error))
        ) from error


def _not_json(value: Any, at: str, depth: int = 0) -> tuple[str, str] | None:
    """Return the path of the first value that JSON does not support, and its type."""
    if depth > _DEEPEST:
        return at, f"more than {_DEEPEST} levels"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return at, f"a text with half a character (a lone surrogate), {value[:40]!r}; replace it"
        return None
    parts: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Struct):
        parts = ((f"{at}.{name}", getattr(value, name)) for name in value.__struct_fields__)
    elif isinstance(value, Mapping):
        parts = ((f"{at}.{name}", part) for name, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        parts = ((f"{at}[{i}]", part) for i, part in enumerate(value))
    else:
        try:
            _encode(value)
        except (TypeError, ValueError, OverflowError):
            kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
            return at, f"a value of type {kind}; give a plain number or text"
    return next((found for where, part in parts if (found := _not_json(part, where, depth + 1))), None)


def words(**meanings: str) -> Mapping[str, FinishReason]:
    """Return a table of finish reasons: ours = the provider's, separated by blanks.

    >>> words(stop="COMPLETE STOP_SEQUENCE", length="MAX_TOKENS")["max_tokens"]
    'length'
    """
    return {word.lower(): reason for reason, said in meanings.items() for word in said.split()}  # type: ignore[misc]


# ---- the base of JSON codecs


class JSONCodec(Generic[A]):
    """A codec for answers that are JSON objects; a subclass adds the specifics of its API.

    * `decoder` reads a body into the typed answer, leniently: every field optional.
    * `finish_words` maps the provider's finish reasons (lower case) to ours; any other is "error", none "stop".
    * `limit_fields` and `count_fields` are the fields of the body that limit an answer's tokens and count the answers,
      with dots for nesting: what `extra` sets there counts for the budget.
    * `kept_headers` are headers that a recording may hold; a final `*` matches any ending.
    * `marks` is a pattern of the models whose prompts the provider caches by marks in the request; None for no model.
    * `reader` reads this API's streams; None for an API without.
    """

    decoder: ClassVar[msgspec.json.Decoder[Any]]
    reader: ClassVar[type[EventReader] | None] = None
    finish_words: ClassVar[Mapping[str, FinishReason]] = {}
    requests: tuple[RateHeaders, ...] = ()
    tokens: tuple[RateHeaders, ...] = ()
    lacks: frozenset[str] = frozenset()
    corrections: tuple[str, ...] = ()
    limit_fields: ClassVar[tuple[str, ...]] = ("max_tokens",)
    count_fields: ClassVar[tuple[str, ...]] = ("n",)
    kept_headers: ClassVar[tuple[str, ...]] = ()
    marks: str | None = None

    def __init__(self, target: Target) -> None:
        self.target = target
        self._fixed = None if callable(target.api_key) else self._dress(target.api_key)
        self._secrets: tuple[str, ...] = () if self._fixed is None else self._fixed[2]

    # For a subclass to implement.

    def encode(self, call: ChatCall) -> HTTPRequest:
        """Return the request, usually by `self.post(url, body, call)`."""
        raise NotImplementedError

    def completion(self, answer: A, reply: HTTPReply) -> Completion:
        """Turn the typed answer into a Completion, usually by `self.completed(...)`; raises LLMError."""
        raise NotImplementedError

    # Inherited.

    def refuse_lacking(self, call: ChatCall) -> None:
        """Raise ConfigError for an option that this API lacks. A single answer is not an option."""
        for name in sorted(self.lacks):
            value = getattr(call, name)
            if value is not None and (name, value) != ("n", 1):
                raise ConfigError(
                    f"Expected no {name} for {self.target.provider}/{call.model}, whose API has none, got "
                    f"{name}={value!r}; leave it out"
                )

    def post(self, url: str, body: Mapping[str, Any] | Struct, call: ChatCall) -> HTTPRequest:
        """Build a request. The body keeps the order of its keys: the same call gives the same bytes.

        Headers are built once, unless the key is a function.
        """
        if self._fixed is not None:
            plain, streamed, secrets = self._fixed
        else:
            plain, streamed, secrets = self._dress(self._token())
            self._secrets = secrets
        headers = streamed if call.stream else plain
        return HTTPRequest(url=url, body=to_json(body), headers=headers, secrets=secrets, kept=self.kept_headers)

    def _token(self) -> str | None:
        """Return the current token; None if the function has none, whose error is raised when a request is sent."""
        key = self.target.api_key
        try:
            found: Any = key() if callable(key) else key
        except Exception:  # noqa: BLE001 - of the user's function, whatever it raises
            return None
        return found if isinstance(found, str) else None

    def _dress(self, key: str | None) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
        """Return the headers of a plain and of a streamed request, and the secrets in them."""
        own = self.target.headers
        headers = {
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": ACCEPT_ENCODING,
            "user-agent": _USER_AGENT,
            **own,
        }
        if key:
            headers[self.target.auth] = f"Bearer {key}" if self.target.auth == "authorization" else key
        hidden = [value.split()[-1] for name, value in own.items() if is_secret_header(name) and value]
        secrets = tuple(dict.fromkeys([*([key] if key else []), *hidden]))
        return headers, {**headers, "accept": "text/event-stream"}, secrets

    def corrected(self, call: ChatCall, error: APIStatusError) -> ChatCall | None:
        """Return None: by default no refusal is understood."""
        return None

    def limits(self, call: ChatCall) -> Limits:
        """Return the limits in the request for this call. A negative number of tokens is no limit."""
        tokens, answers = call.max_tokens, call.n
        if call.extra:  # merged into the body last
            tokens = _largest(call.extra, self.limit_fields, tokens)
            answers = _largest(call.extra, self.count_fields, answers)
        return Limits(None if tokens is None or tokens < 0 else tokens, 1 if answers is None else answers)

    def mark(self, call: ChatCall) -> Mark | None:
        """Return the end of the shared prompt prefix, if this API has cache marks and the prompt has such a prefix."""
        return find_mark(call.messages) if self.marks is not None and re.search(self.marks, call.model) else None

    def decode(self, reply: HTTPReply, call: ChatCall) -> Completion:
        """Read an answer, also a stream that came in one piece; raises LLMError without one."""
        try:
            answer = read(reply.body, self.decoder)
        except DecodeError as error:
            scrub(error, self._secrets)
            return read_other(error, reply, None if self.reader is None else self.stream(call))
        return self.completion(answer, reply)

    def error(self, reply: HTTPReply) -> APIStatusError:
        """Return the error of an error status; a 429 without Retry-After gets the time until its limit is reset."""
        error = status_error(reply, self.target.provider, self._secrets)
        if reply.status == 429 and error.retry_after is None:
            error.retry_after = reset_wait(reply.headers, (*self.requests, *self.tokens))
        return error

    def stream(self, call: ChatCall) -> StreamReader:
        """Return a reader for a streamed answer; raises ConfigError for an API without streams."""
        if self.reader is None:
            raise ConfigError(
                f"Expected no stream from {self.target.provider}, whose codec has no reader; use complete"
            )
        return self.reader(self, call)

    def fault(self, data: Any, reply: HTTPReply) -> LLMError:
        """Return the error in an answer of status 200."""
        return fault_inside(data, reply, self.target.provider, self._secrets)

    def empty(self, wanted: str, reply: HTTPReply) -> LLMError:
        """Return the error of an answer without its essential part: that of a status or word in it, if it has one."""
        with suppress(DecodeError):  # a stream
            body = parse(reply.body)
            if isinstance(body, dict) and fault_of(body).message:
                found = self.fault(body, reply)
                if type(found) is not ResponseError:
                    return found
        error = EmptyResponseError(
            f"Expected {wanted} from {self.target.provider}, got none in {excerpt(reply.body)}",
            status=reply.status,
            request_id=request_id(reply.headers),
        )
        return scrub(error, self._secrets)

    def finish_reason(self, word: str | None) -> FinishReason:
        """Return our finish reason for the provider's; "error" for one that is not known to be good."""
        if not word:
            return "stop"
        return self.finish_words.get(word) or self.finish_words.get(word.lower(), "error")

    def completed(
        self,
        reply: HTTPReply,
        choices: Iterable[Choice],
        *,
        usage: Usage,
        model: str | None = None,
        answer_id: str | None = None,
        service_tier: str | None = None,
    ) -> Completion:
        """Build a Completion from its parts and the facts of the reply."""
        return Completion(
            choices=tuple(choices),
            usage=usage,
            model=model or "",
            id=answer_id or "",
            request_id=request_id(reply.headers),
            milliseconds=reply.milliseconds,
            replayed=reply.replayed,
            raw=reply.body,
            service_tier=service_tier,
        )


def _largest(extra: Mapping[str, Any], fields: tuple[str, ...], ours: int | None) -> int | None:
    """Return the largest int under one of the fields in `extra`, otherwise ours."""
    found: list[int] = []
    for path in fields:
        node: Any = extra
        for name in path.split("."):
            node = node.get(name) if isinstance(node, Mapping) else None
        if type(node) is int:
            found.append(node)
    return max(found, default=ours)


_SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie|password", re.IGNORECASE)


def is_secret_header(name: str) -> bool:
    """Return True if a header authenticates, by its name.

    >>> is_secret_header("Helicone-Auth"), is_secret_header("x-portkey-api-key"), is_secret_header("x-title")
    (True, True, False)
    """
    return _SECRET_HEADER.search(name) is not None
