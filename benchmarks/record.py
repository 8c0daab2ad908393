"""Record: what recording adds to live calls, 16 in flight, by own client and patched aiohttp, against the peers."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks import traffic
from benchmarks.harness import Case, Measured, Options, background, call, measure
from benchmarks.report import Report, Target

N = 1_000
FEW = 300  # stock vcrpy is quadratic: 1,000 exchanges take a minute
IN_FLIGHT = 16
TOGETHER = 8  # exchanges that come in one turn of the loop, with so many in flight and a server that answers at once


def run(options: Options) -> Report:
    few = 100 if options.quick else FEW
    with tempfile.TemporaryDirectory() as folder, background(["-m", "benchmarks.chat_server"]) as url:

        def case(name: str, function: str, n: int, *needs: str, **options: Any) -> Case:
            path = f"{folder}/{function}-{n}-{'-'.join(options.values())}.yaml"
            return Case(f"{name} {n}", call("record", function, url=url, path=path, n=n, **options), needs)

        measured = measure(
            [
                case("own client", "own_client", N, recorder="none"),
                case("own client, recorded", "own_client", N, recorder="ours"),
                case("aiohttp", "aiohttp_client", N, recorder="none"),
                case("aiohttp, recorded", "aiohttp_client", N, recorder="ours"),
                case("aiohttp, cassetter", "aiohttp_client", N, "cassetter", "aiohttp", recorder="cassetter"),
                case("aiohttp", "aiohttp_client", few, recorder="none"),
                case("aiohttp, stock vcrpy", "aiohttp_client", few, "vcr", "aiohttp", recorder="vcrpy"),
                Case(f"floor {N}", call("record", "floor", path=f"{folder}/floor", n=N)),
            ],
            options,
            repetitions=7,
        )
    return Report(
        rows=measured.rows(),
        targets=targets(measured, few),
        missing=measured.missing,
        versions=measured.versions,
        notes=[
            f"{IN_FLIGHT} calls in flight against a loopback server in a process of its own; each exchange is on disk",
            "s and cpu_us: from the first call to the last answer; close_s: finishing the file, in canonical order",
            f"floor: digests, line and its hash, write, in a loop of nothing else, {TOGETHER} exchanges a write;",
            "looks_us: of these, one quick look for secrets at each text; neither client, tape nor event loop",
        ],
    )


def targets(measured: Measured, few: int) -> list[Target]:
    plain, recorded = f"own client {N}", f"own client, recorded {N}"
    with_cpu, without = measured.median(recorded, "cpu_us"), measured.median(plain, "cpu_us")
    added = with_cpu - without if with_cpu is not None and without is not None else None
    stock = measured.ratio(f"aiohttp, stock vcrpy {few}", f"aiohttp {few}", "s")
    aiohttp = measured.ratio(f"aiohttp, recorded {N}", f"aiohttp {N}", "s")
    return [
        Target("own client recorded, of not recorded", measured.ratio(recorded, plain, "s"), 1.6, "x"),
        Target("CPU that recording adds, an exchange", added, 60.0, "us"),
        Target(
            "stock vcrpy / patched aiohttp, slowdown",
            stock / aiohttp if stock and aiohttp else None,
            1.0,
            "x",
            at_least=True,
        ),
    ]


# What runs in the processes ------------------------------------------------------------------------------------------


async def in_flight(ask: Callable[[int], Awaitable[object]], n: int) -> dict[str, float]:
    """Ask n times, so many at once; one call before the clock starts opens the way."""
    await ask(n)
    numbers = iter(range(n))

    async def some() -> None:
        for i in numbers:
            await ask(i)

    start, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(some())
    return {"s": time.perf_counter() - start, "cpu_us": (time.process_time() - cpu) / n * 1e6}


async def own_client(url: str, path: str, n: int, recorder: str) -> dict[str, float]:
    from aggregator import LLM, cassette

    llm = LLM(f"openai/{traffic.MODEL}", base_url=url, api_key="sk-" + "0123456789abcdef" * 3)  # as long as real ones
    asked = [traffic.messages(i) for i in range(n + 1)]

    async def ask(i: int) -> None:
        assert not (await llm.complete(asked[i])).replayed

    opened: Any = cassette(path, "all") if recorder == "ours" else nullcontext()
    return await recorded(opened, ask, n)


def floor(path: str, n: int) -> dict[str, float]:
    """The parts of recording an exchange that no recorder of this format leaves out, each on its own bytes, warm."""
    from aggregator.cassettes.exchanges import Exchange, Facts, encode_line
    from aggregator.cassettes.matching import request_key
    from aggregator.cassettes.redaction import looks_clean
    from aggregator.records import HTTPReply, HTTPRequest
    from benchmarks.chat_server import ANSWER

    facts = Facts(
        lineage="train/epoch=0/batch=1/sample=3", order=1, model="benchmark", ms=1.2, at="2026-01-01T00:00:00Z"
    )
    reply = HTTPReply(status=200, reason="OK", body=ANSWER, headers=traffic.REPLY_HEADERS)
    requests = [HTTPRequest(url=traffic.URL, body=traffic.body(i), headers=traffic.REQUEST_HEADERS) for i in range(n)]
    batches = [requests[i : i + TOGETHER] for i in range(0, n, TOGETHER)]
    needles = [(b"sk-" + b"0123456789abcdef" * 3,)]
    spent = {"looks_us": 0.0, "write_us": 0.0, "cpu_us": 0.0}
    start = time.process_time()
    with Path(path).open("ab", buffering=0) as file:
        for batch in batches:
            looking = time.perf_counter()
            assert looks_clean([request.body for request in batch], needles)
            assert looks_clean([ANSWER] * len(batch), needles)
            spent["looks_us"] += time.perf_counter() - looking
            for request in batch:
                request_key(request.method, request.url, request.body)
            lines = [encode_line(Exchange(request=request, reply=reply, facts=facts)) for request in batch]
            writing = time.perf_counter()
            file.write(b"\n".join(lines))
            spent["write_us"] += time.perf_counter() - writing
    spent["cpu_us"] = time.process_time() - start
    return {name: seconds / n * 1e6 for name, seconds in spent.items()}


async def aiohttp_client(url: str, path: str, n: int, recorder: str) -> dict[str, float]:
    import aiohttp

    bodies = [traffic.body(i) for i in range(n + 1)]
    async with aiohttp.ClientSession() as session:

        async def ask(i: int) -> None:
            headers = traffic.REQUEST_HEADERS
            async with session.post(f"{url}/chat/completions", data=bodies[i], headers=headers) as response:
                assert response.status == 200
                await response.read()

        return await recorded(open_recorder(recorder, path), ask, n)


def open_recorder(recorder: str, path: str) -> AbstractContextManager[Any]:
    if recorder == "ours":
        from aggregator import cassette

        return cassette(path, "all", clients=["aiohttp"])
    if recorder == "vcrpy":
        from vcr import VCR

        opened: AbstractContextManager[Any] = VCR(
            record_mode="all", match_on=["method", "scheme", "host", "port", "path", "query", "body"]
        ).use_cassette(path)
        return opened
    if recorder == "cassetter":
        from cassetter import use_cassette  # type: ignore[import-not-found] # a peer

        peer: AbstractContextManager[Any] = use_cassette(
            path, record_mode="all", match_on=["method", "uri", "body"], intercept=["aiohttp"]
        )
        return peer
    return nullcontext()


async def recorded(
    opened: AbstractContextManager[Any], ask: Callable[[int], Awaitable[object]], n: int
) -> dict[str, float]:
    with opened:
        figures = await in_flight(ask, n)
        start = time.perf_counter()
    return {**figures, "close_s": time.perf_counter() - start}
