"""One call to a model, and the parts of a provider: the types between the client and the codecs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from aggregator.errors import APIStatusError, ConfigError
from aggregator.records import Completion, HTTPReply, HTTPRequest
from aggregator.text import one_line

if TYPE_CHECKING:
    from aggregator.llm.messages import Mark


class ChatCall(Struct, frozen=True, kw_only=True, gc=False):
    """One question to a model, in OpenAI's format whatever the provider; None means "not set".

    `messages` are OpenAI-shaped dicts (see `messages.normalise`). `extra` is merged into the body last, so it can add
    or replace any field of the provider's API. `corrections` are those that a server requested in a refusal (see
    `Codec.corrected`).
    """

    model: str
    messages: tuple[dict[str, Any], ...]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    n: int | None = None
    response_format: Mapping[str, Any] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    stream: bool = False
    extra: Mapping[str, Any] = {}
    corrections: frozenset[str] = frozenset()


ApiKey = str | Callable[[], str]
"""A key, or a function that returns the current token (Azure and Vertex tokens expire)."""


class Target(Struct, frozen=True, kw_only=True):
    """Where a codec sends its calls and how they authenticate.

    `auth` is the header of the key; in `authorization` it is a bearer token. `options` are the small differences within
    one wire format (see `providers.py`).
    """

    provider: str
    model: str
    base_url: str
    api_key: ApiKey | None = None
    auth: str = "authorization"
    headers: Mapping[str, str] = {}
    options: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.provider}/{self.model} at {self.base_url})"  # never the key


class StreamReader(Protocol):
    """Reads one streamed answer from bytes as they arrive; keeps state, does no I/O."""

    def feed(self, data: bytes) -> list[str]:
        """Feed the next bytes, cut anywhere; return the text deltas they complete.

        Raises LLMError for an error inside the stream.
        """
        ...

    def finish(self, reply: HTTPReply) -> Completion:
        """Return the whole answer once the body has ended; raises LLMError if it was cut short.

        A server that ignores `stream` answers in one piece: then no delta came, and only the completion has the text.
        """
        ...


class RateHeaders(Struct, frozen=True):
    """The headers in which a server describes one rate limit: what is left, the limit, when it is full again.

    `reset` is "" if the server states no time; its limit then counts per minute.
    """

    remaining: str
    limit: str
    reset: str = ""


class Limits(Struct, frozen=True, gc=False):
    """The limits in a request: tokens per answer (None: no limit) and the number of answers."""

    tokens: int | None = None
    answers: int = 1


class Codec(Protocol):
    """One provider's wire format, bound to one target: pure functions between our records and bytes.

    `codecs.base.JSONCodec` implements all of it except `encode`, and needs a `completion`. Of several rate limit
    headers the first one in an answer is used.
    """

    @property
    def requests(self) -> tuple[RateHeaders, ...]:
        """The headers of the limits on requests."""
        ...

    @property
    def tokens(self) -> tuple[RateHeaders, ...]:
        """The headers of the limits on tokens."""
        ...

    @property
    def lacks(self) -> frozenset[str]:
        """The fields of `ChatCall` that the API does not have."""
        ...

    def encode(self, call: ChatCall) -> HTTPRequest:
        """Return the request; the same call gives the same bytes. Raises ConfigError for options that the API lacks."""
        ...

    @property
    def corrections(self) -> tuple[str, ...]:
        """The corrections that `corrected` can add to a call."""
        ...

    def corrected(self, call: ChatCall, error: APIStatusError) -> ChatCall | None:
        """Return the call as corrected by a refusal, under its own name of a field; None if it names nothing known."""
        ...

    def limits(self, call: ChatCall) -> Limits:
        """Return the limits in the request for this call, including those in `extra`."""
        ...

    def mark(self, call: ChatCall) -> Mark | None:
        """Return the end of the shared prompt prefix that the request of this call marks for the provider's cache."""
        ...

    def decode(self, reply: HTTPReply, call: ChatCall) -> Completion:
        """Read a reply of status < 400; raises LLMError.

        ResponseError or a subclass for an unusable answer; an error inside a 200 gets the class that its own code names
        (RateLimitError for `{"error": {"code": 429, ...}}`), or ResponseError without one. A choice that the provider
        ended for a reason that is not known to be good has the finish reason "error".
        """
        ...

    def error(self, reply: HTTPReply) -> APIStatusError:
        """Return the error of a reply of status >= 300."""
        ...

    def stream(self, call: ChatCall) -> StreamReader:
        """Return a reader for the answer to a call with `stream=True`."""
        ...


class Provider(Struct, frozen=True, kw_only=True):
    """One provider as a value. An entry point of the group `aggregator.providers` refers to one.

    `codec` makes the codec for a target. `apis` are its wire formats by name (`api=` of `LLM`) if it has several, and
    `only` maps such a name to a pattern of the models that no other of them serves. `keys` maps each environment
    variable for a key, the first one set wins, to its header. `base_urls` are the variables that may hold another
    address. `settle` completes the target from the environment. `bare_names` is a pattern of model names that need no
    prefix. `priced_as` is the name under which genai-prices lists the provider's prices, if that is not `name`; models
    whose name has the `free_ending` cost nothing.
    """

    name: str
    codec: Callable[[Target], Codec]
    apis: Mapping[str, Callable[[Target], Codec]] = {}
    only: Mapping[str, str] = {}
    base_url: str | None = None
    keys: Mapping[str, str] = {}
    base_urls: tuple[str, ...] = ()
    needs_key: bool = True
    aliases: tuple[str, ...] = ()
    options: Mapping[str, Any] = {}
    settle: Callable[[Target, Mapping[str, str]], Target] | None = None
    bare_names: str | None = None
    priced_as: str | None = None
    free_ending: str | None = None


def as_tools(tools: Any) -> tuple[Mapping[str, Any], ...] | None:
    """Return tools as a tuple; raises ConfigError for anything but dicts in a list or another iterable."""
    if tools is None:
        return None
    if isinstance(tools, Iterable) and not isinstance(tools, str | bytes | Mapping):
        given = tuple(tools)
        if all(isinstance(tool, Mapping) for tool in given):
            return given
        tools = given
    raise ConfigError(f"Expected tools as a list of dicts, got {one_line(repr(tools), 200)}")


def check_choice_and_extra(tool_choice: Any, extra: Any) -> None:
    """Raise ConfigError for a tool choice, or fields for the body, that no codec can read."""
    if tool_choice is not None and not isinstance(tool_choice, str | Mapping):
        raise ConfigError(f"Expected tool_choice as a text or a dict, got {one_line(repr(tool_choice), 200)}")
    if extra is not None and not isinstance(extra, Mapping):
        raise ConfigError(f"Expected extra as a dict of fields of the request, got {one_line(repr(extra), 200)}")
