"""Hosts that a cassette ignores: telemetry, price tables, the application under test, and those that a user names."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import requests
import urllib3
from loopback import LoopbackHandler, LoopbackServer, serve

import aggregator
from aggregator.cassettes.rules import IGNORED_HOSTS, ignored_by, is_ignored
from aggregator.errors import CassetteMissError, ConfigError
from aggregator.llm.client import LLM


class Handler(LoopbackHandler):
    def answer(self) -> None:
        self.read_body()
        self.server.hits += 1
        message = {"role": "assistant", "content": f"answer {self.server.hits}"}
        choices = [{"index": 0, "message": message}]
        self.reply(json.dumps({"n": self.server.hits, "model": "m", "choices": choices}).encode())

    do_POST = answer  # noqa: N815 - the base class's name


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    """A loopback server that numbers its answers."""
    with serve(Handler) as running:
        yield running


def by_httpx(url: str) -> int:
    return int(httpx.post(url, content=b"{}").json()["n"])


def by_requests(url: str) -> int:
    return int(requests.post(url, data=b"{}", timeout=5).json()["n"])


def by_urllib3(url: str) -> int:
    with urllib3.PoolManager() as pool:
        return int(json.loads(pool.request("POST", url, body=b"{}").data)["n"])


def by_urllib(url: str) -> int:
    with urllib.request.urlopen(urllib.request.Request(url, data=b"{}"), timeout=5) as response:
        return int(json.load(response)["n"])


def by_http_client(url: str) -> int:
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    connection.connect()
    connection.request("POST", parts.path, body=b"{}")
    number = int(json.load(connection.getresponse())["n"])
    connection.close()
    return number


CLIENTS = [by_httpx, by_requests, by_urllib3, by_urllib, by_http_client]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    "entry", ["127.0.0.1", "127.0.0.1:{port}", "127.0.0.1/telemetry", "http://127.0.0.1/telemetry/"]
)
def test_an_ignored_host_is_reached_live(client: Callable[[str], int], entry: str, tmp_path: Path, server: Any) -> None:
    """Its requests are neither recorded nor played nor refused, in any mode and by any client."""
    url, path = f"{server.url}/telemetry/batch", tmp_path / "a.yaml"
    hosts = [entry.format(port=server.server_port)]
    for mode in ("once", "none"):
        with aggregator.cassette(path, mode, clients="all", ignore_hosts=hosts) as tape:
            assert client(url) == server.hits
        assert (tape.recorded, tape.misses) == (0, [])
    assert server.hits == 2


@pytest.mark.parametrize("client", CLIENTS)
def test_other_paths_of_an_ignored_host_are_recorded(client: Callable[[str], int], tmp_path: Path, server: Any) -> None:
    """An entry with a path ignores only the paths below it."""
    path, hosts = tmp_path / "a.yaml", ["127.0.0.1/telemetry"]
    with aggregator.cassette(path, "once", clients="all", ignore_hosts=hosts) as tape:
        assert (client(f"{server.url}/v1"), client(f"{server.url}/telemetry"), client(f"{server.url}/v1")) == (1, 2, 3)
    assert tape.recorded == 2
    with aggregator.cassette(path, "none", clients="all", ignore_hosts=hosts):
        assert (client(f"{server.url}/v1"), client(f"{server.url}/telemetry"), client(f"{server.url}/v1")) == (1, 4, 3)


async def test_this_machine_is_ignored_on_request(tmp_path: Path, server: Any) -> None:
    """`ignore_localhost` ignores every name of this machine, for our own client too."""
    llm = LLM("openai/m", base_url=f"{server.url}/v1", api_key="x", max_attempts=1)
    with aggregator.cassette(tmp_path / "a.yaml", "none", clients="all", ignore_localhost=True):
        assert by_httpx(server.url.replace("127.0.0.1", "localhost")) == 1
        assert (await llm.complete("hello")).text == "answer 2"
    with aggregator.cassette(tmp_path / "a.yaml", "once", clients="all") as tape:
        assert by_httpx(server.url) == 3
    assert tape.recorded == 1


def test_an_unlisted_client_may_reach_an_ignored_host(tmp_path: Path, server: Any) -> None:
    """While a tape plays, its requests to any other host are refused."""
    with aggregator.cassette(tmp_path / "a.yaml", "none", clients=["httpx"], ignore_hosts=["127.0.0.1/ok"]) as tape:
        assert by_requests(f"{server.url}/ok") == 1
        with pytest.raises(CassetteMissError):
            by_requests(f"{server.url}/other")
        tape.misses.clear()


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com/v1/traces/ingest",
        "https://raw.githubusercontent.com/BerriAI/litellm/main/model_prices_and_context_window.json",
        "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken",
        "https://api.smith.langchain.com/runs/batch",
        "https://us.i.posthog.com/batch/",
        "https://o1234.ingest.us.sentry.io/api/1/envelope/",
        "https://telemetry.crewai.com:4319/v1/traces",
        "http://testserver/items?x=1",
        "http://169.254.169.254/latest/meta-data/",
        "https://otlp-http-intake.logs.datadoghq.com/v1/logs",
        "https://api.wandb.ai/graphql",
        "https://www.comet.com/opik/api/v1/private/traces/batch",
        "https://westus-0.in.applicationinsights.azure.com/v2.1/track",
    ],
)
def test_telemetry_made_replays_fail(url: str) -> None:
    """It is sent by a timer, or by the first test only, and its ids differ in every run."""
    assert is_ignored(url, IGNORED_HOSTS)
    assert not is_ignored(url, ignored_by(None))


@pytest.mark.parametrize(
    ("entry", "url", "expected"),
    [
        ("api.example.com:443", "https://api.example.com/v1", True),
        ("api.example.com:443", "http://api.example.com/v1", False),
        ("api.example.com/v1/*", "https://api.example.com/v1/a", True),
        ("*.example.*", "https://a.example.org:8080/", True),
        ("*.example.com", "https://evil.org/a.example.com/", False),
        ("*.example.com", "https://example.com/", False),
        ("10.0.*:8000", "http://10.0.3.4:8000/x", True),
    ],
)
def test_entries_of_ignored_hosts(entry: str, url: str, expected: bool) -> None:
    """The scheme's default port, several stars and a star in the path are supported."""
    assert is_ignored(url, ignored_by([entry])) is expected


def test_other_names_of_this_machine_were_recorded() -> None:
    """Every loopback address and every name below `localhost` is this machine."""
    local = ignored_by((), localhost=True)
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.2", "[::1]:9", "app.localhost"):
        assert is_ignored(f"http://{host}/v1", local)
    assert not is_ignored("http://localhost.example.com/", local)


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com/v1/chat/completions",
        "https://api.openai.com/v1/traces/ingested",
        "https://raw.githubusercontent.com/acme/repo/main/x.json",
        "https://notposthog.com/",
        "https://huggingface.co/api/models",
        "http://testserver.example.com/",
        "http://localhost:8000/v1",
    ],
)
def test_a_tests_own_requests_are_not_telemetry(url: str) -> None:
    """A host must match completely, a path from its start, segment by segment."""
    assert not is_ignored(url, IGNORED_HOSTS)


@pytest.mark.parametrize("wrong", [[5], [""], [None]])
def test_an_invalid_host_is_refused(wrong: Any) -> None:
    """An entry must be a string."""
    with pytest.raises(ConfigError, match="Expected ignore_hosts as a list of names"):
        ignored_by(wrong)
