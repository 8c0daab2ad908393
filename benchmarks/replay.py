"""Replay: what an exchange costs from a cassette, by own client and patched aiohttp, against vcrpy and cassetter."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import threads, traffic
from benchmarks.harness import Case, Clock, Measured, Options, call, measure, run_case
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
        cases += threads.cases(paths[sizes[-1]], folder, sizes[-1])
        measured = measure(cases, options, repetitions=5)
        live = measure(threads.live_cases(quick=options.quick), options, repetitions=1)
        stock = measure([stock_case(n) for n in sizes], options, repetitions=1)
    largest = sizes[-1]
    return Report(
        rows=[
            *measured.rows(),
            *stock.rows(),
            *live.rows(),
            *ratio_rows(measured, sizes),
            *threads.rows(measured, largest),
        ],
        targets=[*targets(measured, stock, largest), *threads.targets(measured, live, largest)],
        missing=[*measured.missing, *stock.missing],
        versions={**measured.versions, **stock.versions},
        notes=[
            "targets are held against CPU time, which another process's load does not change; us is the wall time",
            "bare: sha256 of the body, a dictionary, the row and its completion decoded by msgspec; no client, no loop",
            "floor: bare in an event loop, with the request encoded, reply and Completion made, one turn given up",
            f"stock vcrpy beyond {FEW} exchanges: integrated over {SAMPLES} requests along it, all before them played",
            f"turn_ms: the longest CPU time between two turns of the event loop while {TASKS} tasks replay",
            "answered at once: the client alone, its pool answers without connection; of ours is the difference",
            "cassetter's own YAML refuses to load 2,000 such exchanges or more, so it is measured up to 1,000",
        ],
    )


def ours(path: str, n: int) -> list[Case]:
    return [
        Case(f"bare {n}", call("replay", "bare", path=path, n=n)),
        Case(f"floor {n}", call("replay", "floor", path=path, n=n)),
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
    return [
        Row(f"{name} / bare {n}", {"cpu_us": measured.ratio(f"{name} {n}", f"bare {n}", "cpu_us")})
        for n in sizes
        for name in ("floor", "own client")
    ]


def targets(measured: Measured, stock: Measured, n: int) -> list[Target]:
    aiohttp = measured.median(f"patched aiohttp {n}", "cpu_us")
    slow = stock.median(f"stock vcrpy, aiohttp {n}", "cpu_us")
    growth = measured.ratio(f"own client {n}", "own client 100", "cpu_us")
    bare_growth = measured.ratio(f"bare {n}", "bare 100", "cpu_us")
    return [
        Target(f"own client, an exchange of {n}", measured.median(f"own client {n}", "cpu_us"), 25.0, "us"),
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
    """Record n exchanges by our own client, and one to warm up on; patched aiohttp plays them too."""
    from aggregator import cassette
    from aggregator.cassettes import storage

    storage.SHARD_BYTES = 1 << 40  # one file, as peers have one
    llm = client(Canned())
    async with cassette(path, "all", layout="journal"):
        for i in range(n + 1):
            await llm.complete(traffic.messages(i))
    return {"exchanges": n}


def bare(path: str, n: int) -> dict[str, float]:
    from hashlib import sha256

    import msgspec

    body = msgspec.defstruct("Body", [("string", str)])
    line = msgspec.defstruct("Line", [("response", msgspec.defstruct("Response", [("body", body)]))])
    head = msgspec.defstruct("Head", [("request", msgspec.defstruct("Request", [("body", str)]))])
    choice = msgspec.defstruct("Choice", [("message", msgspec.defstruct("Message", [("content", str)]))])
    chat = msgspec.defstruct("Chat", [("choices", list[choice])])  # type: ignore[valid-type]

    rows = [item[2:] for item in Path(path).read_bytes().splitlines() if item.startswith(b"- ")]
    heads: Any = msgspec.json.Decoder(head)
    bodies = [heads.decode(row).request.body.encode() for row in rows]
    index = {sha256(body).digest(): row for body, row in zip(bodies, rows, strict=True)}
    lines: Any = msgspec.json.Decoder(line)
    chats: Any = msgspec.json.Decoder(chat)
    decode, decode_chat = lines.decode, chats.decode

    assert len(bodies) == n + 1
    with Clock() as clock:
        for body in bodies[:n]:
            row = index[sha256(body).digest()]
            assert decode_chat(decode(row).response.body.string).choices[0].message.content
    return clock.each(n)


async def floor(path: str, n: int) -> dict[str, float]:
    """What a client cannot leave out: request encoded, key, row, reply, Completion, one turn of the loop."""
    from hashlib import sha256

    import msgspec

    from aggregator.cassettes.storage import read
    from aggregator.llm.calls import ChatCall

    recording = read(Path(path))
    assert recording is not None
    rows = {sha256(row.exchange().request.body).digest(): row for row in recording.rows}
    codec, encode = client().endpoint.codec, msgspec.json.Encoder().encode
    call, asked = ChatCall(model=traffic.MODEL, messages=()), [traffic.messages(i) for i in range(n)]
    with Clock() as clock:
        for messages in asked:
            row = rows[sha256(encode({"model": traffic.MODEL, "messages": messages})).digest()]
            reply = row.reply()
            await asyncio.sleep(0)
            assert codec.decode(reply, call).replayed
    return clock.each(n)


async def own_client(path: str, n: int) -> dict[str, float]:
    from aggregator import cassette

    llm, asked = client(), [traffic.messages(i) for i in range(n)]

    async with cassette(path, "none"):
        await llm.complete(traffic.messages(n))
        with Clock() as clock:
            for messages in asked:
                assert (await llm.complete(messages)).replayed
    return clock.each(n)


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

    async with cassette(path, "none"):
        await llm.complete(traffic.messages(n))
        with Clock() as clock:
            async with asyncio.TaskGroup() as group:
                group.create_task(watch())
                async with asyncio.TaskGroup() as replaying:
                    for first in range(TASKS):
                        replaying.create_task(some(first))
                running = False
    return {**clock.each(n), "turn_ms": longest * 1e3}


async def ask_aiohttp(session: Any, body: bytes) -> None:
    async with session.post(traffic.URL, data=body, headers=traffic.REQUEST_HEADERS) as response:
        assert len(await response.read()) > 1000


async def patched_aiohttp(path: str, n: int) -> dict[str, float]:
    import aiohttp

    from aggregator import cassette

    bodies = [traffic.body(i) for i in range(n)]
    async with cassette(path, "none", clients=["aiohttp"]), aiohttp.ClientSession() as session:
        await ask_aiohttp(session, traffic.body(n))
        with Clock() as clock:
            for body in bodies:
                await ask_aiohttp(session, body)
    return clock.each(n)


async def cassetter(path: str, n: int) -> dict[str, float]:
    import aiohttp
    from cassetter import use_cassette  # type: ignore[import-not-found] # a peer

    match_on = ["method", "uri", "body"]
    with use_cassette(path, record_mode="all", match_on=match_on, intercept=["aiohttp"]) as recording:
        for i in range(n + 1):
            recording.record(
                method="POST",
                uri=traffic.URL,
                request_headers={key: [value] for key, value in traffic.REQUEST_HEADERS.items()},
                request_body=traffic.body(i),
                status=200,
                response_headers={key: [value] for key, value in traffic.REPLY_HEADERS.items()},
                response_body=traffic.answer(i),
            )

    bodies = [traffic.body(i) for i in range(n)]
    with use_cassette(path, record_mode="none", match_on=match_on, intercept=["aiohttp"]):
        async with aiohttp.ClientSession() as session:
            await ask_aiohttp(session, traffic.body(n))
            with Clock() as clock:
                for body in bodies:
                    await ask_aiohttp(session, body)
    return clock.each(n)


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
                bodies = [traffic.body(i) for i in range(n)]
                with Clock() as clock:
                    for asked in bodies:
                        await ask_aiohttp(session, asked)
                return {**clock.each(n), "last_ms": await one(session, cassette, n - 1) * 1e3}
            points = [round(i * (n - 1) / (SAMPLES - 1)) for i in range(SAMPLES)]
            costs = [await one(session, cassette, i) for i in points]
    area = sum((b - a) * (x + y) / 2 for a, b, x, y in zip(points, points[1:], costs, costs[1:], strict=False))
    return {"cpu_us": area / (n - 1) * 1e6, "last_ms": costs[-1] * 1e3}


def stock_exchange(i: int) -> tuple[Any, dict[str, Any]]:
    from vcr.request import Request

    headers = {key: [value] for key, value in traffic.REPLY_HEADERS.items()}
    response = {"status": {"code": 200, "message": "OK"}, "headers": headers, "body": {"string": traffic.answer(i)}}
    return Request("POST", traffic.URL, traffic.body(i), traffic.REQUEST_HEADERS), response


async def one(session: Any, cassette: Any, i: int) -> float:
    """CPU seconds of the i-th request, all before it played."""
    cassette.play_counts.clear()
    cassette.play_counts.update(dict.fromkeys(range(i), 1))
    start = time.process_time()
    await ask_aiohttp(session, traffic.body(i))
    return time.process_time() - start
