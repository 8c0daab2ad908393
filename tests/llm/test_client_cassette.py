"""The client and the tape: one recording, replays without network, including failures, waits and budgets."""

from __future__ import annotations

import asyncio
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from llm_fakes import BASE_URL, QUESTION, ScriptedTransport, VirtualTime, answer, failure
from msgspec.structs import replace

from aggregator import LLM, Budget, Price, cassette, lineage
from aggregator.cassettes.tape import Tape
from aggregator.errors import (
    APIConnectionError,
    APITimeoutError,
    BudgetExceededError,
    CassetteError,
    CassetteMissError,
    LLMError,
    RateLimitError,
)
from aggregator.llm.retry import NOT_SENT
from aggregator.records import HTTPReply, HTTPRequest

OFFLINE = APIConnectionError("no network in a replay")


def client(transport: ScriptedTransport, virtual: VirtualTime | None = None, **options: Any) -> LLM:
    virtual = virtual or VirtualTime()
    prices = {"m": Price(input=1, output=2)}
    return LLM(
        "m", base_url=BASE_URL, transport=transport, clock=virtual.clock, sleep=virtual.sleep, prices=prices, **options
    )


async def test_a_replay_gives_the_same_completion(tmp_path: Path) -> None:
    """Text, usage, cost, attempts and finish reason are equal; a replay sends nothing and waits for nothing."""
    path, virtual = tmp_path / "one.yaml", VirtualTime()
    steps: list[Any] = [failure(429, headers={"retry-after": "3"}), APIConnectionError("cut"), answer("hi")]
    with cassette(path, "once"):
        recorded = await client(ScriptedTransport(*steps)).complete(QUESTION)
    offline = ScriptedTransport(OFFLINE)
    with cassette(path, "none"):
        played = await client(offline, virtual).complete(QUESTION)
    assert (played.text, played.usage, played.attempts) == (recorded.text, recorded.usage, 3)
    assert (played.replayed, recorded.replayed) == (True, False)
    assert (offline.requests, virtual.slept) == ([], [])


@pytest.mark.parametrize(
    "error", [failure(429), failure(401), APITimeoutError("late"), answer(finish_reason="content_filter")]
)
async def test_a_replay_fails_as_its_recording_did(tmp_path: Path, error: Any) -> None:
    """A replay raises the same class of error after the same number of attempts."""
    path = tmp_path / "failed.yaml"

    async def outcome(llm: LLM) -> tuple[str, int]:
        try:
            completion = await llm.complete(QUESTION)
        except LLMError as caught:
            return type(caught).__name__, caught.attempts
        return completion.finish_reason, completion.attempts

    with cassette(path, "once"):
        recorded = await outcome(client(ScriptedTransport(error)))
    with cassette(path, "none"):
        assert await outcome(client(ScriptedTransport(OFFLINE))) == recorded


async def test_a_replay_with_more_attempts_gives_up_where_its_recording_did(tmp_path: Path) -> None:
    """The recorded call failed; another attempt would be a miss."""
    path = tmp_path / "short.yaml"
    with cassette(path, "once"), pytest.raises(RateLimitError):
        await client(ScriptedTransport(failure(429)), max_attempts=2).complete(QUESTION)
    with cassette(path, "none"), pytest.raises(RateLimitError):
        await client(ScriptedTransport(OFFLINE), max_attempts=5).complete(QUESTION)


async def test_a_miss_is_not_retried(tmp_path: Path) -> None:
    """A request that is not on the tape raises at once."""
    path = tmp_path / "miss.yaml"
    with cassette(path, "once"):
        await client(ScriptedTransport(answer())).complete(QUESTION)
    offline = ScriptedTransport(OFFLINE)
    with pytest.raises(CassetteMissError), cassette(path, "none"):
        await client(offline).complete("another question")
    assert offline.requests == []


async def test_identical_requests_are_distinguished_by_lineage(tmp_path: Path) -> None:
    """Each sample gets its own answer, in any order of completion."""
    path = tmp_path / "lineage.yaml"

    async def ask(llm: LLM, sample: int) -> str:
        with lineage(f"sample={sample}"):
            return (await llm.complete(QUESTION)).text

    async def ask_all(llm: LLM, samples: list[int]) -> dict[int, str]:
        async with asyncio.TaskGroup() as tasks:
            calls = {sample: tasks.create_task(ask(llm, sample)) for sample in samples}
        return {sample: call.result() for sample, call in calls.items()}

    with cassette(path, "once"):
        recorded = await ask_all(client(ScriptedTransport(*[answer(str(i)) for i in range(8)])), list(range(8)))
    with cassette(path, "none"):
        played = await ask_all(client(ScriptedTransport(OFFLINE)), list(reversed(range(8))))
    assert dict(sorted(played.items())) == recorded


SPENT = [
    [answer()],
    [failure(500), answer()],
    [APITimeoutError("late"), answer()],
    [APIConnectionError(f"{NOT_SENT}refused"), answer()],
    [answer(usage={})],
]


@pytest.mark.parametrize("steps", SPENT)
async def test_a_replay_spends_what_its_recording_did(tmp_path: Path, steps: list[Any]) -> None:
    """A replayed run therefore takes the same course through its budget."""
    path, first, second = tmp_path / "spent.yaml", Budget(usd=1.0), Budget(usd=1.0)
    with cassette(path, "once"):
        await client(ScriptedTransport(*steps), budget=first).complete(QUESTION, max_tokens=50)
    with cassette(path, "none"):
        await client(ScriptedTransport(OFFLINE), budget=second).complete(QUESTION, max_tokens=50)
    assert second.spent == first.spent
    assert second.spent.calls >= 1


async def test_a_budget_ends_a_replay_where_it_ended_the_recording(tmp_path: Path) -> None:
    """The same calls are answered and refused, even if a replay's answers arrive in another order."""

    async def course(llm: LLM) -> list[str]:
        outcome = []
        for number in range(5):
            try:
                outcome.append((await llm.complete(f"question {number}", max_tokens=10)).text)
            except BudgetExceededError:
                outcome.append("refused")
        return outcome

    path = tmp_path / "budget.yaml"
    with cassette(path, "once"):
        recorded = await course(client(ScriptedTransport(answer("yes")), budget=Budget(calls=3)))
    with cassette(path, "none"):
        played = await course(client(ScriptedTransport(OFFLINE), budget=Budget(calls=3)))
    assert recorded == played == ["yes"] * 3 + ["refused"] * 2


async def test_a_replay_needs_no_key(tmp_path: Path) -> None:
    """A continuous integration job has no key."""
    path = tmp_path / "key.yaml"
    llm = LLM(
        "openai/gpt-4o-mini", env={"OPENAI_API_KEY": "sk-0123456789abcdef"}, transport=ScriptedTransport(answer())
    )
    with cassette(path, "once"):
        await llm.complete(QUESTION)
    assert "sk-0123456789abcdef" not in path.read_text()
    with cassette(path, "none"):
        assert (await LLM("openai/gpt-4o-mini", env={}, transport=ScriptedTransport(OFFLINE)).complete(QUESTION)).text


async def test_a_malformed_answer_is_recorded_too(tmp_path: Path) -> None:
    """Every attempt that got an answer is recorded, so a replay sees it again."""
    path = tmp_path / "odd.yaml"
    odd = answer().__class__(status=200, body=b"<html>", headers={})
    with cassette(path, "once"):
        await client(ScriptedTransport(odd, answer("hi"))).complete(QUESTION)
    with cassette(path, "none"):
        played = await client(ScriptedTransport(OFFLINE)).complete(QUESTION)
    assert (played.text, played.attempts) == ("hi", 2)


def test_the_synchronous_call_sees_the_tape_of_its_thread(tmp_path: Path) -> None:
    """The context is passed on to the library's event loop."""
    path = tmp_path / "sync.yaml"
    with cassette(path, "once"):
        client(ScriptedTransport(answer("hi")))(messages=QUESTION)
    with cassette(path, "none"):
        assert client(ScriptedTransport(OFFLINE))(messages=QUESTION).text == "hi"


@pytest.mark.parametrize("streamed", [False, True])
async def test_recorded_latency_was_waited_for_on_the_wall_clock(tmp_path: Path, streamed: bool) -> None:
    """The client waits on its own clock, which a test can replace."""
    path, virtual = tmp_path / "slow.yaml", VirtualTime()

    async def ask(llm: LLM) -> None:
        if streamed:
            async for _ in llm.stream(QUESTION):
                pass
        else:
            await llm.complete(QUESTION)

    with cassette(path, "once"):
        await ask(client(ScriptedTransport(replace(answer("hi"), milliseconds=90_000.0))))
    with cassette(path, "none", latency=2):
        await ask(client(ScriptedTransport(OFFLINE), virtual))
    assert bool(virtual.slept)
    if not streamed:
        assert virtual.slept == [180.0]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_failed_call_left_a_cycle_behind(streamed: bool) -> None:
    """No frame keeps an error alive: it is freed with its last reference, and so is what its traceback holds."""
    llm = client(ScriptedTransport(failure(400)))
    gone = []

    async def ask() -> None:
        try:
            if streamed:
                async for _ in llm.stream(QUESTION):
                    pass
            else:
                await llm.complete(QUESTION)
        except LLMError as error:
            gone.append(weakref.ref(error))

    gc.disable()
    try:
        await ask()
        assert [error() for error in gone] == [None]
    finally:
        gc.enable()


async def test_answers_of_one_turn_are_on_disk_before_any_is_used(tmp_path: Path) -> None:
    """Calls in flight together are written together, and each answer is in the file when its call returns."""
    path = tmp_path / "together.yaml"
    llm = client(ScriptedTransport(lambda request: answer(f"answer to {request.body[40:].partition(b'#')[2][:1]!r}")))
    seen: list[bool] = []
    written: list[int] = []

    async def ask(index: int, tape: Tape) -> None:
        completion = await llm.complete(f"question #{index}")
        written.append(tape.recorded)
        seen.append(completion.text.encode() in path.read_bytes())

    with cassette(path, "once") as tape:
        async with asyncio.TaskGroup() as group:
            for index in range(8):
                group.create_task(ask(index, tape))
    assert seen == [True] * 8
    assert written == [8] * 8


async def test_a_call_cancelled_while_its_answer_is_written_is_on_the_tape(tmp_path: Path) -> None:
    """The answer has arrived and may be billed, so it is recorded although its caller was cancelled."""
    path = tmp_path / "cancelled.yaml"
    arrived = asyncio.Event()

    def reply(request: HTTPRequest) -> HTTPReply:
        arrived.set()
        return answer("paid")

    with cassette(path, "once"):
        task = asyncio.create_task(client(ScriptedTransport(reply)).complete(QUESTION))  # noqa: TID251 - to cancel it
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    with cassette(path, "none"):
        assert (await client(ScriptedTransport(OFFLINE)).complete(QUESTION)).text == "paid"


async def test_a_call_that_outlives_its_cassette(tmp_path: Path) -> None:
    """A task that continues after the cassette's block gets an error, and the finished file is unchanged."""
    path, go = tmp_path / "outlived.yaml", asyncio.Event()

    async def wait() -> None:
        await go.wait()

    with cassette(path, "once") as tape:
        await client(ScriptedTransport(answer("in time"))).complete("first")
        late = LLM("m", base_url=BASE_URL, transport=ScriptedTransport(answer("late"), latency=wait))
        task = asyncio.create_task(late.complete("second"))  # noqa: TID251 - it is to outlive the block
        await asyncio.sleep(0)
    finished = path.read_bytes()
    go.set()
    with pytest.raises(CassetteError, match="await the tasks that make calls before the block or the test ends"):
        await task
    assert path.read_bytes() == finished
    assert len(tape.unsaved) == 1


def test_a_thread_called_the_model_live_while_the_cassette_was_replayed(tmp_path: Path) -> None:
    """A plain thread's call is recorded and replayed, whether it is synchronous or in an event loop of the thread."""
    path = tmp_path / "threads.yaml"

    def in_a_loop_of_its_own(llm: LLM) -> str:
        with asyncio.Runner() as runner:
            return runner.run(llm.complete("two")).text

    def texts(transport: ScriptedTransport) -> list[str]:
        llm = client(transport)
        with ThreadPoolExecutor(1) as pool:
            return [
                pool.submit(lambda: llm("one").text).result(),
                pool.submit(in_a_loop_of_its_own, llm).result(),
            ]

    with cassette(path, "once") as tape:
        recorded = texts(ScriptedTransport(answer("1"), answer("2")))
    assert tape.recorded == 2
    with cassette(path, "none"):
        assert texts(ScriptedTransport(OFFLINE)) == recorded
