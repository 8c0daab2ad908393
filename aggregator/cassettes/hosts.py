"""Which requests a cassette leaves to the network: telemetry, downloads of tables, applications under test."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from aggregator.errors import ConfigError

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
    "*.scarf.sh",
    "api.segment.io",
    "api.mixpanel.com",
    "*.amplitude.com",
    "huggingface.co/api/telemetry",
    "api.gradio.app/gradio-initiated-analytics",
    "t.explodinggradients.com",  # ragas
    "169.254.169.254",  # credentials of a cloud machine
    "metadata.google.internal",
)
"""What is left out by default: it is no part of what a test or an agent asks, and is different in every run."""

LOCALHOST = ("localhost", "127.0.0.1", "[::1]", "0.0.0.0")  # noqa: S104 - compared with addresses, never bound


def ignored_by(hosts: str | Sequence[str] | None, *, localhost: bool = False) -> tuple[str, ...]:
    """Return the hosts to leave out: those given beside the default ones; none at all for None.

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
    """Return True if a request to this address is left out.

    An entry is a host, `*` standing for any beginning or end of it, with a port or not, and the beginning of a path or
    not.

    >>> is_ignored("https://eu.i.posthog.com/batch?x=1", IGNORED_HOSTS)
    True
    >>> is_ignored("https://api.openai.com/v1/responses", IGNORED_HOSTS)
    False
    """
    return bool(hosts) and _is_ignored(url.partition("?")[0].partition("#")[0], hosts)


@lru_cache(maxsize=1024)
def _is_ignored(address: str, hosts: tuple[str, ...]) -> bool:
    _, _, rest = address.partition("//")
    place, _, path = rest.partition("/")
    place = place.rpartition("@")[2].lower()
    name = place if place.endswith("]") else place.rpartition(":")[0] or place
    return any(_matches(name, place, f"/{path}", entry) for entry in hosts)


def _matches(name: str, place: str, path: str, entry: str) -> bool:
    host, slash, prefix = entry.partition("/")
    found = place if host.rpartition(":")[2].isdigit() and not host.endswith("]") else name
    if "*" in host:
        before, _, after = host.partition("*")
        is_host = found.startswith(before) and found.endswith(after) and len(found) >= len(before) + len(after)
    else:
        is_host = found == host
    return is_host and (
        not slash or path == f"/{prefix}" or path.startswith((f"/{prefix}/", f"/{prefix.rstrip('/')}/"))
    )


def host_of(url: str) -> str:
    """Return the host of an address, without its port.

    >>> host_of("https://me@Example.com:8080/v1")
    'example.com'
    """
    place = url.partition("//")[2].partition("/")[0].partition("?")[0].rpartition("@")[2].lower()
    return place if place.endswith("]") else place.rpartition(":")[0] or place
