"""Replay: what an exchange costs from a cassette, by own client and patched aiohttp, beside vcrpy and cassetter."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import traffic
from benchmarks.harness import Case, Measured, Options, call, measure, run_case
from benchmarks.report import Report, Row, Target

SIZES = (100, 1_000, 10_000)
FEW = 300  # stock vcrpy replays so many in full; beyond, single requests are measured and summed up
SAMPLES = 5
TASKS = 64


def run(options: Options) -> Report:
    sizes = SIZES[:2] if options.quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        paths = {n: str(Path(folder) / f"{n}.yaml") for n in sizes}
        for n, path in paths.items():
            run_case(Case(f"record {n}", call("replay", "record", path=path, n=n)))
        cases = [case for n, path in paths.items() for case in (*ours(path, n), *peers(folder, n))]
        measured = measure(cases, options, repetitions=5)
        stock = measure([stock_case(n) for n in sizes], options, repetitions=1)
    largest = sizes[-1]
    return Report(
        rows=[*measured.rows(), *stock.rows(), *ratio_rows(measured, sizes)],
        targets=targets(measured, stock, largest),
        missing=[*measured.missing, *stock.missing],
        versions={**measured.versions, **stock.versions},
        notes=[
            "bare: sha256 of the body, a dictionary, the row and its completion decoded by msgspec; no client, no loop",
            f"stock vcrpy beyond {FEW} exchanges: integrated over {SAMPLES} requests along it, all before them played",
            f"turn_ms: the longest CPU time between two turns of the event loop while {TASKS} tasks replay",
            "cassetter's own YAML refuses to load 2,000 such exchanges or more, so it is measured up to 1,000",
        ],
    )


def ours(path: str, n: int) -> list[Case]:
    return [
        Case(f"bare {n}", call("replay", "bare", path=path, n=n)),
        Case(f"own client {n}", call("replay", "own_client", path=path, n=n)),
        Case(f"own client, {TASKS} tasks {n}", call("replay", "own_client_tasks", path=path, n=n)),
        Case(f"patched aiohttp {n}", call("replay", "patched_aiohttp", path=path, n=n)),
    ]


def peers(folder: str, n: int) -> list[Case]:
    if n > 1_000:
        return []
    path = str(Path(folder) / f"cassetter-{n}.yaml")
    return [Case(f"cassetter, aiohttp {n}", call("replay", "cassetter", path=path, n=n), ("cassetter", "aiohttp"))]


def stock_case(n: int) -> Case:
    return Case(f"stock vcrpy, aiohttp {n}", call("replay", "stock_vcrpy", n=n), ("vcr", "aiohttp"))


def ratio_rows(measured: Measured, sizes: Iterable[int]) -> list[Row]:
    """What the loop's own caches do to a longer tape, and what is left of ours."""
    return [Row(f"own client / bare {n}", {"us": measured.ratio(f"own client {n}", f"bare {n}", "us")}) for n in sizes]


def targets(measured: Measured, stock: Measured, n: int) -> list[Target]:
    aiohttp = measured.median(f"patched aiohttp {n}", "us")
    slow = stock.median(f"stock vcrpy, aiohttp {n}", "us")
    growth = measured.ratio(f"own client {n}", "own client 100", "us")
    bare_growth = measured.ratio(f"bare {n}", "bare 100", "us")
    return [
        Target(f"own client, an exchange of {n}", measured.median(f"own client {n}", "us"), 20.0, "us"),
        Target(f"own client, of bare at {n}", measured.ratio(f"own client {n}", f"bare {n}", "us"), 2.5, "x"),
        Target(f"growth 100 to {n}, of bare's", growth / bare_growth if growth and bare_growth else None, 1.3, "x"),
        Target(f"patched aiohttp, an exchange of {n}", aiohttp, 100.0, "us"),
        Target("longest turn", measured.median(f"own client, {TASKS} tasks {n}", "turn_ms"), 2.0, "ms"),
        Target(
            f"stock vcrpy / patched aiohttp {n}",
            slow / aiohttp if slow and aiohttp else None,
            1000.0,
            "x",
            at_least=True,
        ),
    ]


# What runs in the processes ------------------------------------------------------------------------------------------


def timed(work: Callable[[], object], n: int) -> dict[str, float]:
    gc.collect()
    gc.freeze()  # what stands before the clock starts is not the replay's to look through
    start = time.perf_counter()
    work()
    return {"us": (time.perf_counter() - start) / n * 1e6}


async def timed_async(work: Callable[[], Awaitable[object]], n: int) -> dict[str, float]:
    gc.collect()
    gc.freeze()
    start = time.perf_counter()
    await work()
    return {"us": (time.perf_counter() - start) / n * 1e6}


class Canned:
    """A transport that answers at once, to record with our own client."""

    def __init__(self) -> None:
        self.count = 0

    async def send(self, request: Any, *, timeout: float | None = None) -> Any:
        from aggregator.records import HTTPReply

        self.count += 1
        return HTTPReply(status=200, reason="OK", body=traffic.answer(self.count - 1), headers=traffic.REPLY_HEADERS)


def client(transport: Any = None) -> Any:
    from aggregator import LLM

    base_url = traffic.URL.removesuffix("/chat/completions")
    return LLM(f"openai/{traffic.MODEL}", base_url=base_url, api_key="none", transport=transport)


async def record(path: str, n: int) -> dict[str, float]:
    """Record n exchanges by our own client; they play for patched aiohttp too, since the request counts."""
    from aggregator import cassette

    llm = client(Canned())
    async with cassette(path, "all", layout="journal"):
        for i in range(n):
            await llm.complete(traffic.messages(i))
    return {"exchanges": n}


def bare(path: str, n: int) -> dict[str, float]:
    from hashlib import sha256

    import msgspec

    class Body(msgspec.Struct):
        string: str

    class Response(msgspec.Struct):
        body: Body

    class Line(msgspec.Struct):
        response: Response

    class Message(msgspec.Struct):
        content: str

    class Choice(msgspec.Struct):
        message: Message

    class Chat(msgspec.Struct):
        choices: list[Choice]

    class Asked(msgspec.Struct):
        body: str

    class Head(msgspec.Struct):
        request: Asked

    rows = [line[2:] for line in Path(path).read_bytes().splitlines() if line.startswith(b"- ")]
    heads = msgspec.json.Decoder(Head)
    bodies = [heads.decode(row).request.body.encode() for row in rows]
    index = {sha256(body).digest(): row for body, row in zip(bodies, rows, strict=True)}
    decode, decode_chat = msgspec.json.Decoder(Line).decode, msgspec.json.Decoder(Chat).decode

    def work() -> None:
        for body in bodies:
            row = index[sha256(body).digest()]
            assert decode_chat(decode(row).response.body.string).choices[0].message.content

    assert len(bodies) == n
    return timed(work, n)


async def own_client(path: str, n: int) -> dict[str, float]:
    from aggregator import cassette

    llm, asked = client(), [traffic.messages(i) for i in range(n)]

    async def work() -> None:
        for messages in asked:
            assert (await llm.complete(messages)).replayed

    async with cassette(path, "none"):
        return await timed_async(work, n)


async def own_client_tasks(path: str, n: int) -> dict[str, float]:
    from aggregator import cassette

    llm, asked = client(), [traffic.messages(i) for i in range(n)]
    longest, running = 0.0, True

    async def watch() -> None:
        """Each pass of the loop runs every ready task once; the time from one pass to the next is a turn."""
        nonlocal longest
        last = time.thread_time()
        while running:
            await asyncio.sleep(0)
            now = time.thread_time()
            longest, last = max(longest, now - last), now

    async def some(first: int) -> None:
        for messages in asked[first::TASKS]:
            await llm.complete(messages)

    async def work() -> None:
        nonlocal running
        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            async with asyncio.TaskGroup() as replaying:
                for first in range(TASKS):
                    replaying.create_task(some(first))
            running = False

    async with cassette(path, "none"):
        figures = await timed_async(work, n)
    return {**figures, "turn_ms": longest * 1e3}


async def ask_aiohttp(session: Any, i: int) -> None:
    async with session.post(traffic.URL, data=traffic.body(i), headers=traffic.REQUEST_HEADERS) as response:
        assert len(await response.read()) > 1000


async def patched_aiohttp(path: str, n: int) -> dict[str, float]:
    import aiohttp

    from aggregator import cassette

    bodies = [traffic.body(i) for i in range(n)]

    async def work() -> None:
        for body in bodies:
            async with session.post(traffic.URL, data=body, headers=traffic.REQUEST_HEADERS) as response:
                assert response.status == 200
                await response.read()

    async with cassette(path, "none", clients=["aiohttp"]), aiohttp.ClientSession() as session:
        return await timed_async(work, n)


async def cassetter(path: str, n: int) -> dict[str, float]:
    import aiohttp
    from cassetter import use_cassette  # type: ignore[import-not-found] # a peer

    match_on = ["method", "uri", "body"]
    with use_cassette(path, record_mode="all", match_on=match_on, intercept=["aiohttp"]) as recording:
        for i in range(n):
            recording.record(
                method="POST",
                uri=traffic.URL,
                request_headers={key: [value] for key, value in traffic.REQUEST_HEADERS.items()},
                request_body=traffic.body(i),
                status=200,
                response_headers={key: [value] for key, value in traffic.REPLY_HEADERS.items()},
                response_body=traffic.answer(i),
            )

    async def work() -> None:
        for i in range(n):
            await ask_aiohttp(session, i)

    with use_cassette(path, record_mode="none", match_on=match_on, intercept=["aiohttp"]):
        async with aiohttp.ClientSession() as session:
            return await timed_async(work, n)


async def stock_vcrpy(n: int) -> dict[str, float]:
    """Replay through stock vcrpy, in memory: in full where that takes seconds, else sampled and integrated."""
    import aiohttp
    from vcr.cassette import Cassette
    from vcr.matchers import body, host, method, path, port, query, scheme
    from vcr.record_mode import RecordMode

    options = {"path": "unused.yaml", "record_mode": RecordMode.NONE}
    match_on = (method, scheme, host, port, path, query, body)
    with Cassette.use(**options, match_on=match_on) as cassette:
        cassette.data = [stock_exchange(i) for i in range(n)]
        cassette.rewound, cassette.dirty = True, False
        async with aiohttp.ClientSession() as session:
            if n <= FEW:

                async def work() -> None:
                    for i in range(n):
                        await ask_aiohttp(session, i)

                return {**await timed_async(work, n), "last_ms": await last(session, cassette, n)}
            points = [round(i * (n - 1) / (SAMPLES - 1)) for i in range(SAMPLES)]
            costs = [await one(session, cassette, i) for i in points]
    area = sum((b - a) * (x + y) / 2 for a, b, x, y in zip(points, points[1:], costs, costs[1:], strict=False))
    return {"us": area / (n - 1) * 1e6, "last_ms": costs[-1] * 1e3}


def stock_exchange(i: int) -> tuple[Any, dict[str, Any]]:
    from vcr.request import Request

    headers = {key: [value] for key, value in traffic.REPLY_HEADERS.items()}
    response = {"status": {"code": 200, "message": "OK"}, "headers": headers, "body": {"string": traffic.answer(i)}}
    return Request("POST", traffic.URL, traffic.body(i), traffic.REQUEST_HEADERS), response


async def one(session: Any, cassette: Any, i: int) -> float:
    """Seconds of the i-th request, all before it played."""
    cassette.play_counts.clear()
    cassette.play_counts.update(dict.fromkeys(range(i), 1))
    start = time.perf_counter()
    await ask_aiohttp(session, i)
    return time.perf_counter() - start


async def last(session: Any, cassette: Any, n: int) -> float:
    return await one(session, cassette, n - 1) * 1e3
