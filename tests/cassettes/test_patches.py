"""What is specific to each client: transports, methods, bodies, failures, misses, unsupported features."""

from __future__ import annotations

import asyncio
import contextvars
import http.client
import io
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

import aiohttp
import anyio
import httpx
import pytest
import requests
import urllib3
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import LoopbackHandler, LoopbackServer, serve
from msgspec.structs import replace
from requests.adapters import HTTPAdapter

import aggregator
from aggregator.cassettes.clients import to_reply, to_request
from aggregator.cassettes.exchanges import Facts
from aggregator.cassettes.patches import patched
from aggregator.cassettes.storage import read
from aggregator.cassettes.traffic import MISS_STATUS, Answered, Noted, begin, observing
from aggregator.errors import CassetteMissError
from aggregator.records import HTTPRequest

boto3: Any = pytest.importorskip("boto3")
botocore_config: Any = pytest.importorskip("botocore.config")
httplib2: Any = pytest.importorskip("httplib2")
httpx_aiohttp: Any = pytest.importorskip("httpx_aiohttp")
tornado: Any = pytest.importorskip("tornado.httpclient")
trio: Any = pytest.importorskip("trio")
websockets: Any = pytest.importorskip("websockets")

pytestmark = pytest.mark.usefixtures("no_proxy")


class Handler(LoopbackHandler):
    def answer(self) -> None:
        server, body = self.server, self.read_body()
        server.hits += 1
        if server.drops:
            server.drops -= 1
            self.close_connection = True
        elif self.path.startswith("/moved"):
            self.reply(b"", 307, {"location": "/there"})
        else:
            self.reply(json.dumps({"n": server.hits, "method": self.command, "size": len(body)}).encode())

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = answer  # noqa: N815 - the base's names


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    """A loopback server that numbers its answers, and drops a given number of connections."""
    with serve(Handler) as running:
        yield running


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        return await work()

    with asyncio.Runner() as runner:
        return runner.run(whole(), context=contextvars.copy_context())


def both(path: Path, ask: Callable[[], Any], server: LoopbackServer, clients: Any = "all") -> tuple[Any, Any]:
    """Record and replay; the server must not be asked again."""
    with aggregator.cassette(path, "all", clients=clients):
        heard = ask()
    hits = server.hits
    with aggregator.cassette(path, "none", clients=clients):
        played = ask()
    assert server.hits == hits
    return heard, played


# methods and bodies


async def aiohttp_request(method: str, url: str, **known: Any) -> Any:
    async with aiohttp.ClientSession() as session, session.request(method, url, **known) as reply:
        return await reply.read()


@pytest.mark.parametrize("method", ["post", "Get", "PUT", "patch", "Delete", "pOsT", "options", "PROPFIND"])
def test_a_method_in_lower_case_made_the_file_unreadable(method: str, server: LoopbackServer, tmp_path: Path) -> None:
    """The hash covers what is read back, however the client writes it."""

    def ask() -> Any:
        return run(lambda: aiohttp_request(method, f"{server.url}/v1", data=b"x"))

    with suppress(AttributeError):
        heard, played = both(tmp_path / "a.yaml", ask, server)
        assert heard == played
    recording = read(tmp_path / "a.yaml")
    assert recording is not None
    assert [row.exchange().request.method for row in recording.rows] == [method.upper()]


def as_bytes(text: str | bytes | None) -> bytes:
    return text.encode() if isinstance(text, str) else text or b""


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,9}", fullmatch=True)
BODIES = st.binary(max_size=50) | TEXT.map(str.encode)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["post", "GET", "Patch", "M-SEARCH", "\u00fc"]) | NAMES,
    url=TEXT.map("http://x/{}".format),
    headers=st.dictionaries(NAMES, TEXT | TEXT.map(str.encode) | st.integers(), max_size=3),
    body=BODIES,
    status=st.integers(100, 599),
    reason=TEXT,
    answered=st.lists(st.tuples(st.sampled_from(["Content-Type", "retry-after", "X-Request-Id"]), TEXT), max_size=3),
    content=BODIES,
)
def test_every_field_of_an_exchange_is_read_back_as_it_was_written(tmp_path: Path, **given: Any) -> None:
    """Every field of a client's request and answer is stored in both layouts, and the request finds its answer."""

    def ask() -> tuple[int, bytes]:
        turn = begin("httpx", to_request(given["method"], given["url"], given["body"], given["headers"]))
        reply = to_reply(given["status"], given["reason"], given["answered"], given["content"])
        if turn.reply is None:
            turn.finish(reply)
        return (turn.reply or reply).status, (turn.reply or reply).body

    found = []
    for layout in ("readable", "journal"):
        path = tmp_path / f"{layout}.yaml"
        with aggregator.cassette(path, "all", clients="all", layout=layout, warn=False):
            heard = ask()
        with aggregator.cassette(path, "none", clients="all", warn=False) as tape:
            assert ask() == heard
            assert tape.unplayed() == []
        recording = read(path)
        assert recording is not None
        (exchange,) = (row.exchange() for row in recording.rows)
        found.append(replace(exchange, facts=Facts(lineage=""), reply=replace(exchange.reply, milliseconds=0.0)))
        (stock,) = yaml.load(path.read_bytes(), yaml.CSafeLoader)["interactions"]
        asked, answered = exchange.request, exchange.reply
        body, content = (as_bytes(text) for text in (stock["request"]["body"], stock["response"]["body"]["string"]))
        assert (stock["request"]["method"], stock["request"]["uri"], body) == (asked.method, asked.url, asked.body)
        assert (stock["response"]["status"], content) == (
            {"code": answered.status, "message": answered.reason},
            answered.body,
        )
        assert {name: "\n".join(values) for name, values in stock["response"]["headers"].items()} == answered.headers
    assert found[0] == found[1]


def upload_by_httpx(url: str) -> Any:
    return httpx.post(url, files={"file": ("a.mp3", b"\x00\xff" * 50)}, data={"model": "w"}).json()["size"] > 100


def upload_by_async_httpx(url: str) -> Any:
    async def ask() -> Any:
        async with httpx.AsyncClient() as client:
            return (await client.post(url, files={"file": ("a.mp3", b"\x00\xff" * 50)})).json()["size"] > 100

    return run(ask)


def upload_by_requests(url: str) -> Any:
    return requests.post(url, files={"file": ("a.mp3", io.BytesIO(b"\x00\xff" * 50))}, timeout=9).json()["size"] > 100


def upload_by_urllib3(url: str) -> Any:
    with urllib3.PoolManager() as pool:
        return pool.request("POST", url, fields={"file": ("a.mp3", b"\x00\xff" * 50)}).json()["size"] > 100


def upload_by_aiohttp(url: str) -> Any:
    form = aiohttp.FormData()
    form.add_field("file", io.BytesIO(b"\x00\xff" * 50), filename="a.mp3")
    return json.loads(run(lambda: aiohttp_request("POST", url, data=form)))["size"] > 100


def form_by_aiohttp(url: str) -> Any:
    return run(lambda: aiohttp_request("POST", url, data={"a": "1", "b": "ü"}))


def stream_by_aiohttp(url: str) -> Any:
    async def parts() -> Any:
        yield b"a"
        yield b"b"

    return run(lambda: aiohttp_request("POST", url, data=parts()))


def stream_by_httpx(url: str) -> Any:
    return httpx.post(url, content=iter([b"a", b"b"])).content


def stream_by_requests(url: str) -> Any:
    return requests.post(url, data=iter([b"a", b"b"]), timeout=9).content


def stream_by_http_client(url: str) -> Any:
    host, _, port = url.removeprefix("http://").partition("/")[0].partition(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.request("POST", "/v1", iter([b"a", b"b"]), encode_chunked=True, headers={"transfer-encoding": "chunked"})
    body = connection.getresponse().read()
    connection.close()
    return body


@pytest.mark.parametrize(
    "ask",
    [
        upload_by_httpx,
        upload_by_async_httpx,
        upload_by_requests,
        upload_by_urllib3,
        upload_by_aiohttp,
        form_by_aiohttp,
        stream_by_aiohttp,
        stream_by_httpx,
        stream_by_requests,
        stream_by_http_client,
    ],
    ids=lambda ask: ask.__name__,
)
def test_an_upload_never_replayed(ask: Callable[[str], Any], server: LoopbackServer, tmp_path: Path) -> None:
    """Forms and streamed bodies are sent completely while they are recorded, and find their answers in a replay."""
    heard, played = both(tmp_path / "a.yaml", lambda: ask(f"{server.url}/v1"), server)
    assert heard
    assert played == heard


# transports, back ends, sessions


def test_an_sdks_name_covered_one_of_its_transports_only(server: LoopbackServer, tmp_path: Path) -> None:
    """`clients=["openai"]` covers httpx, aiohttp below httpx, aiohttp itself and requests."""

    async def over_aiohttp() -> Any:
        async with httpx_aiohttp.HttpxAiohttpClient() as client:
            return (await client.post(f"{server.url}/v1", json={"a": 1})).json()["n"]

    def ask() -> list[Any]:
        return [
            run(over_aiohttp),
            json.loads(run(lambda: aiohttp_request("post", f"{server.url}/v1", json={"a": 2})))["n"],
            httpx.post(f"{server.url}/v1", json={"a": 3}).json()["n"],
            requests.post(f"{server.url}/v1", json={"a": 4}, timeout=9).json()["n"],
        ]

    for client in ("openai", "google-genai", "anthropic", "litellm"):
        heard, played = both(tmp_path / "a.yaml", ask, server, clients=[client])
        assert played == heard


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_httpx_under_trio_could_not_replay(backend: str, server: LoopbackServer, tmp_path: Path) -> None:
    """An async client replays under the event loop that recorded it, including recorded latency."""

    async def ask() -> Any:
        async with httpx.AsyncClient() as client:
            return (await client.post(f"{server.url}/v1", json={"a": 1})).json()["n"]

    heard, played = both(tmp_path / "a.yaml", lambda: anyio.run(ask, backend=backend), server)
    assert played == heard
    with aggregator.cassette(tmp_path / "a.yaml", "none", clients="httpx", latency="recorded"):
        assert anyio.run(ask, backend=backend) == heard


def test_a_session_with_a_base_url_records_whole_addresses(server: LoopbackServer, tmp_path: Path) -> None:
    """Another client's request to the whole address matches."""

    async def ask() -> Any:
        async with aiohttp.ClientSession(server.url) as session, session.post("/v1", json={"a": 1}) as reply:
            return (await reply.json())["n"]

    path = tmp_path / "a.yaml"
    heard, played = both(path, lambda: run(ask), server)
    assert played == heard
    with aggregator.cassette(path, "none", clients="all"):
        assert httpx.post(f"{server.url}/v1", json={"a": 1}).json()["n"] == heard


def test_redirects_cookies_and_middlewares_of_aiohttp_work(server: LoopbackServer, tmp_path: Path) -> None:
    """A replay runs the same session code: history, traces, `raise_for_status`."""
    seen: list[str] = []

    async def ask() -> Any:
        trace = aiohttp.TraceConfig()

        async def note(session: Any, context: Any, parameters: Any) -> None:
            seen.append(f"{parameters.method} {parameters.url.path}")

        trace.on_request_redirect.append(note)
        trace.on_request_end.append(note)
        async with (
            aiohttp.ClientSession(trace_configs=[trace], raise_for_status=True) as session,
            session.post(f"{server.url}/moved", json={"a": 1}) as reply,
        ):
            parts = [part async for part in reply.content.iter_chunked(7)]
            return len(reply.history), reply.method, b"".join(parts)

    heard, played = both(tmp_path / "a.yaml", lambda: run(ask), server)
    assert played == heard
    assert heard[:2] == (1, "POST")
    assert seen == ["POST /moved", "POST /there"] * 2


def test_a_request_of_aiohttp_that_fails_while_it_is_sent_is_recorded(server: LoopbackServer, tmp_path: Path) -> None:
    """The failure replays as the client's own exception, and the answer to the second attempt after it."""

    async def ask(*, fail: bool = False) -> Any:
        trace = aiohttp.TraceConfig()

        async def fail_headers(session: Any, context: Any, parameters: Any) -> None:
            raise aiohttp.ServerDisconnectedError

        if fail:
            trace.on_request_headers_sent.append(fail_headers)
        session = aiohttp.ClientSession(trace_configs=[trace])
        async with session, session.post(f"{server.url}/v1", json={"a": 1}) as reply:
            return (await reply.json())["n"]

    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, "once", clients="all"):
        with pytest.raises(aiohttp.ServerDisconnectedError):
            run(lambda: ask(fail=True))
        heard = run(ask)
    with aggregator.cassette(path, "none", clients="all"):
        with pytest.raises(aiohttp.ServerDisconnectedError):
            run(ask)
        assert run(ask) == heard


@pytest.mark.parametrize("streamed", [False, True])
def test_tornado_hung_while_it_was_recorded(streamed: bool, server: LoopbackServer, tmp_path: Path) -> None:
    """Its callback gets the answer, recorded or played, in one piece or through `streaming_callback`."""

    async def ask() -> Any:
        pieces: list[bytes] = []
        known = {"streaming_callback": pieces.append} if streamed else {}
        client = tornado.AsyncHTTPClient(force_instance=True)
        reply = await client.fetch(f"{server.url}/v1", method="POST", body="x", **known)
        client.close()
        return b"".join(pieces) if streamed else reply.body, reply.headers["content-type"]

    heard, played = both(tmp_path / "a.yaml", lambda: run(ask), server)
    assert played == heard
    assert json.loads(heard[0])["n"] == 1


def test_a_miss_of_tornado_is_raised_by_fetch(server: LoopbackServer, tmp_path: Path) -> None:
    """No caller waits for ever."""

    async def ask() -> Any:
        return await tornado.AsyncHTTPClient(force_instance=True).fetch(f"{server.url}/v1")

    with pytest.raises(CassetteMissError), aggregator.cassette(tmp_path / "a.yaml", "none", clients="tornado"):
        run(ask)
    assert server.hits == 0


def test_an_app_under_test_never_ran_in_the_replay(tmp_path: Path) -> None:
    """In-process transports are not intercepted: they reach the code under test."""
    ran: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ran.append("asgi")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    def wsgi(environ: Any, start: Any) -> list[bytes]:
        ran.append("wsgi")
        start("200 OK", [])
        return [b"ok"]

    def mock(request: httpx.Request) -> httpx.Response:
        ran.append("mock")
        return httpx.Response(200, text="ok")

    async def ask() -> None:
        for transport in (httpx.ASGITransport(app), httpx.MockTransport(mock)):
            async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
                assert (await client.get("/")).text == "ok"

    def whole() -> None:
        run(ask)
        for transport in (httpx.WSGITransport(wsgi), httpx.MockTransport(mock)):
            with httpx.Client(transport=transport, base_url="http://testserver") as client:
                assert client.get("/").text == "ok"

    with aggregator.cassette(tmp_path / "a.yaml", "all", clients="all") as tape:
        whole()
        assert tape.recorded == 0
    with aggregator.cassette(tmp_path / "a.yaml", "none", clients="all", warn=False):
        whole()
    assert ran == ["asgi", "mock", "wsgi", "mock"] * 2


# failures


def nobody() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def probe_httpx(url: str) -> None:
    httpx.get(url)


def probe_async_httpx(url: str) -> None:
    async def ask() -> None:
        async with httpx.AsyncClient() as client:
            await client.get(url)

    run(ask)


def probe_aiohttp(url: str) -> None:
    run(lambda: aiohttp_request("GET", url))


def probe_requests(url: str) -> None:
    requests.get(url, timeout=9)


def probe_urllib3(url: str) -> None:
    with urllib3.PoolManager(retries=False) as pool:
        pool.request("GET", url)


def probe_urllib(url: str) -> None:
    try:
        build_opener(ProxyHandler({})).open(Request(url), timeout=9)
    except URLError as error:
        raise error.reason if isinstance(error.reason, Exception) else error from error


def probe_http_client(url: str) -> None:
    host, _, port = url.removeprefix("http://").partition("/")[0].partition(":")
    connection = http.client.HTTPConnection(host, int(port) if port else 80)
    try:
        connection.request("GET", "/")
        connection.getresponse()
    finally:
        connection.close()


def probe_httplib2(url: str) -> None:
    client = httplib2.Http(timeout=9)
    try:
        client.request(url)
    finally:
        client.close()


def probe_tornado(url: str) -> None:
    async def ask() -> None:
        await tornado.AsyncHTTPClient(force_instance=True).fetch(url)

    run(ask)


def probe_boto3(url: str) -> None:
    client = boto3.session.Session().client(
        "bedrock-runtime",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="AKIANOTAREALKEY00000",
        aws_secret_access_key="not-a-real-secret-not-a-real-secret-0000",
        config=botocore_config.Config(retries={"max_attempts": 1}),
    )
    client.invoke_model(modelId="m", body=b"{}")


PROBES = [
    probe_httpx,
    probe_async_httpx,
    probe_aiohttp,
    probe_requests,
    probe_urllib3,
    probe_urllib,
    probe_http_client,
    probe_httplib2,
    probe_tornado,
    probe_boto3,
]


def failure_of(probe: Callable[[str], None], url: str) -> tuple[type[BaseException], int | None]:
    try:
        probe(url)
    except Exception as error:  # noqa: BLE001 - each client has its own
        number = getattr(error, "errno", None) or getattr(getattr(error, "os_error", None), "errno", None)
        return type(error), number
    raise AssertionError("no failure")


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
@pytest.mark.parametrize(
    "kind",
    ["refused", "dropped", pytest.param("unknown host", marks=pytest.mark.long)],  # a resolver may be slow
)
def test_a_probe_that_failed_made_the_tape_unplayable(
    probe: Callable[[str], None], kind: str, server: LoopbackServer, tmp_path: Path
) -> None:
    """Code that handles a failed connection gets the same exception in a replay, and continues."""
    url = {"refused": nobody(), "unknown host": "http://no-such-host.invalid", "dropped": server.url}[kind]

    def agent() -> Any:
        server.drops = 9 if kind == "dropped" else 0
        failed = failure_of(probe, url)
        server.drops = 0
        return failed, requests.post(f"{server.url}/v1", json={}, timeout=9).json()["n"]

    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, "all", clients="all"):
        heard = agent()
    hits = server.hits
    with aggregator.cassette(path, "none", clients="all") as tape:
        assert agent() == heard
        assert (tape.unplayed(), tape.misses) == ([], [])
    assert server.hits == hits


def open_by_urllib(url: str) -> None:
    build_opener(ProxyHandler({})).open(Request(url), timeout=9)


@pytest.mark.parametrize("probe", [*PROBES, open_by_urllib], ids=lambda probe: probe.__name__)
@pytest.mark.parametrize(
    "kind",
    ["refused", "dropped", "no TLS", pytest.param("unknown host", marks=pytest.mark.long)],
)
def test_urllib_raised_another_error_inside_a_cassette(
    probe: Callable[[str], None], kind: str, server: LoopbackServer, tmp_path: Path
) -> None:
    """A client's exception is the same without a cassette, while recording and in a replay."""
    urls = {"refused": nobody(), "unknown host": "http://no-such-host.invalid", "dropped": server.url}
    url = urls.get(kind, server.url.replace("http:", "https:"))
    if kind == "no TLS" and probe in (probe_http_client, probe_boto3):
        pytest.skip("it has no address with a scheme, or a certificate of its own")

    def failure() -> type[BaseException]:
        server.drops = 9 if kind == "dropped" else 0
        found = failure_of(probe, url)[0]
        server.drops = 0
        return found

    expected = failure()
    for mode in ("all", "none"):
        with aggregator.cassette(tmp_path / "a.yaml", mode, clients="all"):
            assert failure() is expected


def test_a_dropped_connection_with_retries_was_a_miss(server: LoopbackServer, tmp_path: Path) -> None:
    """urllib3's Retry asks again in the replay, and gets the recorded answer."""

    def ask() -> Any:
        with requests.Session() as session:
            retry = urllib3.Retry(3, backoff_factor=0.01, allowed_methods=None)
            session.mount("http://", HTTPAdapter(max_retries=retry))
            return session.post(f"{server.url}/v1", json={"a": 1}, timeout=9).json()["n"]

    server.drops = 2
    heard, played = both(tmp_path / "a.yaml", ask, server)
    assert (heard, played) == (3, 3)


def test_a_timeout_replays_at_once_as_a_timeout(tmp_path: Path) -> None:
    """A server that does not answer in time is recorded as a timeout, for each kind of client."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        limit = aiohttp.ClientTimeout(total=0.2)
        asks: list[tuple[Callable[[], Any], type[BaseException]]] = [
            (lambda: httpx.get(url, timeout=0.2), httpx.ReadTimeout),
            (lambda: requests.get(url, timeout=0.2), requests.ReadTimeout),
            (lambda: run(lambda: aiohttp_request("GET", url, timeout=limit)), TimeoutError),
            (lambda: build_opener(ProxyHandler({})).open(Request(url), timeout=0.2), TimeoutError),
        ]
        for mode in ("all", "none"):
            for number, (ask, kind) in enumerate(asks):
                with aggregator.cassette(tmp_path / f"{number}.yaml", mode, clients="all") as tape:
                    with pytest.raises(kind):
                        ask()
                    assert tape.misses == []


# misses, and what is not served


@pytest.mark.parametrize("is_async", [False, True])
def test_a_miss_was_retried_for_seconds(is_async: bool, server: LoopbackServer, tmp_path: Path) -> None:
    """An SDK that takes every exception for a lost connection gets a status; the block raises the miss."""
    headers = {"X-Stainless-Lang": "python"}

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient() as client:
            return await client.post(f"{server.url}/v1", json={}, headers=headers)

    replies = []
    with (
        pytest.raises(CassetteMissError, match="Expected a recorded answer to POST"),
        aggregator.cassette(tmp_path / "a.yaml", "none", clients="all"),
    ):
        replies.append(run(ask) if is_async else httpx.post(f"{server.url}/v1", json={}, headers=headers))
    (reply,) = replies
    assert (reply.status_code, reply.headers["x-should-retry"]) == (MISS_STATUS, "false")
    assert "Expected a recorded answer to POST" in reply.json()["error"]["message"]
    assert server.hits == 0


def test_a_raw_client_gets_the_miss_itself(server: LoopbackServer, tmp_path: Path) -> None:
    """Without an SDK's headers the exception is the miss, and urllib3's Retry does not retry it."""
    with aggregator.cassette(tmp_path / "a.yaml", "none", clients="all") as tape:
        for probe in PROBES[:-1]:
            with pytest.raises(CassetteMissError):
                probe(server.url)
        assert len(tape.misses) == len(PROBES) - 1
        tape.misses.clear()
    assert server.hits == 0


def ws_by_aiohttp(url: str) -> None:
    async def ask() -> None:
        async with aiohttp.ClientSession() as session, session.ws_connect(url):
            pass

    run(ask)


def ws_by_websockets(url: str) -> None:
    async def ask() -> None:
        async with websockets.connect(url.replace("http", "ws")):
            pass

    run(ask)


def ws_by_websockets_in_threads(url: str) -> None:
    from websockets.sync.client import connect

    with connect(url.replace("http", "ws")):
        pass


def ws_by_tornado(url: str) -> None:
    from tornado.websocket import websocket_connect

    async def ask() -> None:
        await websocket_connect(url.replace("http", "ws"))

    run(ask)


def ws_by_httpx(url: str) -> None:
    httpx.get(url, headers={"connection": "upgrade", "upgrade": "websocket"})


@pytest.mark.parametrize(
    "connect",
    [ws_by_aiohttp, ws_by_websockets, ws_by_websockets_in_threads, ws_by_tornado, ws_by_httpx],
    ids=lambda connect: connect.__name__,
)
def test_a_websocket_was_not_refused_in_mode_none(
    connect: Callable[[str], None], server: LoopbackServer, tmp_path: Path
) -> None:
    """It is refused before anything is sent; while a tape records it is allowed, and not recorded."""
    with aggregator.cassette(tmp_path / "a.yaml", "none", clients="all") as tape:
        with pytest.raises(CassetteMissError, match="by websockets"):
            connect(server.url)
        tape.misses.clear()
    assert server.hits == 0
    with aggregator.cassette(tmp_path / "a.yaml", "all", clients="all") as tape:
        with suppress(Exception):  # the server does not support it
            connect(server.url)
        assert tape.recorded == 0
    assert server.hits == 1


@pytest.mark.parametrize(
    "connect",
    [ws_by_aiohttp, ws_by_websockets, ws_by_websockets_in_threads, ws_by_tornado],
    ids=lambda one: one.__name__,
)
def test_a_websocket_was_refused_after_its_connection(connect: Callable[[str], None], tmp_path: Path) -> None:
    """Nothing listens at the address: the refusal comes before the connection, in every version of the client."""
    with aggregator.cassette(tmp_path / "a.yaml", "none", clients="all") as tape:
        with pytest.raises(CassetteMissError, match="by websockets"):
            connect("http://127.0.0.1:9")
        tape.misses.clear()


def test_httpcore_without_httpx_was_live_in_mode_none(server: LoopbackServer, tmp_path: Path) -> None:
    """The pool below httpx is refused too if it is used directly."""
    httpcore = pytest.importorskip("httpcore")
    with aggregator.cassette(tmp_path / "a.yaml", "none", clients="all") as tape:
        with pytest.raises(CassetteMissError, match="by httpcore"):
            httpcore.request("GET", server.url)
        tape.misses.clear()
    assert server.hits == 0
    with aggregator.cassette(tmp_path / "a.yaml", "all", clients="httpx") as tape:
        assert httpcore.request("GET", server.url).status == httpx.get(server.url).status_code
        assert tape.recorded == 1


# observers


class Watcher:
    """Records what passes."""

    def __init__(self) -> None:
        self.asked: list[HTTPRequest] = []
        self.seen: list[Answered] = []
        self.gone: list[tuple[HTTPRequest, bool]] = []

    def before(self, request: HTTPRequest, /) -> None:
        self.asked.append(request)

    def after(self, exchange: Answered, /) -> Noted | None:
        self.seen.append(exchange)
        return Noted(model="m-1", usage=aggregator.Usage(input_tokens=3))

    def dropped(self, request: HTTPRequest, /, *, was_sent: bool) -> None:
        self.gone.append((request, was_sent))


def test_a_watcher_sees_what_passes_with_and_without_a_cassette(server: LoopbackServer, tmp_path: Path) -> None:
    """Each live, recorded or played request calls `before` and `after` once; the watcher sees what is recorded."""
    watcher, path = Watcher(), tmp_path / "a.yaml"

    def ask() -> None:
        httpx.post(f"{server.url}/v1", json={"a": 1})

    with observing(watcher, ["httpx"]), patched():
        ask()
        requests.post(f"{server.url}/v1", timeout=9)  # not among the clients
        with aggregator.cassette(path, "all", clients="httpx"):
            ask()
        with aggregator.cassette(path, "none", clients="httpx"):
            ask()
    ask()
    assert [exchange.was_played for exchange in watcher.seen] == [False, False, True]
    assert [json.loads(exchange.reply.body)["n"] for exchange in watcher.seen if exchange.reply] == [1, 3, 3]
    assert len(watcher.asked) == 3
    recording = read(path)
    assert recording is not None
    facts = recording.rows[0].exchange().facts
    assert (facts.model, facts.usage) == ("m-1", {"input_tokens": 3})


def test_a_watcher_can_refuse_a_request(server: LoopbackServer) -> None:
    """A budget does so: its exception reaches the caller, and nothing is sent."""

    class Refusing(Watcher):
        def before(self, request: HTTPRequest, /) -> None:
            raise aggregator.BudgetExceededError("used up")

    with observing(Refusing(), "all"), patched(), pytest.raises(aggregator.BudgetExceededError):
        httpx.get(server.url)
    assert server.hits == 0


def test_a_watcher_sees_misses(server: LoopbackServer, tmp_path: Path) -> None:
    """A miss is reported as dropped and not sent, so that a budget can release its reservation."""
    watcher = Watcher()
    tape = aggregator.cassette(tmp_path / "a.yaml", "none", clients="httpx")
    with suppress(aggregator.CassetteMissError), observing(watcher, "all"), patched(), tape:
        httpx.get(server.url)
    assert [was_sent for _, was_sent in watcher.gone] == [False]
    assert (len(watcher.asked), watcher.seen) == (1, [])


def test_a_watcher_sees_failures(server: LoopbackServer) -> None:
    """A lost connection is reported with its type."""
    watcher = Watcher()
    with observing(watcher, "all"), patched(), suppress(httpx.ConnectError):
        httpx.get(nobody())
    assert [exchange.failure and exchange.failure[0] for exchange in watcher.seen] == ["httpx.ConnectError"]
