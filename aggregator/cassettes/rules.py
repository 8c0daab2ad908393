"""The rules of one tape, fixed when it is opened: which hosts it ignores, how it replays time, which faults it injects.

Delays and faults are pure functions of the tape: the same seed and cassette give the same ones, in any order of calls.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, Literal

from msgspec import Struct

from aggregator.cassettes.clients import families
from aggregator.cassettes.credentials import USUAL, Redaction
from aggregator.cassettes.matching import BeforeRequest, BeforeResponse, Ignore, MatchOn
from aggregator.errors import APIConnectionError, APITimeoutError, ConfigError
from aggregator.records import HTTPReply

# Time and faults

Latency = Literal["off", "recorded"] | float
FaultKind = Literal["rate_limit", "server_error", "timeout", "cut", "malformed"]
KINDS: tuple[FaultKind, ...] = ("rate_limit", "server_error", "timeout", "cut", "malformed")
_JSON = {"content-type": "application/json"}


def latency_scale(latency: Latency | str) -> float:
    """Return the factor of recorded times.

    >>> latency_scale("off"), latency_scale("recorded"), latency_scale(0.01)
    (0.0, 1.0, 0.01)
    """
    if latency == "off":
        return 0.0
    if latency == "recorded":
        return 1.0
    if isinstance(latency, str) or not 0 <= latency < math.inf:  # a wrong word, or a wrong number
        raise ConfigError(f'Expected latency "off", "recorded" or a number >= 0 to scale by, got {latency!r}')
    return float(latency)


class Faults(Struct, frozen=True, kw_only=True):
    """The probabilities of each fault before the recorded answer, for each attempt.

    A fault uses up no recorded answer: a client that retries gets it. A `malformed` reply takes the place of the
    answer, status 200. A call has at most `most` faults, so that a patient client succeeds.
    """

    rate_limit: float = 0.0
    server_error: float = 0.0
    timeout: float = 0.0
    cut: float = 0.0
    malformed: float = 0.0
    seed: int = 0
    most: int = 1
    retry_after: float = 1.0

    def __post_init__(self) -> None:
        """Check the probabilities."""
        rates = [getattr(self, kind) for kind in KINDS]
        if any(not 0 <= rate <= 1 for rate in rates) or sum(rates) > 1 + 1e-9:
            raise ConfigError(f"Expected fault rates in [0, 1] that sum to at most 1, got {rates!r}")

    def choose(self, key: bytes, lineage: str, ticket: int, attempt: int) -> FaultKind | None:
        """Return the fault of one attempt, None for none."""
        if attempt >= self.most:
            return None
        place = f"{self.seed}/{lineage}/{ticket}/{attempt}/".encode()
        draw = int.from_bytes(sha256(place + key).digest()[:8], "big") / 2**64
        for kind in KINDS:
            draw -= getattr(self, kind)
            if draw < 0:
                return kind
        return None

    def answer(self, kind: FaultKind) -> HTTPReply:
        """Return the reply of a fault, or raise its error as the transport would."""
        if kind == "timeout":
            raise APITimeoutError("Expected an answer within the deadline, got an injected fault")
        if kind == "cut":
            raise APIConnectionError("Expected a whole answer, got an injected fault: the connection was cut")
        if kind == "rate_limit":
            body = b'{"error":{"message":"injected fault: rate limit","code":"rate_limit_exceeded"}}'
            headers = {**_JSON, "retry-after": f"{self.retry_after:g}"}
            return HTTPReply(status=429, reason="Too Many Requests", body=body, headers=headers, replayed=True)
        if kind == "server_error":
            body = b'{"error":{"message":"injected fault: internal error","type":"server_error"}}'
            return HTTPReply(status=500, reason="Internal Server Error", body=body, headers=_JSON, replayed=True)
        return HTTPReply(
            status=200, reason="OK", body=b'{"id": "injected fault", "choices": [', headers=_JSON, replayed=True
        )


# Ignored hosts

IGNORED_HOSTS = (
    "testserver",  # the application under test, of Starlette and Django
    "api.openai.com/v1/traces/ingest",  # tracing of the OpenAI Agents SDK
    "raw.githubusercontent.com/BerriAI/litellm",  # litellm's table of prices
    "openaipublic.blob.core.windows.net/encodings",  # tiktoken's vocabularies
    "openaipublic.blob.core.windows.net/gpt-2",
    "*.smith.langchain.com",
    "*.langfuse.com/api/public",
    "*.posthog.com",  # CrewAI, Chroma, Haystack, ...
    "telemetry.crewai.com",
    "*.sentry.io",
    "logfire-*.pydantic.dev",
    "api.traceloop.com",
    "otlp.arize.com",
    "app.phoenix.arize.com",
    "api.agentops.ai",
    "api.honeycomb.io",
    "api.wandb.ai",
    "trace.wandb.ai",
    "app.langwatch.ai",
    "api.lunary.ai",
    "www.comet.com/opik",
    "*.datadoghq.com",
    "*.datadoghq.eu",
    "*.nr-data.net",  # New Relic
    "*.applicationinsights.azure.com",
    "*.google-analytics.com",
    "*.launchdarkly.com",
    "*.statsigapi.net",
    "*.scarf.sh",
    "*.segment.io",
    "*.mixpanel.com",
    "*.amplitude.com",
    "huggingface.co/api/telemetry",
    "api.gradio.app/gradio-initiated-analytics",
    "t.explodinggradients.com",  # ragas
    "169.254.169.254",  # credentials of a cloud machine
    "169.254.170.2",  # and of a container
    "metadata.google.internal",
)
"""Hosts left out by default: requests that a test or an agent does not make itself, or that differ in every run."""

LOCALHOST = ("localhost", "*.localhost", "127.0.0.1", "127.*", "[::1]", "0.0.0.0")  # noqa: S104 - compared with addresses, never bound


def ignored_by(hosts: str | Sequence[str] | None, *, localhost: bool = False) -> tuple[str, ...]:
    """Return the hosts to ignore: those given and the default ones; none at all for None.

    >>> ignored_by(None), ignored_by(["Example.com:8080/v1"])[-1]
    ((), 'example.com:8080/v1')
    """
    given: list[Any] = [hosts] if isinstance(hosts, str) else list(hosts or ())
    if not all(isinstance(host, str) and host for host in given):
        raise ConfigError(f"Expected ignore_hosts as a list of names such as 'telemetry.example.com', got {hosts!r}")
    plain = [host.partition("://")[2] or host for host in given]
    lowered = [f"{name.lower()}{slash}{path}" for name, slash, path in (host.partition("/") for host in plain)]
    return (*(() if hosts is None else IGNORED_HOSTS), *lowered, *(LOCALHOST if localhost else ()))


def is_ignored(url: str, hosts: tuple[str, ...]) -> bool:
    """Return True if a request to this address is ignored.

    An entry is a host, and optionally a port and the beginning of a path; `*` matches any text.

    >>> is_ignored("https://eu.i.posthog.com/batch?x=1", IGNORED_HOSTS)
    True
    >>> is_ignored("https://api.openai.com/v1/responses", IGNORED_HOSTS)
    False
    """
    return bool(hosts) and _is_ignored(url.partition("?")[0].partition("#")[0], hosts)


@lru_cache(maxsize=1024)
def _is_ignored(address: str, hosts: tuple[str, ...]) -> bool:
    scheme, _, rest = address.partition("//")
    place, _, path = rest.partition("/")
    place = place.rpartition("@")[2].lower()
    if not _PORT.search(place):
        place += ":443" if scheme.lower() == "https:" else ":80"
    return any(_pattern(entry).fullmatch(f"{place}/{path}") for entry in hosts)


_PORT = re.compile(r":\d+\Z")


@lru_cache(maxsize=256)
def _pattern(entry: str) -> re.Pattern[str]:
    host, slash, prefix = entry.partition("/")
    place = re.escape(host).replace(r"\*", "[^/]*") + ("" if _PORT.search(host) else r":\d+")
    path = f"/{re.escape(prefix.rstrip('/'))}(?:/.*)?".replace(r"\*", ".*") if slash else "/.*"
    return re.compile(place + path, re.DOTALL)


def host_of(url: str) -> str:
    """Return the host of an address, without its port.

    >>> host_of("https://me@Example.com:8080/v1")
    'example.com'
    """
    place = url.partition("//")[2].partition("/")[0].partition("?")[0].rpartition("@")[2].lower()
    return place if place.endswith("]") else place.rpartition(":")[0] or place


# The rules

LineageRule = Literal["strict", "prefer"]

Adopts = Literal["nothing", "threads", "everything"]
"""The calls without a tape in their context that belong to this one, if no other tape is open."""


class TapeRules(Struct, frozen=True, kw_only=True):
    """Rules by which a tape matches, plays and reports.

    `adopts`: "threads" takes the calls of plain threads, which start without a context; "everything" also those of
    every context without a tape, as in a pytest process; "nothing" leaves both to the network. `plays_failures=False`
    repeats recorded calls that failed instead of playing them. `raises_again=False` reports misses at the end instead
    of raising them again, as vcrpy does. `keeps_exchanges` keeps new exchanges in memory too, as `Tape.exchanges`.
    `expects_all=False` does not report unplayed exchanges. `code` permits source in recorded suggestions to run in this
    process, see `aggregator.agents.code`; source of sandboxed operations needs no permission. `ignore_hosts` are left
    to the network, see `aggregator.cassettes.rules`; `match_on` defines which requests are the same, see
    `aggregator.cassettes.matching`; with `allow_playback_repeats` a request that is made more often than it was
    recorded gets its last answer again; `before_request` and `before_response` are vcrpy's hooks. `like_vcrpy=True`
    copies two habits of vcrpy: requests of in-process transports are taken too, and streamed bodies are sent in one
    piece. `coded=True` leaves the bodies of other clients' answers compressed. `clients` are the other HTTP clients
    that use this tape, see `aggregator.cassettes.clients`.
    """

    lineage: LineageRule = "strict"
    ignore: Ignore = ()
    latency: Latency = "off"
    faults: Faults | None = None
    clients: str | Sequence[str] = ()
    adopts: Adopts = "threads"
    ignore_hosts: tuple[str, ...] = IGNORED_HOSTS
    match_on: MatchOn = None
    allow_playback_repeats: bool = False
    before_request: BeforeRequest | None = None
    before_response: BeforeResponse | None = None
    redaction: Redaction = USUAL
    like_vcrpy: bool = False
    coded: bool = False
    plays_failures: bool = True
    expects_all: bool = True
    raises_again: bool = True
    keeps_exchanges: bool = False
    code: bool | str | Collection[str] = False

    def __post_init__(self) -> None:
        """Reject invalid combinations of options, before anything is opened."""
        families(self.clients)
        if self.faults is not None and self.clients:
            raise ConfigError(
                f"Expected faults without clients, got both (clients={self.clients!r}): an injected fault reaches our "
                "own client alone, as others have exceptions of their own; leave one of them out"
            )
        if self.code is not False:
            from aggregator.agents.code import check_consent  # loads what only agents with trained code need

            check_consent(self.code)


DEFAULT_RULES = TapeRules()
