"""Other clients record to our tape and replay from it."""

from __future__ import annotations

import asyncio
import contextvars
import http.client
import json
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.request import Request, urlopen

import aiohttp
import httpx
import msgspec
import pytest
from loopback import LoopbackHandler, LoopbackServer, serve

from aggregator import portal
from aggregator.cassettes.clients import to_request
from aggregator.cassettes.exchanges import decode_line, encode_line, index_lines
from aggregator.cassettes.lineage import enter, leave, lineage, passing
from aggregator.cassettes.patches import patched
from aggregator.cassettes.redaction import KEPT_HEADERS
from aggregator.cassettes.rules import TapeRules
from aggregator.cassettes.tape import Tape
from aggregator.errors import CassetteError, CassetteMissError, ResponseError
from aggregator.llm.client import LLM
from aggregator.records import HTTPReply

requests: Any = pytest.importorskip("requests")

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
Client = Callable[[str, Any], bytes]
CHAT = "/v1/chat"


class Lines(list[bytes]):
    """A sink in memory; `rows` is what a replay reads."""

    def rows(self) -> tuple[Any, ...]:
        return tuple(index_lines(self))


@contextmanager
def taped(tape: Tape, clients: Any = "all") -> Iterator[Tape]:
    tape.rules = msgspec.structs.replace(tape.rules, clients=clients)
    token = enter(tape)
    try:
        with portal.carrying(), patched():
            yield tape
    finally:
        leave(tape, token)


class Handler(LoopbackHandler):
    def answer(self) -> None:
        asked = self.read_body()
        if self.path == "/moved":
            self.reply(b"elsewhere", 302, {"location": "/there"})
        else:
            self.server.hits += 1
            self.reply(json.dumps({"n": self.server.hits, "asked": asked.decode()}).encode())

    do_GET = do_POST = answer  # noqa: N815 - the base class's names


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    """A loopback server that numbers its answers, so that each answer shows when it was made."""
    with serve(Handler) as running:
        yield running


def by_httpx(url: str, body: Any) -> bytes:
    return httpx.post(url, json=body, headers={"authorization": "Bearer canary-number-1"}, trust_env=False).content


def by_async_httpx(url: str, body: Any) -> bytes:
    async def ask() -> bytes:
        async with httpx.AsyncClient(trust_env=False) as client:
            return (await client.post(url, json=body)).content

    with asyncio.Runner() as runner:
        return runner.run(ask())


def by_aiohttp(url: str, body: Any) -> bytes:
    async def ask() -> bytes:
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
            return await response.read()

    with asyncio.Runner() as runner:
        return runner.run(ask())


def by_requests(url: str, body: Any) -> bytes:
    with requests.Session() as session:
        session.trust_env = False
        content: bytes = session.post(url, json=body).content
        return content


def by_urllib(url: str, body: Any) -> bytes:
    with urlopen(Request(url, json.dumps(body).encode())) as response:
        content: bytes = response.read()
        return content


CLIENTS = [by_httpx, by_async_httpx, by_aiohttp, by_requests, by_urllib]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_records_and_plays(client: Client, server: Any) -> None:
    """A client replays its answers byte for byte, and the server is not asked again."""
    lines = Lines()
    with taped(Tape(sink=lines)) as tape:
        heard = [client(server.url + CHAT, BODY), client(server.url + CHAT, BODY)]
    assert (server.hits, tape.recorded, len(lines)) == (2, 2, 2)
    with taped(Tape(lines.rows())) as tape:
        assert [client(server.url + CHAT, BODY), client(server.url + CHAT, BODY)] == heard
        assert tape.unplayed() == []
    assert server.hits == 2


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_plays_what_another_recorded(client: Client, server: Any) -> None:
    """A tape does not depend on the client: the request counts."""
    lines = Lines()
    with taped(Tape(sink=lines)):
        heard = by_httpx(server.url + CHAT, BODY)
    with taped(Tape(lines.rows())):
        assert json.loads(client(server.url + CHAT, BODY)) == json.loads(heard)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_miss_reaches_the_caller_and_the_tape(client: Client, server: Any) -> None:
    """A request that was not recorded raises our own error, not a network error, and the tape remembers it."""
    with taped(Tape()) as tape:
        with pytest.raises(CassetteMissError):
            client(server.url + CHAT, BODY)
        assert len(tape.misses) == 1
    assert server.hits == 0


@pytest.mark.parametrize("client", CLIENTS)
def test_unlisted_clients_are_not_intercepted(client: Client, server: Any) -> None:
    """While a tape records, a client that it does not cover reaches the network and is not recorded."""
    served = "aiohttp" if client in (by_httpx, by_async_httpx) else "httpx"
    with taped(Tape(sink=Lines()), [served]) as tape:
        assert json.loads(client(server.url + CHAT, BODY))["n"] == 1
        assert (tape.misses, tape.recorded) == ([], 0)


@pytest.mark.parametrize("client", CLIENTS)
def test_an_unlisted_client_was_live_in_mode_none(client: Client, server: Any) -> None:
    """While a tape only plays, a client that it does not cover is refused, with the name to add."""
    served = "aiohttp" if client in (by_httpx, by_async_httpx) else "httpx"
    with taped(Tape(), [served]) as tape:
        with pytest.raises(CassetteMissError, match=r'add "(httpx|aiohttp|urllib3|http\.client)" to clients='):
            client(server.url + CHAT, BODY)
        assert len(tape.misses) == 1
    assert server.hits == 0


@pytest.mark.parametrize("client", CLIENTS)
def test_a_call_of_our_own_client_is_not_recorded_twice(client: Client, server: Any) -> None:
    """Our own client uses the tape before it sends; the patches ignore what it sends."""
    lines = Lines()
    with taped(Tape(sink=lines)) as tape, passing():
        client(server.url + CHAT, BODY)
    assert (server.hits, tape.recorded, lines) == (1, 0, [])


def test_lineage_distinguishes_identical_requests(server: Any) -> None:
    """Concurrent identical requests get their own branch's answers, in any order of completion."""

    async def ask(client: httpx.AsyncClient, branch: int, pause: float) -> int:
        with lineage(f"sample={branch}"):
            await asyncio.sleep(pause)
            n: int = (await client.post(server.url + CHAT, json=BODY)).json()["n"]
            return n

    async def run(order: list[int]) -> list[int]:
        async with httpx.AsyncClient(trust_env=False) as client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(client, i, 0.005 * order.index(i))) for i in range(8)]
        return [task.result() for task in tasks]

    lines = Lines()
    with asyncio.Runner() as runner:
        with taped(Tape(sink=lines)):
            recorded = runner.run(run([3, 1, 7, 0, 2, 6, 4, 5]), context=contextvars.copy_context())
        with taped(Tape(lines.rows())):
            assert runner.run(run([6, 2, 5, 1, 0, 7, 3, 4]), context=contextvars.copy_context()) == recorded


def test_tapes_of_two_tasks_are_separate(server: Any) -> None:
    """Each task's requests go to its own tape, and the last one to leave removes the patches."""
    before = httpx.AsyncHTTPTransport.handle_async_request

    async def work(name: str, first: asyncio.Event, second: asyncio.Event) -> Lines:
        lines = Lines()
        with taped(Tape(sink=lines, name=name), ["httpx"]):
            async with httpx.AsyncClient(trust_env=False) as client:
                first.set()
                await second.wait()
                await client.post(server.url + CHAT, json={"from": name})
        return lines

    async def both() -> list[Lines]:
        a, b = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work("a", a, b)), group.create_task(work("b", b, a))]
        return [task.result() for task in tasks]

    with asyncio.Runner() as runner:
        bodies = [[json.loads(decode_line(line).request.body) for line in lines] for lines in runner.run(both())]
    assert bodies == [[{"from": "a"}], [{"from": "b"}]]
    assert httpx.AsyncHTTPTransport.handle_async_request is before


def test_tasks_outside_a_cassette_are_not_intercepted(server: Any) -> None:
    """While one task replays, another without a tape reaches the network, and its stream is not read."""

    async def outside(ready: asyncio.Event, done: asyncio.Event) -> str:
        await ready.wait()
        async with (
            httpx.AsyncClient(trust_env=False) as client,
            client.stream("POST", server.url + CHAT, json=BODY) as reply,
        ):
            kind = type(reply.stream).__name__
            await reply.aread()
        done.set()
        return kind

    async def inside(ready: asyncio.Event, done: asyncio.Event) -> None:
        with taped(Tape()):
            ready.set()
            await done.wait()

    async def both() -> str:
        ready, done = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(outside(ready, done))
            group.create_task(inside(ready, done))
        return task.result()

    with asyncio.Runner() as runner:
        assert runner.run(both()) == "BoundAsyncStream"
    assert server.hits == 1


@pytest.mark.parametrize("client", [by_httpx, by_requests, by_urllib])
def test_a_plain_thread_belongs_to_the_only_open_tape(client: Client, server: Any) -> None:
    """A thread that was started without a context replays too; it does not reach the network."""
    lines = Lines()
    with taped(Tape(sink=lines)):
        heard = client(server.url + CHAT, BODY)
    found: list[bytes] = []
    with taped(Tape(lines.rows())):
        thread = threading.Thread(target=lambda: found.append(client(server.url + CHAT, BODY)))
        thread.start()
        thread.join()
    assert (found, server.hits) == ([heard], 1)


@pytest.mark.parametrize("client", CLIENTS)
def test_redirects_play_hop_by_hop(client: Client, server: Any) -> None:
    """Each hop is one exchange, and a replay follows them as the client did."""
    if client in (by_httpx, by_async_httpx):
        pytest.skip("httpx does not follow redirects unless told to; the hops are then calls of their own")
    if "location" not in KEPT_HEADERS:
        pytest.skip("the redaction drops where a redirect leads")
    url = server.url + "/moved"
    lines = Lines()
    with taped(Tape(sink=lines)):
        heard = [client(url, BODY), client(url, BODY)]
    with taped(Tape(lines.rows())) as tape:
        assert [client(url, BODY), client(url, BODY)] == heard
        assert tape.unplayed() == []
    assert (server.hits, len(lines)) == (2, 4)


def test_keys_are_not_in_the_file(server: Any) -> None:
    """The authentication header of another client's request is a known secret and not recorded."""
    lines = Lines()
    with taped(Tape(sink=lines)):
        by_httpx(server.url + CHAT, BODY)
    assert b"canary" not in lines[0]


def test_vcr_is_imported_only_on_request(tmp_path: Path) -> None:
    """A cassette for all clients loads neither vcrpy nor any client."""
    script = """
        import sys, aggregator
        with aggregator.cassette("a.yaml", "all", clients="all"):
            print(*sorted({"vcr", "aiohttp", "httpx", "urllib3", "requests", "tornado", "botocore"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("stream", [False, True])
def test_our_own_client_is_not_intercepted_twice(server: Any, stream: bool) -> None:
    """Inside a cassette for all clients our own call is one exchange, recorded and played by the tape alone."""

    async def ask() -> str:
        llm = LLM("openai/m", base_url=server.url + "/v1", api_key="canary-number-1", max_attempts=1)
        try:
            if stream:
                return "".join([delta async for delta in llm.stream("hello")])
            return (await llm.complete("hello")).text
        except ResponseError as error:  # the server has no chat completions
            return type(error).__name__

    def run(tape: Tape) -> str:
        with taped(tape), asyncio.Runner() as runner:
            return runner.run(ask())

    lines = Lines()
    heard = run(Tape(sink=lines, rules=TapeRules(clients="all")))
    assert (server.hits, len(lines)) == (1, 1)
    tape = Tape(lines.rows())
    assert run(tape) == heard
    assert (server.hits, tape.unplayed()) == (1, [])


@pytest.mark.parametrize("client", CLIENTS)
def test_a_failed_connection_replayed_as_a_miss(client: Client, server: Any) -> None:
    """A failed connection is on the tape, and replays as the same exception before its retry is answered."""
    lines, url = Lines(), server.url + CHAT
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}/v1/chat"

        def probe() -> str:
            with pytest.raises(Exception) as failed:  # noqa: PT011 - each client has its own
                client(nobody, BODY)
            return f"{type(failed.value).__name__}: {errno_of(failed.value)}"

        with taped(Tape(sink=lines)) as tape:
            recorded = [probe(), client(url, BODY), probe()]
            assert tape.recorded == 3
        with taped(Tape(lines.rows())) as tape:
            assert [probe(), client(url, BODY), probe()] == recorded
            assert (tape.unplayed(), tape.misses) == ([], [])


def errno_of(error: BaseException | None) -> int | None:
    """Return the operating system's error number, wherever a client has put it."""
    found = getattr(error, "errno", None) or getattr(getattr(error, "os_error", None), "errno", None)
    if isinstance(found, int):
        return found
    return None if error is None or "111" not in str(error) else 111


def test_a_withdrawn_call_frees_its_ticket(server: Any) -> None:
    """It is not recorded, so the next identical call is the first."""
    with taped(Tape(sink=Lines())) as tape:
        slots = [tape.issue(to_request("POST", server.url + CHAT, b"{}", {})) for _ in range(2)]
        tape.withdraw(slots[0])
        tape.record(slots[1], HTTPReply(status=200, body=b"{}", headers={}))
        assert slots[1].ticket == 0


@pytest.fixture
def sleeps() -> Iterator[list[str]]:
    """The functions of this thread that called `time.sleep` so far, in order."""
    seen: list[str] = []

    def note(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called is time.sleep:
            seen.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    yield seen
    sys.setprofile(before)


@pytest.mark.parametrize("client", [by_httpx, by_requests, by_urllib])
def test_recorded_latency_delayed_the_wrong_client(client: Client, server: Any, sleeps: list[str]) -> None:
    """`latency` applies to each client, and a live call after a replayed one does not wait for it."""
    lines = Lines()
    with taped(Tape(sink=lines)):
        client(server.url + CHAT, BODY)
    slow = [msgspec.structs.replace(row.exchange().facts, ms=20.0) for row in lines.rows()]
    (row,) = lines.rows()
    line = encode_line(msgspec.structs.replace(row.exchange(), facts=slow[0]))
    with taped(Tape(tuple(index_lines([line])), sink=Lines(), rules=TapeRules(latency="recorded"))):
        client(server.url + CHAT, BODY)
        assert len(sleeps) == 1
        by_httpx(server.url + CHAT, {"q": "another"})
        assert len(sleeps) == 1


def test_a_caught_miss_made_the_next_request_live(server: Any) -> None:
    """http.client asks again after a miss; a tape that only plays refuses it again."""
    with taped(Tape(), ["http.client"]) as tape:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        connection.request("POST", "/v1/chat", b"{}")
        for _ in range(2):
            with pytest.raises(CassetteMissError):
                connection.getresponse()
        connection.close()
    assert (server.hits, len(tape.misses)) == (0, 2)


def test_a_request_of_a_task_that_outlived_its_cassette_was_live(server: Any) -> None:
    """While another cassette has the patches installed, work that began inside a closed one is refused."""
    tape = Tape(rules=TapeRules(clients="all"))
    with taped(tape):
        there = contextvars.copy_context()
    tape.close()
    with taped(Tape(sink=Lines())), pytest.raises(CassetteError, match="got a call after it was left"):
        there.run(by_httpx, server.url + CHAT, BODY)
    assert server.hits == 0
