"""The whole client, from call to server: rules that no single part can test."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llm_fakes import (
    BASE_URL,
    QUESTION,
    ScriptedTransport,
    VirtualLoop,
    VirtualTime,
    answer,
    answering,
    failure,
    raw,
    read_request,
    serving,
)
from msgspec.structs import replace

from aggregator import LLM, Budget, cassette
from aggregator.errors import APIConnectionError, APITimeoutError, BadRequestError, ServerError
from aggregator.llm.calls import ChatCall
from aggregator.llm.retry import RetryPolicy, was_sent
from aggregator.llm.transport import AiohttpTransport, shared_transport
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest


@pytest.fixture
def run() -> Iterator[Callable[[Callable[[], Awaitable[Any]]], Any]]:
    """Run in virtual time: timers fire in order, at once."""
    loop = VirtualLoop()

    async def main(work: Callable[[], Awaitable[Any]]) -> Any:
        return await work()

    yield lambda work: loop.run_until_complete(main(work))
    loop.close()


def client(transport: Any, **options: Any) -> LLM:
    """A client in virtual time: its clock moves when it sleeps."""
    time = VirtualTime()
    return LLM("m", base_url=BASE_URL, transport=transport, clock=time.clock, sleep=time.sleep, **options)


def on_this_loop(transport: Any, **options: Any) -> LLM:
    """A client on a virtual loop whose clock the transport can read too."""
    return LLM("m", base_url=BASE_URL, transport=transport, clock=asyncio.get_running_loop().time, **options)


@pytest.mark.requirement("client 1: idle connections are kept 4 s at most", "client 1: 5 s to connect")
def test_the_defaults_of_connections() -> None:
    """Idle connections are kept for at most 4 s, new ones get 5 s to connect, in every default transport."""
    given, shared = AiohttpTransport(keepalive_timeout=4.0, connect_timeout=5.0), shared_transport()
    assert shared._keepalive <= given._keepalive
    assert shared._timeout == given._timeout


@pytest.mark.requirement("client 1: 600 s in all")
async def test_a_call_may_take_ten_minutes() -> None:
    """The default timeout of a call is 600 s, as in the SDKs."""
    transport = ScriptedTransport(answer())
    await client(transport, max_attempts=1).complete(QUESTION)
    assert transport.timeouts == [600.0]


@pytest.mark.requirement("client 1: no cookie jar")
async def test_cookies_of_a_named_host_are_not_sent_back() -> None:
    """aiohttp's own jar would keep the cookies of host names and drop those of IP addresses."""
    seen = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (got := await read_request(reader)) is not None:
            seen.append(got[1].get("cookie"))
            writer.write(raw(answer(headers={"set-cookie": "a=1; Path=/"})))

    async with serving(handle) as url, AiohttpTransport() as transport:
        request = HTTPRequest(url=url.replace("127.0.0.1", "localhost"), body=b"{}", headers={})
        for _ in range(2):
            await transport.send(request)
    assert seen == [None, None]


@pytest.mark.requirement("client 1: 5 s to connect")
async def test_a_server_that_takes_no_connection() -> None:
    """Connecting has a timeout of its own; nothing was sent, so nothing is charged."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]  # fill its queue, so that the kernel accepts no more connections
        for other in waiting:
            other.settimeout(0)
            other.connect_ex(listener.getsockname())
        request = HTTPRequest(url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", body=b"{}", headers={})
        async with AiohttpTransport(connect_timeout=0.05) as transport:
            with pytest.raises(APITimeoutError, match="took no connection") as caught:
                await transport.send(request, timeout=60)
        for other in waiting:
            other.close()
    assert not was_sent(caught.value)


def dying(second: bytes = b"") -> tuple[Callable[..., Awaitable[None]], list[None]]:
    """A server that answers the first request of each connection, and the second with `second` before it closes."""
    requests: list[None] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for reply in (raw(answer()), second):
            if await read_request(reader) is None:
                return
            requests.append(None)
            writer.write(reply)
            await writer.drain()

    return handle, requests


@pytest.mark.requirement("client 2: counted as an attempt")
async def test_a_request_on_a_dead_connection_was_sent_twice_uncounted() -> None:
    """The server may have worked on it, so the second request is another attempt, in attempts and budget alike."""
    handle, requests = dying()
    budget = Budget(calls=100)
    async with serving(handle) as url, LLM("dead", base_url=url, max_attempts=1, budget=budget) as llm:
        await llm.complete("Hello")
        with pytest.raises(APIConnectionError) as caught:
            await llm.complete("Hello")
        assert caught.value.attempts == 1
        assert (budget.spent.calls, len(requests)) == (2, 2)


async def test_a_call_on_a_dead_connection_succeeds_in_its_next_attempt() -> None:
    """If attempts are left, the call is answered over a new connection."""
    handle, requests = dying()
    budget = Budget(calls=100)
    policy = RetryPolicy(first_delay=0.001)
    async with serving(handle) as url, LLM("dead", base_url=url, max_attempts=2, budget=budget, retry=policy) as llm:
        found = [await llm.complete("Hello") for _ in range(3)]
    assert [completion.attempts for completion in found] == [1, 2, 1]
    assert budget.spent.calls == len(requests) == 4


@pytest.mark.requirement("client 2: sent once, the next attempt over a new connection")
async def test_the_replacement_is_not_taken_from_the_pool() -> None:
    """If one idle connection has died, the others have too: a call must not get a second one."""
    handle, _ = dying()
    async with serving(handle) as url, AiohttpTransport() as transport:
        request = HTTPRequest(url=url, body=b"{}", headers={})
        async with asyncio.TaskGroup() as tasks:
            for _ in range(5):
                tasks.create_task(transport.send(request))
        assert (await transport.send(replace(request, fresh=True))).status == 200


@pytest.mark.requirement("client 2: nor one whose answer has begun")
@pytest.mark.parametrize(
    "begun",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-le",
    ],
    ids=["body", "head"],
)
async def test_an_answer_that_has_begun_is_not_asked_for_again(begun: bytes) -> None:
    """Once an answer has begun, the server has worked on the request: sent again, it would be billed twice."""
    handle, requests = dying(begun)
    async with serving(handle) as url, AiohttpTransport() as transport:
        request = HTTPRequest(url=url, body=b"{}", headers={})
        await transport.send(request)
        with pytest.raises(APIConnectionError):
            await transport.send(request)
    assert len(requests) == 2


@pytest.mark.requirement("client 15: cancelling closes the socket")
async def test_a_call_cancelled_while_its_answer_comes() -> None:
    """Half of the body has arrived: the connection is closed, so that no other call reads the rest."""
    begun, closed = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(raw(answer())[:-20])
        begun.set()
        await reader.read()
        closed.set()

    async with serving(handle) as url, LLM("half", base_url=url) as llm, asyncio.TaskGroup() as tasks:
        call = tasks.create_task(llm.complete("Hello"))
        await begun.wait()
        await asyncio.sleep(0.02)  # the call has read what has arrived and waits for the rest
        call.cancel()
        async with asyncio.timeout(5):
            await closed.wait()
    assert call.cancelled()


@pytest.mark.requirement("client 3: x-should-retry")
@pytest.mark.parametrize(("status", "said", "sent"), [(500, "false", 1), (400, "true", 3), (500, "", 3)])
async def test_the_client_obeys_x_should_retry(status: int, said: str, sent: int) -> None:
    """`true` and `false` are obeyed; without the header the status decides."""
    transport = ScriptedTransport(failure(status, headers={"x-should-retry": said}))
    with pytest.raises((ServerError, BadRequestError)):
        await client(transport).complete(QUESTION)
    assert len(transport.requests) == sent


@pytest.mark.requirement("client 4: no call again after any exception")
async def test_a_bug_is_not_retried() -> None:
    """A bug is raised unchanged and at once, even if `response_format` has a fallback."""

    def broken(request: HTTPRequest) -> HTTPReply:
        raise KeyError("a bug")

    transport = ScriptedTransport(broken)
    for wanted in (None, {"type": "json_object"}):
        with pytest.raises(KeyError, match="a bug"):
            await client(transport).complete(QUESTION, response_format=wanted)
    assert len(transport.requests) == 2


@pytest.mark.requirement("client 4: one deadline, waits and fallbacks included")
async def test_other_forms_share_the_deadline() -> None:
    """A call that falls back to another response_format gets no extra time."""
    time = VirtualTime()

    async def latency() -> None:
        time.now += 4.0

    transport = ScriptedTransport(failure(400), latency=latency)
    llm = LLM(
        "m",
        base_url=BASE_URL,
        transport=transport,
        clock=time.clock,
        sleep=time.sleep,
        timeout=10.0,
        attempt_timeout=10.0,
    )
    with pytest.raises(BadRequestError):
        await llm.complete(QUESTION, response_format={"type": "object", "properties": {}})
    assert transport.timeouts == [10.0, 6.0, 2.0]


@pytest.mark.requirement("client 5: shared per (base_url, key, model)", "built 5: concurrency")
@pytest.mark.parametrize(
    ("others", "at_once"),
    [({}, 1), ({"api_key": "another"}, 2), ({"base_url": "http://127.0.0.1:8/v1"}, 2), ({"model": "n"}, 2)],
    ids=["same", "key", "base_url", "model"],
)
async def test_clients_of_one_account_share_its_limits(others: dict[str, str], at_once: int) -> None:
    """Clients of the same (base_url, key, model) share one limiter; any other client has its own."""
    under_way = most = 0

    async def latency() -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(20):
            await asyncio.sleep(0)
        under_way -= 1

    transport = ScriptedTransport(answer(), latency=latency)
    account = {"model": "m", "base_url": BASE_URL, "api_key": "k"}
    clients = [LLM(**given, transport=transport, max_concurrency=1) for given in (account, account | others)]  # type: ignore[arg-type]
    async with asyncio.TaskGroup() as tasks:
        for llm in clients * 3:
            tasks.create_task(llm.complete(QUESTION))
    assert most == at_once


class Bucket(Transport):
    """A server that allows 100 requests a second, with a burst of 20, and refuses the others for a second."""

    def __init__(self) -> None:
        self.level, self.at, self.requests = 20.0, 0.0, 0

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        await asyncio.sleep(0.002)
        now = asyncio.get_running_loop().time()
        self.level, self.at = min(20.0, self.level + (now - self.at) * 100), now
        self.requests += 1
        if self.level < 1:
            return failure(429, headers={"retry-after": "1"})
        self.level -= 1
        await asyncio.sleep(0.003)
        return answer()


@pytest.mark.requirement("figure: bucket 100/s, burst 20, 400 calls at 64: 0 failed, <= 480 requests, <= 6 s")
def test_a_bucket_of_unknown_size(run: Any) -> None:
    """100/s, burst 20, 400 calls at 64, 429 + Retry-After 1, no other header:

    all are answered, few requests are refused.
    """

    async def main() -> tuple[int, float]:
        bucket = Bucket()
        llm = on_this_loop(bucket)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(400):
                tasks.create_task(llm.complete(QUESTION))
        return bucket.requests, asyncio.get_running_loop().time()

    requests, seconds = run(main)
    assert requests <= 480
    assert seconds <= 6.0


class Clocked(ScriptedTransport):
    """Records when each request arrived."""

    def __init__(self, *steps: Any) -> None:
        super().__init__(*steps)
        self.times: list[float] = []

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        self.times.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.001)
        return await super().send(request, timeout=timeout)


NOTHING_LEFT = {
    "x-ratelimit-remaining-requests": "0",
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-reset-requests": "1m0s",
}


@pytest.mark.requirement(
    "client 5: a 429 pauses all callers",
    "client 5: requests per minute",
    "client 5: tokens per minute",
    "client 5: rate-limit headers hold back",
)
@pytest.mark.parametrize(
    ("first", "options", "earliest"),
    [
        (failure(429, headers={"retry-after": "5"}), {}, 5.0),
        (answer(headers=NOTHING_LEFT), {}, 1.0),
        (answer(), {"rpm": 30}, 2.0),
        (answer(), {"tpm": 600}, 1.0),
        (answer(), {}, 0.0),
    ],
    ids=["a 429", "headers", "rpm", "tpm", "no limit"],
)
def test_limits_apply_to_every_call_of_a_client(run: Any, first: Any, options: Any, earliest: float) -> None:
    """After one 429 the other calls are delayed too."""

    async def main() -> list[float]:
        transport = Clocked(first, answer())
        llm = on_this_loop(transport, **options)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(llm.complete(QUESTION, max_tokens=10))
            await asyncio.sleep(0.01)
            tasks.create_task(llm.complete(QUESTION, max_tokens=10))
        return transport.times

    _, *later = run(main)
    assert min(later) >= earliest
    assert (min(later) < 0.1) is (earliest == 0.0)


@pytest.mark.requirement("client 10: remembered per (base_url, model)")
async def test_a_form_is_remembered_for_its_model_alone() -> None:
    """Another model of the server, and the same model on another server, is asked in the best form first."""

    def reply(request: HTTPRequest) -> HTTPReply:
        return failure(400) if b'"json_object"' in request.body else answer("{}")

    transport = ScriptedTransport(reply)
    for given in ({}, {}, {"model": "n"}, {"base_url": "http://127.0.0.1:8/v1"}):
        llm = LLM(**{"model": "m", "base_url": BASE_URL} | given, transport=transport)  # type: ignore[arg-type]
        await llm.complete(QUESTION, response_format={"type": "json_object"})
    asked = [body.get("response_format", {}).get("type") for body in transport.bodies()]
    assert asked == ["json_object", None, None, "json_object", None, "json_object", None]


@pytest.mark.requirement("client 10: content may be an object already")
async def test_structured_content_that_is_an_object_already() -> None:
    """Cloudflare answers json_schema with an object in place of text: the text is the object's JSON."""
    body = {"choices": [{"message": {"role": "assistant", "content": {"k": 3}}, "finish_reason": "stop"}]}
    transport = ScriptedTransport(HTTPReply(status=200, body=json.dumps(body).encode(), headers={}))
    schema = {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]}
    found = await client(transport).complete(QUESTION, response_format=schema)
    assert (json.loads(found.text), found.attempts) == ({"k": 3}, 1)


@pytest.mark.requirement("client 11: no network at import")
def test_nothing_is_fetched_at_import_or_for_a_price() -> None:
    """Importing the client, creating one and pricing a model open no socket: prices come with the installation."""
    pytest.importorskip("genai_prices")
    script = """
    import socket, sys
    class Refused(socket.socket):
        def __init__(self, *given, **more):
            raise SystemExit("a socket was opened")
    socket.socket = socket.SocketType = Refused
    socket.getaddrinfo = socket.create_connection = Refused
    import aggregator, aggregator.llm.client, aggregator.llm.transport, aggregator.llm.ledger, aggregator.llm.models
    aggregator.LLM("openai/gpt-4o-mini", env={})
    assert aggregator.llm.ledger.kept_price("openai", "gpt-4o-mini").input > 0
    print("done")
    """
    lines = "\n".join(line.removeprefix("    ") for line in script.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.requirement("client 15: secrets are redacted")
@pytest.mark.filterwarnings("ignore:.*changed by the redaction:aggregator.errors.CassetteWarning")
@pytest.mark.parametrize(
    ("model", "header"),
    [
        ("openai/gpt-4o-mini", "authorization"),
        ("azure/d", "api-key"),
        ("anthropic/claude-sonnet-4-5", "x-api-key"),
        ("gemini/gemini-2.5-flash", "x-goog-api-key"),
    ],
)
@pytest.mark.parametrize("query", ["", "?key=0123456789abcdefQUERY"])
async def test_no_providers_key_is_in_its_cassette(tmp_path: Path, model: str, header: str, query: str) -> None:
    """The key is neither in a header nor in a query's `key=`; only known headers are recorded."""
    key, path = "0123456789abcdefHEADER", tmp_path / "keys.yaml"
    async with serving(answering([failure(401, f"wrong key {key}")])) as url:
        llm = LLM(model, base_url=f"{url}{query}", api_key=key, env={}, max_attempts=1)
        assert key in llm.endpoint.codec.encode(ChatCall(model="m", messages=tuple(QUESTION))).headers[header]
        with cassette(path, "once"), pytest.raises(Exception, match=r"wrong key \*\*\*"):
            await llm.complete(QUESTION)
        await llm.aclose()
    text = path.read_text()
    assert not [secret for secret in ("abcdefHEADER", "abcdefQUERY", "!!python") if secret in text]
    assert "wrong key" in text


@pytest.mark.requirement("client 15: secrets are redacted")
async def test_custom_headers_are_not_in_a_cassette(tmp_path: Path) -> None:
    """Only headers on an allow list are recorded, because a gateway's header may be a secret."""
    env, path = {"OPENAI_CUSTOM_HEADERS": "X-Tenant: blue-42"}, tmp_path / "headers.yaml"
    transport = ScriptedTransport(answer(headers={"x-tenant-of-reply": "blue-42"}))
    with cassette(path, "once"):
        await LLM("openai/gpt-4o-mini", api_key="k", env=env, transport=transport).complete(QUESTION)
    assert transport.requests[0].headers["x-tenant"] == "blue-42"
    assert not [word for word in ("x-tenant", "blue-42") if word in path.read_text()]
