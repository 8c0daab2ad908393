"""Network faults: stalls, dead connections, decompression bombs, proxies, endless headers."""

from __future__ import annotations

import asyncio
import gzip
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest
from llm_fakes import (
    BASE_URL,
    QUESTION,
    ScriptedTransport,
    VirtualTime,
    answer,
    chunk,
    failure,
    raw,
    read_request,
    serving,
)

from aggregator import LLM, Budget, Price
from aggregator.errors import (
    AggregatorError,
    APIConnectionError,
    APITimeoutError,
    ConfigError,
    LLMError,
    RateLimitError,
    TooLargeError,
)
from aggregator.llm.limiter import Limiter
from aggregator.llm.names import resolve
from aggregator.llm.retry import RetryPolicy
from aggregator.llm.transport import MAX_BODY, AiohttpTransport
from aggregator.records import HTTPReply

AT_ONCE = RetryPolicy(first_delay=0.001)
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DELTA = b'data: {"choices": [{"index": 0, "delta": {"content": "hel"}}]}\n\n'
REST = b'data: {"choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": "stop"}]}\n\n'


class Server:
    """Answers each request by its next step, and repeats the last: bytes, or None to send nothing more."""

    def __init__(self, *steps: list[bytes | None]) -> None:
        self.steps = steps
        self.requests: list[tuple[str, dict[str, str], bytes]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (request := await read_request(reader)) is not None:
            self.requests.append(request)
            for piece in self.steps[min(len(self.requests), len(self.steps)) - 1]:
                if piece is None:
                    await asyncio.sleep(60)
                else:
                    writer.write(piece)
                    await writer.drain()


def client(url: str, **options: Any) -> LLM:
    return LLM("m", base_url=url, api_key="a-key-of-the-user", retry=AT_ONCE, transport=AiohttpTransport(), **options)


async def test_a_stalled_attempt_ate_the_whole_deadline() -> None:
    """By default an attempt takes at most half of the deadline, so that a second one fits."""
    server, budget = Server([None], [raw(answer())]), Budget(calls=10)
    async with serving(server) as url, client(url, timeout=1.0, budget=budget) as llm:
        assert (await llm.complete(QUESTION)).attempts == 2
    assert budget.spent.calls == len(server.requests) == 2


async def test_a_limit_for_each_attempt() -> None:
    """`attempt_timeout` ends each stalled attempt; a sent request is charged as reserved."""
    server, budget = Server([None]), Budget(tokens=1_000_000)
    async with serving(server) as url, client(url, attempt_timeout=0.1, budget=budget) as llm:
        with pytest.raises(APITimeoutError, match="within 0.1 s") as caught:
            await llm.complete(QUESTION, max_tokens=10)
    assert (caught.value.attempts, len(server.requests), budget.spent.calls) == (3, 3, 3)
    assert budget.spent.tokens >= 3 * 10


async def test_the_last_attempt_may_use_all_the_time_left() -> None:
    """With one attempt no time is reserved for another: it may take more than half of the call's."""
    server = Server([None])
    async with serving(server) as url, client(url, timeout=0.6, max_attempts=1) as llm:
        with pytest.raises(APITimeoutError, match=r"within (0\.\d+) s") as caught:
            await llm.complete(QUESTION)
    (seconds,) = re.findall(r"within (\S+) s", caught.value.message)
    assert float(seconds) > 0.3


@pytest.mark.parametrize("stalled", [[None], [STREAM, None]], ids=["no head", "no piece"])
async def test_a_stream_that_stalls_before_its_first_piece(stalled: list[bytes | None]) -> None:
    """None of it was used, so it is retried."""
    server = Server(stalled, [STREAM, chunk(DELTA), chunk(REST), b"0\r\n\r\n"])
    async with serving(server) as url, client(url, attempt_timeout=0.2) as llm:
        assert [delta async for delta in llm.stream(QUESTION)] == ["hel", "lo"]
    assert len(server.requests) == 2


async def test_a_stream_that_stalled_waited_for_the_deadline() -> None:
    """A stream may take long if it makes progress; one without progress ends after `attempt_timeout`."""
    server = Server([STREAM, chunk(DELTA), None])
    read: list[str] = []
    async with serving(server) as url, client(url, attempt_timeout=0.2) as llm:

        async def read_on() -> None:
            async for delta in llm.stream(QUESTION):
                read.append(delta)  # noqa: PERF401 - what came before the error counts

        with pytest.raises(APITimeoutError, match="Expected the next piece of its answer from .* within 0.2 s"):
            await read_on()
    assert (read, len(server.requests)) == (["hel"], 1)


async def test_a_stream_with_progress_may_exceed_the_attempt_timeout() -> None:
    """The limit applies to each piece, not to the whole stream."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM)
        for _ in range(6):
            await asyncio.sleep(0.1)
            writer.write(chunk(DELTA))
        writer.write(chunk(REST) + b"0\r\n\r\n")
        await writer.drain()

    async with serving(handle) as url, client(url, attempt_timeout=0.4) as llm:
        assert len([delta async for delta in llm.stream(QUESTION)]) == 7


async def test_silent_connections_were_never_probed() -> None:
    """TCP keepalive detects a connection that a NAT dropped, long before the deadline."""
    async with serving(Server([raw(answer())])) as url, client(url) as llm:
        await llm.complete(QUESTION)
        transport = llm._line.transport
        assert isinstance(transport, AiohttpTransport)
        connector: Any = transport._loops[asyncio.get_running_loop()].pooled.connector
        (kept,) = [entry[0] for entries in connector._conns.values() for entry in entries]
        own = kept.transport.get_extra_info("socket")
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


@pytest.mark.parametrize(
    "headers",
    [{"content-security-policy": "x" * 9_000}, {"set-cookie": "x" * 200_000}, {f"x-{i}": "y" for i in range(500)}],
    ids=["9 kB", "200 kB", "500 headers"],
)
async def test_long_headers_were_refused_after_three_paid_requests(headers: dict[str, str]) -> None:
    """A gateway's policies and cookies do not make an answer unreadable."""
    server = Server([raw(answer("hello", headers=headers))])
    async with serving(server) as url, client(url) as llm:
        assert (await llm.complete(QUESTION)).text == "hello"
        assert len(server.requests) == 1


def bomb(size: int) -> bytes:
    body = gzip.compress(b" " * size)
    return raw(HTTPReply(status=200, body=body, headers={"content-encoding": "gzip"}))


async def test_an_answer_without_end_was_read_to_its_end() -> None:
    """An answer has a maximum size, compressed and decompressed; a larger one is not retried."""
    server = Server([bomb(MAX_BODY + 1)])
    async with serving(server) as url, client(url) as llm:
        with pytest.raises(TooLargeError, match="at most 64 MB"):
            await llm.complete(QUESTION)
        with pytest.raises(TooLargeError, match="at most 64 MB"):
            _ = [delta async for delta in llm.stream(QUESTION)]
    assert len(server.requests) == 2


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "socks5h://u:secret@proxy:1080", "socks://x", "ftp://x"])
async def test_a_socks_proxy_was_sent_plain_http(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is not HTTP is refused with its name, and nothing is sent to it."""
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    async with client("http://api.acme.test/v1") as llm:
        with pytest.raises(ConfigError, match=r"Expected an HTTP proxy in ALL_PROXY, got '.*SOCKS") as caught:
            await llm.complete(QUESTION)
    assert "secret" not in str(caught.value)


async def test_a_proxy_without_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """`HTTP_PROXY=host:port` is an HTTP proxy, as in every other client."""
    server = Server([raw(answer("by way of the proxy"))])
    async with serving(server) as url:
        monkeypatch.setenv("HTTP_PROXY", url.removeprefix("http://").removesuffix("/v1"))
        async with client("http://api.acme.test/v1") as llm:
            assert (await llm.complete(QUESTION)).text == "by way of the proxy"
    assert server.requests[0][0].startswith("POST http://api.acme.test/v1/chat/completions")


async def test_a_dead_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the proxy that refused the connection, not the API's host."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    async with client("http://api.acme.test/v1", max_attempts=1) as llm:
        with pytest.raises(APIConnectionError, match="no connection to the proxy 127.0.0.1:9"):
            await llm.complete(QUESTION)


@pytest.mark.parametrize("page", [b"NOT HTTP AT ALL\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n"])
async def test_the_key_was_in_the_cause_of_an_error(page: bytes) -> None:
    """The key is neither in the message or repr of an error nor in its causes."""
    async with serving(Server([page])) as url, client(url) as llm:
        with pytest.raises(LLMError) as caught:
            await llm.complete(QUESTION)
    error: BaseException | None = caught.value
    while error is not None:
        assert "a-key-of-the-user" not in f"{error!s} {error!r} {vars(error)!r}"
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    "value",
    [
        "Wed, 21 Oct 99999999999 07:28:00 GMT",
        "Wed, 21 Oct 2026 99:99:99 GMT",
        "1e400",
        "nan",
        "-1",
        "9" * 5000,
        "soon",
        "\u0663",
    ],
)
async def test_an_absurd_retry_after_raised_another_exception(value: str) -> None:
    """An unreadable or infinite wait still raises the error of the status."""
    for name in ("retry-after", "retry-after-ms", "x-ratelimit-reset-requests", "date"):
        reply = failure(429, headers={"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT", name: value})
        llm = LLM("m", base_url=BASE_URL, transport=ScriptedTransport(reply), retry=AT_ONCE, max_attempts=1)
        with pytest.raises(RateLimitError):
            await llm.complete(QUESTION)


class Words(str):
    """A str subclass, like numpy's."""

    __slots__ = ()


class Weight(float):
    """A float subclass, like numpy's float64."""


class Other:
    """A number that is not a Python number, like numpy's float32."""


@pytest.mark.parametrize(
    ("messages", "options", "where"),
    [
        ("x\ud83d", {}, "half a character"),
        ([{"role": "user", "content": "q"}], {"temperature": Other()}, r"at \$.temperature"),
        ([{"role": "user", "content": "q"}], {"extra": {"a": [{"b": Other()}]}}, r"at \$.a\[0\].b"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}],
            {},
            r"at \$.messages\[0\].content\[0\].text",
        ),
        ([{"role": "user", "content": "q"}], {"temperature": 10**5000}, r"type int; .* - at \$.temperature"),
    ],
)
@pytest.mark.parametrize("name", ["openai/m", "anthropic/m", "gemini/m"])
async def test_a_value_that_json_cannot_hold_raised_another_exception(
    name: str, messages: Any, options: dict[str, Any], where: str
) -> None:
    """It is a ConfigError with the value's path, before anything is sent."""
    transport = ScriptedTransport(answer())
    llm = LLM(name, api_key="k", env={}, transport=transport)
    with pytest.raises(ConfigError, match=where if name == "openai/m" else "Expected a request that JSON can hold"):
        await llm.complete(messages, **options)
    assert transport.requests == []


ODD: list[Any] = [float("nan"), "5", b"x", [[]], {"a": {1}}, object(), print, Other()]


def test_an_option_of_another_type_raised_a_type_error() -> None:
    """Invalid settings are a ConfigError: `timeout="5"` from an environment variable, headers as a list."""
    names = ["max_attempts", "timeout", "attempt_timeout", "max_concurrency", "rpm", "tpm", "extra"]
    names += ["prices", "budget", "headers", "base_url", "api", "retry", "api_key", "transport"]
    raised = []
    for name in names:
        for value in ODD:
            try:
                LLM("m", **{"base_url": "http://127.0.0.1:9/v1", "api_key": "k", name: value})
            except ConfigError:
                continue
            except Exception as error:  # noqa: BLE001 - collected, so that one assertion lists them all
                raised.append((name, value, repr(error)))
    assert raised == []


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_a_limit_or_a_price_of_another_type_raised_a_type_error(value: Any) -> None:
    """A price for the model is checked when the client is made, not when its first answer is paid."""
    made: list[Callable[[], Any]] = [
        lambda: Budget(usd=value),
        lambda: Budget(tokens=value),
        lambda: Budget(calls=value),
        lambda: Price(input=value, output=1),
        lambda: Price(input=1, output=1, cached=value),
        lambda: LLM("openai-compatible/m", base_url="http://127.0.0.1:9/v1", prices={"m": value}),
    ]
    for make in made:
        with pytest.raises(ConfigError):
            make()


@pytest.mark.parametrize("name", ["openai/m", "anthropic/m", "gemini/m"])
async def test_an_argument_of_another_type_raised_another_exception(name: str) -> None:
    """Tools or fields that are not dicts, and a schema with an object in it, are each a ConfigError."""
    llm = LLM(name, api_key="k", env={}, transport=ScriptedTransport(lambda request: answer()))
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": object()}}}
    calls: list[dict[str, Any]] = [{option: value} for option in ("tools", "tool_choice", "extra") for value in ODD]
    raised = []
    for options in [*calls, {"response_format": schema}, {"tools": {"type": "function"}}, {"tools": "web_search"}]:
        try:
            await llm.complete("q", **options)
        except AggregatorError:
            continue
        except Exception as error:  # noqa: BLE001 - as above
            raised.append((options, repr(error)))
    assert raised == []


async def test_subclasses_of_str_and_float() -> None:
    """A subclass of str or float is accepted, such as numpy's str_ and float64."""
    transport = ScriptedTransport(answer())
    llm = LLM("m", base_url=BASE_URL, transport=transport)
    await llm.complete([{"role": "user", "content": Words("hi")}], temperature=Weight(0.5))
    (body,) = transport.bodies()
    assert (body["messages"][0]["content"], body["temperature"]) == ("hi", 0.5)


async def test_a_body_that_is_too_deep() -> None:
    """Fields nested too deeply are a ConfigError, not a RecursionError."""
    deep: Any = {}
    for _ in range(20_000):
        deep = {"a": deep}
    llm = LLM("m", base_url=BASE_URL, transport=ScriptedTransport(answer()))
    with pytest.raises(ConfigError, match="Expected a request that JSON can hold, got more than 200 levels"):
        await llm.complete(QUESTION, extra={"x": deep})


def test_a_user_in_the_address_and_a_key() -> None:
    """Both use the same header: the error is raised when the client is created, without the password."""
    with pytest.raises(ConfigError, match="a user in base_url and a key") as caught:
        LLM("m", base_url="http://me:word@127.0.0.1:9/v1", api_key="k" * 9)
    assert "word" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (" http://h:1/v1\n", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1#part", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/chat/completions/", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/chat/completions?version=2", "http://h:1/v1/chat/completions?version=2"),
    ],
)
async def test_an_address_with_blanks_or_the_path_of_a_call(address: str, expected: str) -> None:
    """An address copied from a web page or from a request works."""
    transport = ScriptedTransport(answer())
    await LLM("m", base_url=address, transport=transport).complete(QUESTION)
    assert transport.requests[0].url == expected


async def test_two_spellings_of_one_address_had_two_limiters() -> None:
    """An address with a trailing slash is the same account."""
    clients = [
        LLM("m", base_url=f"http://127.0.0.1:9/v1{slash}", transport=ScriptedTransport(answer())) for slash in ("", "/")
    ]
    assert clients[0]._line.limiter() is clients[1]._line.limiter()


async def test_a_stream_that_broke_after_its_end_was_an_error() -> None:
    """The answer was complete: a connection that breaks after [DONE] loses nothing."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM + chunk(DELTA) + chunk(REST) + chunk(b"data: [DONE]\n\n"))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async with serving(handle) as url, client(url) as llm:
        stream = llm.stream(QUESTION)
        assert [delta async for delta in stream] == ["hel", "lo"]
    assert (stream.completion.text, stream.completion.attempts) == ("hello", 1)


async def test_a_page_within_a_stream_that_quotes_the_key() -> None:
    """Whatever a server quotes, the key is not in the error's message."""
    quoting = b'data: {"error": {"message": "bad key a-key-of-the-user", "code": "a-key-of-the-user"}}\n\n'
    for body in (quoting, b"data: <html>a-key-of-the-user</html>\n\n", b"<html>a-key-of-the-user</html>"):
        reply = HTTPReply(status=200, body=body, headers={"content-type": "text/event-stream"})
        llm = LLM(
            "m", base_url=BASE_URL, api_key="a-key-of-the-user", transport=ScriptedTransport(reply), retry=AT_ONCE
        )
        with pytest.raises(LLMError) as caught:
            _ = [delta async for delta in llm.stream(QUESTION)]
        assert "a-key-of-the-user" not in f"{caught.value!s} {caught.value!r} {caught.value.code}"


@pytest.mark.parametrize(
    ("name", "headers", "wait"),
    [
        ("openrouter/m", {"x-ratelimit-remaining": "0", "x-ratelimit-limit": "20", "x-ratelimit-reset": "30"}, 30.0),
        ("openai/m", {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30s"}, 90.0),
        ("openai/m", {"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "1m30s"}, None),
        ("openai/m", {"x-ratelimit-remaining-requests": "0", "retry-after": "2"}, 2.0),
        ("azure/m", {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "500"}, None),
    ],
)
async def test_a_429_with_its_reset_in_the_rate_limit_headers(name: str, headers: dict[str, str], wait: float) -> None:
    """Without a Retry-After, the wait is the time until the limit is full again."""
    transport = ScriptedTransport(failure(429, headers=headers))
    llm = LLM(name, api_key="k", base_url="https://x.example", env={}, transport=transport, max_attempts=1)
    with pytest.raises(RateLimitError) as caught:
        await llm.complete(QUESTION)
    assert caught.value.retry_after == wait


@pytest.mark.parametrize(
    ("name", "headers", "pause"),
    [
        ("mistral/m", {"x-ratelimit-remaining-req-minute": "0", "x-ratelimit-limit-req-minute": "60"}, 1.0),
        ("azure/m", {"x-ratelimit-remaining-requests": "0", "x-ratelimit-limit-requests": "120"}, 0.5),
        ("azure/m", {"x-ratelimit-remaining-requests": "0", "x-ratelimit-limit-requests": "120",
                     "x-ratelimit-reset-requests": "500"}, 0.5),
        ("openrouter/m", {"x-ratelimit-remaining": "0", "x-ratelimit-limit": "20", "x-ratelimit-reset": "10"}, 0.5),
        ("anthropic/m", {"anthropic-ratelimit-requests-remaining": "0",
                         "anthropic-ratelimit-requests-limit": "60"}, 1.0),
    ],
)  # fmt: skip
async def test_rate_limit_headers_that_were_ignored(name: str, headers: dict[str, str], pause: float) -> None:
    """If nothing is left, the next request waits for the bucket to refill one, under every header name."""
    time = VirtualTime()
    limiter = Limiter(clock=time.clock, sleep=time.sleep)
    codec = resolve(name, api_key="k", base_url="https://x.example", env={}).codec
    await limiter.enter()
    limiter.apply_headers(await limiter.admit(), headers, codec)
    await limiter.admit()
    assert sum(time.slept) == pytest.approx(pause)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("0.0.0.0", "http://127.0.0.1:11434/v1"),
        ("0.0.0.0:8080", "http://127.0.0.1:8080/v1"),
        ("127.0.0.1", "http://127.0.0.1:11434/v1"),
        (":11434", "http://127.0.0.1:11434/v1"),
        ("gpu-box", "http://gpu-box:11434/v1"),
        ("http://gpu-box:80", "http://gpu-box:80/v1"),
        ("https://ollama.example/v1", "https://ollama.example/v1"),
    ],
)
def test_ollamas_host_was_port_80(host: str, address: str) -> None:
    """OLLAMA_HOST is the address of a server or a client; without a port it means Ollama's default port."""
    assert resolve("ollama/qwen3", env={"OLLAMA_HOST": host}).base_url == address


def test_claude_on_vertex_was_a_404() -> None:
    """It uses another protocol, so creating the client raises an error."""
    with pytest.raises(ConfigError, match="Gemini's protocol for vertex, got 'claude-sonnet-4-5'"):
        resolve("vertex_ai/claude-sonnet-4-5", env={"GOOGLE_CLOUD_PROJECT": "p"})
