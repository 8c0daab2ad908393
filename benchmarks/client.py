"""What a call costs: CPU and memory against bare aiohttp + msgspec and the other clients; behaviour under limits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

from benchmarks.harness import Case, Options, background, call, measure
from benchmarks.report import Report, Target

SYSTEM = "You route tickets of a software company to the team that should answer them. " * 14
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "My invoice shows last month's plan."}]
Ask = Callable[[], Awaitable[Any]]


def pin() -> None:
    """Keep to the last core; the server takes another where there is one."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def bare(url: str, session: Any) -> Ask:
    """The floor: aiohttp as a careful user sets it up, msgspec, the fields that one reads."""
    import msgspec

    message = msgspec.defstruct("Message", [("content", str | None, None)])
    choice = msgspec.defstruct("Choice", [("message", message), ("finish_reason", str | None, None)])
    usage = msgspec.defstruct("Usage", [("prompt_tokens", int, 0), ("completion_tokens", int, 0)])
    answer = msgspec.defstruct("Answer", [("choices", list[choice]), ("usage", usage)])  # type: ignore[valid-type]
    encode, decode = msgspec.json.Encoder().encode, msgspec.json.Decoder(answer).decode
    address = f"{url}/chat/completions"
    headers = {"content-type": "application/json", "authorization": "Bearer none"}

    async def ask() -> str | None:
        body = encode({"model": "benchmark", "messages": MESSAGES, "max_tokens": 400})
        async with session.post(address, data=body, headers=headers) as response:
            assert response.status == 200
            return decode(await response.read()).choices[0].message.content  # type: ignore[attr-defined,no-any-return]

    return ask


def ours(url: str, everything: bool) -> Ask:
    """Our client; with `everything`: limits per minute, every kind of budget, lineage; no listener for events."""
    from aggregator import LLM, Budget, Price

    if not everything:
        llm = LLM("benchmark", base_url=url, api_key="none", max_concurrency=10_000)
        return lambda: llm.complete(MESSAGES, max_tokens=400)
    from aggregator.cassettes.lineage import lineage

    llm = LLM(
        "benchmark",
        base_url=url,
        api_key="none",
        max_concurrency=10_000,
        rpm=1e9,
        budget=Budget(usd=1e6, tokens=10**12, calls=10**9),
        prices={"benchmark": Price(input=0.15, output=0.6)},
    )

    async def ask() -> Any:
        with lineage("train", "sample=1", role="optimizer"):
            return await llm.complete(MESSAGES, max_tokens=400)

    return ask


def openai_client(url: str, aiohttp_backend: bool) -> Ask:
    import openai

    options = {"http_client": openai.DefaultAioHttpClient()} if aiohttp_backend else {}
    client = openai.AsyncOpenAI(base_url=url, api_key="none", **options)
    return lambda: client.chat.completions.create(model="benchmark", messages=MESSAGES, max_tokens=400)  # type: ignore[arg-type,return-value]


def litellm_client(url: str) -> Ask:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    return lambda: litellm.acompletion(  # type: ignore[no-any-return]
        model="openai/benchmark", api_base=url, api_key="none", messages=MESSAGES, max_tokens=400
    )


async def cpu(client: str, url: str, concurrency: int, calls: int) -> dict[str, float]:
    """CPU of this process per call, and calls per second, at a steady concurrency."""
    pin()
    async with _Clients() as clients:
        ask = clients.ask(client, url)
        await _ask_many(ask, concurrency, max(concurrency, 200))
        started, before = time.perf_counter(), time.process_time()
        await _ask_many(ask, concurrency, calls)
        spent, took = time.process_time() - before, time.perf_counter() - started
    return {"us": spent / calls * 1e6, "calls/s": calls / took}


async def interleaved(url: str, concurrency: int, calls: int, rounds: int) -> dict[str, float]:
    """Bare and ours in turn in one process: what our own code adds, on a busy machine too."""
    pin()
    spent: dict[str, list[float]] = {"bare": [], "ours": [], "ours, plain": []}
    async with _Clients() as clients:
        asks = {client: clients.ask(client, url) for client in spent}
        for ask in asks.values():
            await _ask_many(ask, concurrency, max(concurrency, 200))
        for number in range(rounds):
            for client in list(asks) if number % 2 else reversed(list(asks)):
                before = time.process_time()
                await _ask_many(asks[client], concurrency, calls)
                spent[client].append((time.process_time() - before) / calls * 1e6)
    ratios = {
        client: statistics.median(a / b for a, b in zip(spent[client], spent["bare"], strict=True)) for client in spent
    }
    return {"bare us": min(spent["bare"]), "ours / bare": ratios["ours"], "plain / bare": ratios["ours, plain"]}


async def memory(client: str, url: str, in_flight: int) -> dict[str, float]:
    """Resident memory with so many calls waiting for their answers."""
    async with _Clients() as clients:
        ask = clients.ask(client, url)
        await _ask_many(ask, 4, 8)
        before = _resident()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(in_flight):
                tasks.create_task(_done(ask))
            await asyncio.sleep(1.0)  # the server answers later
            during = _resident()
    return {"MB": during / 1e6, "KB a call": (during - before) / in_flight / 1e3}


class _Clients:
    """Makes a client by name; closes what the bare one needs."""

    def __init__(self) -> None:
        self._session: Any = None

    def ask(self, client: str, url: str) -> Ask:
        if client == "bare":
            import aiohttp

            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)
            )
            return bare(url, self._session)
        makers: dict[str, Callable[[], Ask]] = {
            "ours": lambda: ours(url, everything=True),
            "ours, plain": lambda: ours(url, everything=False),
            "openai": lambda: openai_client(url, aiohttp_backend=False),
            "openai on aiohttp": lambda: openai_client(url, aiohttp_backend=True),
            "litellm": lambda: litellm_client(url),
        }
        return makers[client]()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._session is not None:
            await self._session.close()


async def _done(ask: Ask) -> None:
    await ask()


async def _ask_many(ask: Ask, concurrency: int, calls: int) -> None:
    left = iter(range(calls))

    async def worker() -> None:
        for _ in left:
            await ask()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(worker())


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()


async def bucket(url: str, calls: int, concurrency: int) -> dict[str, float]:
    """A server that lets 100 a second through, burst 20, and says no more than `retry-after: 1`."""
    from aggregator import LLM
    from aggregator.errors import LLMError

    llm = LLM("benchmark", base_url=url, api_key="none", max_concurrency=concurrency)
    failed = 0

    async def ask() -> None:
        nonlocal failed
        try:
            await llm.complete(MESSAGES, max_tokens=400)
        except LLMError:
            failed += 1

    before, started = await _counts(url), time.perf_counter()
    await _ask_many(ask, calls, calls)
    took, after = time.perf_counter() - started, await _counts(url)
    return {"failed": failed, "requests": after["requests"] - before["requests"], "seconds": took}


async def cancelled(url: str, in_flight: int) -> dict[str, float]:
    """Cancel calls that wait for their answers: how many the server sees closed, and after how long."""
    from aggregator import LLM

    llm = LLM("benchmark", base_url=url, api_key="none", max_concurrency=in_flight)
    own, before = {asyncio.current_task()}, (await _counts(url))["closed_waiting"]
    tasks = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(llm.complete(MESSAGES)) for _ in range(in_flight)]
            await asyncio.sleep(0.5)
            started = time.perf_counter()
            for task in tasks:
                task.cancel()
    except asyncio.CancelledError:
        pass
    seen = 0
    while seen < in_flight and time.perf_counter() - started < 2:
        seen = (await _counts(url))["closed_waiting"] - before
    took = time.perf_counter() - started
    return {"cancelled": in_flight, "seen": seen, "ms": took * 1e3, "tasks left": len(asyncio.all_tasks() - own)}


async def faulty(client: str, url: str, calls: int, in_flight: int, patience: float = 60) -> dict[str, float]:
    """Calls with six attempts each to a server that misbehaves: seconds, lost calls, requests that no count has.

    `patience` is the limit of one attempt in seconds.
    """
    ask, counted = _patient(client, url, in_flight, patience)
    lost = 0

    async def try_it() -> None:
        nonlocal lost
        try:
            await ask()
        except Exception:  # noqa: BLE001 - of any client
            lost += 1

    before, started = await _counts(url), time.perf_counter()
    await _ask_many(try_it, in_flight, calls)
    took, after = time.perf_counter() - started, await _counts(url)
    found = {"seconds": took, "failed": lost, "requests": after["requests"] - before["requests"]}
    return found | ({"uncounted": found["requests"] - counted()} if client == "ours" else {})


async def steady(client: str, url: str, in_flight: int, seconds: float) -> dict[str, float]:
    """Calls a second in the first and in the last third of the time."""
    ask, _ = _patient(client, url, in_flight, 60)
    started, done = time.perf_counter(), []

    async def worker() -> None:
        while time.perf_counter() - started < seconds:
            with contextlib.suppress(Exception):
                await ask()
                done.append(time.perf_counter() - started)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(in_flight):
            tasks.create_task(worker())
    third = seconds / 3
    return {
        "calls/s, first": sum(at < third for at in done) / third,
        "calls/s, last": sum(seconds - third <= at < seconds for at in done) / third,
    }


def _patient(client: str, url: str, in_flight: int, patience: float) -> tuple[Ask, Callable[[], int]]:
    """A client with six attempts a call, and how many requests it counted."""
    if client == "openai":
        import openai

        sdk = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=5, timeout=patience)
        return lambda: sdk.chat.completions.create(model="m", messages=MESSAGES, max_tokens=100), int  # type: ignore[arg-type,return-value]
    from aggregator import LLM, Budget

    budget = Budget(calls=10**9)
    limits: dict[str, Any] = {"timeout": 60, "attempt_timeout": patience, "max_attempts": 6}
    llm = LLM("m", base_url=url, api_key="none", max_concurrency=in_flight, budget=budget, **limits)
    return lambda: llm.complete(MESSAGES, max_tokens=100), lambda: budget.spent.calls


async def _counts(url: str) -> dict[str, int]:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(url) as response:
        counts: dict[str, int] = await response.json()
        return counts


CLIENTS: dict[str, tuple[str, ...]] = {
    "bare": (),
    "ours": (),
    "ours, plain": (),
    "openai on aiohttp": ("openai",),
    "openai": ("openai",),
    "litellm": ("litellm",),
}


SERVER = ["-m", "benchmarks.chat_server"]
RANDOM_429S = [*SERVER, "--delay", "0.05", "--refuse", "0.08"]
STALLING = [*SERVER, "--delay", "0.05", "--stall", "0.01", "--fail", "0.03"]
FAULTY = [*SERVER, "--delay", "0.05", "--fail", "0.08", "--cut", "0.05", "--page", "0.02"]


def run(options: Options) -> Report:
    calls = 1_000 if options.quick else 6_000
    with (
        background(SERVER) as url,
        background([*SERVER, "--delay", "3"]) as slow,
        background([*SERVER, "--rate", "100", "--burst", "20"]) as limited,
        background(RANDOM_429S) as refusing,
        background(FAULTY) as broken,
        background(STALLING) as stalling,
    ):
        cases = []
        for client, needs in CLIENTS.items():
            many = calls if client in ("bare", "ours", "ours, plain") else calls // 6
            cases += [
                Case(
                    f"{client}, {at} at once",
                    call("client", "cpu", client=client, url=url, concurrency=at, calls=many),
                    needs,
                )
                for at in (64, 512)
            ]
            cases.append(
                Case(f"{client}, memory", call("client", "memory", client=client, url=slow, in_flight=512), needs)
            )
        cases += [
            Case(
                f"in one process, {at} at once",
                call(
                    "client",
                    "interleaved",
                    url=url,
                    concurrency=at,
                    calls=calls // 10,
                    rounds=4 if options.quick else 20,
                ),
            )
            for at in (64, 512)
        ]
        cases.append(Case("bucket", call("client", "bucket", url=limited, calls=400, concurrency=64)))
        cases.append(Case("cancel", call("client", "cancelled", url=slow, in_flight=64)))
        runs = {"8 % random 429s": refusing, "8 % 500s, 5 % cut, 2 % HTML": broken}
        for client, needs in (("ours", ()), ("openai", ("openai",))):
            many = {"client": client, "calls": calls // 3, "in_flight": 256}
            cases += [
                Case(f"{client}, {name}", call("client", "faulty", url=at, **many), needs) for name, at in runs.items()
            ]
            stalled = {"client": client, "calls": calls // 6, "in_flight": 256, "patience": 5}
            cases.append(Case(f"{client}, 1 % stalls", call("client", "faulty", url=stalling, **stalled), needs))
            lasting = {"client": client, "in_flight": 256, "seconds": 6 if options.quick else 15}
            cases.append(Case(f"{client}, steady 429s", call("client", "steady", url=refusing, **lasting), needs))
        measured = measure(cases, options, repetitions=3)  # of about three minutes each, with the peers
    return Report(
        rows=measured.rows(),
        targets=targets(measured),
        missing=measured.missing,
        versions=measured.versions,
        notes=[
            "`ours` has limiter (rpm), budget (USD, tokens, calls), retry loop and lineage on; `plain` the defaults",
            "`in one process` runs bare and ours in turn; bare can be faster there than alone: benchmarks/README.md",
        ],
    )


def targets(measured: Any) -> list[Target]:
    at64, at512 = "ours, 64 at once", "ours, 512 at once"
    return [
        Target("CPU at 64, of bare", measured.ratio(at64, "bare, 64 at once", "us"), 1.4, "x"),
        Target(
            "CPU at 64, of openai on aiohttp", measured.ratio(at64, "openai on aiohttp, 64 at once", "us"), 1 / 8, "x"
        ),
        Target("CPU at 64, of litellm", measured.ratio(at64, "litellm, 64 at once", "us"), 1 / 25, "x"),
        Target("CPU at 512, of bare", measured.ratio(at512, "bare, 512 at once", "us"), 1.5, "x"),
        Target("CPU at 512, of that at 64", measured.ratio(at512, at64, "us"), 1.4, "x"),
        Target("memory, 512 in flight", measured.median("ours, memory", "MB"), 70, "MB"),
        Target("memory a call in flight", measured.median("ours, memory", "KB a call"), 30, "KB"),
        Target("failed of 400 at 100/s", measured.median("bucket", "failed"), 0),
        Target("requests for those 400", measured.median("bucket", "requests"), 480),
        Target("seconds for those 400", measured.median("bucket", "seconds"), 6, "s"),
        Target(
            "2,000 calls with 8 % random 429s, of openai",
            measured.ratio("ours, 8 % random 429s", "openai, 8 % random 429s", "seconds"),
            1.2,
            "x",
        ),
        Target("failed of them", measured.median("ours, 8 % random 429s", "failed"), 0),
        Target(
            "1,000 calls of which 1 % stall, of openai",
            measured.ratio("ours, 1 % stalls", "openai, 1 % stalls", "seconds"),
            1.2,
            "x",
        ),
        Target("failed of them", measured.median("ours, 1 % stalls", "failed"), 0),
        Target(
            "requests that no count has, faulty server",
            measured.median("ours, 8 % 500s, 5 % cut, 2 % HTML", "uncounted"),
            0,
        ),
        Target("64 cancelled, seen by the server after", measured.median("cancel", "ms"), 50, "ms"),
    ]
