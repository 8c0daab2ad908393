"""Other clients in many threads: no call is live while a cassette plays, none is lost while one records."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import httpx
import pytest
import requests
import urllib3
from loopback import LoopbackHandler, LoopbackServer, serve

import aggregator
from aggregator.cassettes.storage import read

THREADS, CALLS = 16, 64
Ask = Callable[[int], int]


class Handler(LoopbackHandler):
    def answer(self) -> None:
        asked = self.read_body()
        with LOCK:
            self.server.hits += 1
            body = json.dumps({"n": self.server.hits, "asked": asked.decode()}).encode()
        self.reply(body)

    do_POST = answer  # noqa: N815 - the base class's name


boto3: Any = pytest.importorskip("boto3")
httplib2: Any = pytest.importorskip("httplib2")

pytestmark = pytest.mark.usefixtures("no_proxy")
LOCK = threading.Lock()
OPEN = ExitStack()
"""Closes what a test's clients have open."""


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    """A loopback server that numbers its answers."""
    with serve(Handler) as running:
        yield running
        OPEN.close()


def number(body: bytes | str) -> int:
    n: int = json.loads(body)["n"]
    return n


def by_requests(url: str) -> Ask:
    return lambda i: number(requests.post(f"{url}/v1", json={"i": i}, timeout=10).content)


def by_one_session(url: str) -> Ask:
    session = OPEN.enter_context(requests.Session())
    return lambda i: number(session.post(f"{url}/v1", json={"i": i}, timeout=10).content)


def by_urllib3(url: str) -> Ask:
    pool = urllib3.PoolManager(maxsize=4, block=True)
    OPEN.callback(pool.clear)
    return lambda i: number(pool.request("POST", f"{url}/v1", json={"i": i}).data)


def by_urllib(url: str) -> Ask:
    opener = build_opener(ProxyHandler({}))

    def ask(i: int) -> int:
        with opener.open(Request(f"{url}/v1", json.dumps({"i": i}).encode()), timeout=10) as answer:
            return number(answer.read())

    return ask


def by_http_client(url: str) -> Ask:
    port = int(url.rpartition(":")[2])
    held = threading.local()

    def ask(i: int) -> int:
        if not hasattr(held, "connection"):
            held.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            OPEN.callback(held.connection.close)
        held.connection.request("POST", "/v1", json.dumps({"i": i}))
        return number(held.connection.getresponse().read())

    return ask


def by_httplib2(url: str) -> Ask:
    def ask(i: int) -> int:
        client = httplib2.Http(timeout=10)
        try:
            return number(client.request(f"{url}/v1", "POST", json.dumps({"i": i}))[1])
        finally:
            client.close()

    return ask


def bedrock(url: str) -> Any:
    client = boto3.session.Session().client(
        "bedrock-runtime",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="AKIANOTAREALKEY00000",
        aws_secret_access_key="not-a-real-secret-not-a-real-secret-0000",
    )
    OPEN.callback(client.close)
    return client


def by_one_boto3_client(url: str) -> Ask:
    client = bedrock(url)
    return lambda i: number(client.invoke_model(modelId="m", body=json.dumps({"i": i}))["body"].read())


def by_a_boto3_client_each(url: str) -> Ask:
    clients = [bedrock(url) for _ in range(3)]
    return lambda i: number(clients[i % 3].invoke_model(modelId="m", body=json.dumps({"i": i}))["body"].read())


def by_httpx(url: str) -> Ask:
    client = OPEN.enter_context(httpx.Client(trust_env=False))
    return lambda i: number(client.post(f"{url}/v1", json={"i": i}).content)


WAYS = [
    by_requests,
    by_one_session,
    by_urllib3,
    by_urllib,
    by_http_client,
    by_httplib2,
    by_one_boto3_client,
    by_a_boto3_client_each,
    by_httpx,
]


def from_threads(ask: Ask) -> list[int]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(ask, range(CALLS)))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_calls_of_threads_were_live_in_mode_none(
    way: Callable[[str], Ask], server: LoopbackServer, tmp_path: Path
) -> None:
    """From any number of threads, over old and new connections, each call is played and none reaches the server."""
    path, ask = tmp_path / "a.yaml", way(server.url)
    with aggregator.cassette(path, "all", clients="all"):
        heard = [ask(i) for i in range(CALLS)]
    assert server.hits == CALLS
    for client in (ask, way(server.url)):  # one with open connections, and a new one
        with aggregator.cassette(path, "none", clients="all") as tape:
            assert from_threads(client) == heard
        assert (server.hits, tape.report) == (CALLS, [])
    assert ask(0) == CALLS + 1  # afterwards it reaches the server again
    assert from_threads(ask) != heard


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_recording_from_threads_lost_answers(way: Callable[[str], Ask], server: LoopbackServer, tmp_path: Path) -> None:
    """Answers that threads got while recording are complete on the tape, and replay."""
    path, ask = tmp_path / "a.yaml", way(server.url)
    with aggregator.cassette(path, "all", clients="all") as tape:
        heard = from_threads(ask)
        assert tape.recorded == CALLS
    recording = read(path)
    assert recording is not None
    assert len(recording.rows) == CALLS
    assert sorted(json.loads(row.reply().body)["n"] for row in recording.rows) == sorted(heard)
    with aggregator.cassette(path, "none", clients="all"):
        assert from_threads(ask) == heard
    assert server.hits == CALLS


def test_a_thread_started_before_is_recorded(server: LoopbackServer, tmp_path: Path) -> None:
    """Threads without the cassette's context, such as an older pool's, belong to the only open cassette."""
    path, ask = tmp_path / "a.yaml", by_one_session(server.url)
    begin, found = threading.Event(), []

    def work() -> None:
        begin.wait(10)
        found.append(ask(0))

    with aggregator.cassette(path, "all", clients="requests"):
        heard = ask(0)
    thread = threading.Thread(target=work)
    thread.start()
    with aggregator.cassette(path, "none", clients="requests"):
        begin.set()
        thread.join()
    assert (found, server.hits) == ([heard], 1)


def test_threads_of_two_cassettes_are_separate(server: LoopbackServer, tmp_path: Path) -> None:
    """While one thread plays, another with its own cassette records, and neither sees the other's calls."""
    path, ask = tmp_path / "a.yaml", by_one_session(server.url)
    with aggregator.cassette(path, "all", clients="requests"):
        heard = [ask(i) for i in range(8)]

    def recording() -> list[int]:
        with aggregator.cassette(tmp_path / "b.yaml", "all", clients="requests") as tape:
            answers = [ask(i) for i in range(8)]
            assert tape.recorded == 8
            return answers

    def playing() -> list[int]:
        with aggregator.cassette(path, "none", clients="requests"):
            return [ask(i) for i in range(8)]

    with ThreadPoolExecutor(2) as pool:
        live, played = pool.submit(recording), pool.submit(playing)
    assert played.result() == heard
    assert sorted(live.result()) == list(range(9, 17))
