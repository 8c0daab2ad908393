"""Identical calls that overlap in one lineage: each replays its own answer, in any order of requests."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import pytest
import uvloop

import aggregator
from aggregator.cassettes.lineage import lineage, tape_here
from aggregator.cassettes.storage import read
from aggregator.records import HTTPReply, HTTPRequest

REQUEST = HTTPRequest(url="http://x/v1", body=b'{"q":"hello"}', headers={})


def call(answer: str, pause: float = 0.0) -> str:
    """Call the tape as a client does: the ticket is taken first, the answer arrives later."""
    tape = tape_here()
    assert tape is not None
    slot = tape.issue(REQUEST)
    played = tape.play(slot)
    if played is not None:
        return played.body.decode()
    time.sleep(pause)
    tape.record(slot, HTTPReply(status=200, body=answer.encode(), headers={}))
    return answer


async def acall(answer: str, pause: float = 0.0) -> str:
    tape = tape_here()
    assert tape is not None
    slot = tape.issue(REQUEST)
    played = tape.play(slot)
    if played is not None:
        return played.body.decode()
    await asyncio.sleep(pause)
    tape.record(slot, HTTPReply(status=200, body=answer.encode(), headers={}))
    return answer


def hop() -> None:
    """Run briefly in a thread."""
    time.sleep(random.uniform(0, 0.01))


async def hopping(i: int, again: int = 1) -> list[str]:
    """Start in a thread, like a new OpenAI client, so that the order of the tasks depends on threads."""
    found = []
    for n in range(again):
        await asyncio.to_thread(hop)  # noqa: TID251 - what the SDK does
        found.append(await acall(f"{i}.{n}", random.uniform(0.01, 0.03)))
    return found


def by_tasks() -> list[Any]:
    async def ask() -> list[Any]:
        return list(await asyncio.gather(*[hopping(i) for i in range(8)]))  # noqa: TID251 - what agents do

    return asyncio.run(ask())  # noqa: TID251


def by_tasks_that_ask_twice() -> list[Any]:
    async def ask() -> list[Any]:
        return list(await asyncio.gather(*[hopping(i, again=2) for i in range(8)]))  # noqa: TID251 - what agents do

    return asyncio.run(ask())  # noqa: TID251


def by_tasks_of_uvloop() -> list[Any]:
    async def ask() -> list[Any]:
        return list(await asyncio.gather(*[hopping(i) for i in range(8)]))  # noqa: TID251 - what agents do

    return uvloop.run(ask())


def by_executor() -> list[Any]:
    """Run in copies of one context, like LangChain's `.batch` and litellm."""

    def one(i: int) -> str:
        hop()
        return call(str(i), random.uniform(0.01, 0.03))

    with ThreadPoolExecutor(8) as pool:
        return [future.result() for future in [pool.submit(copy_context().run, one, i) for i in range(8)]]


def by_threads_in_a_lineage_block() -> list[Any]:
    """The block is entered in each thread, so only the whole lineage distinguishes them."""
    found: dict[int, str] = {}

    def one(i: int) -> None:
        hop()
        with lineage("branch"):
            found[i] = call(str(i), random.uniform(0.05, 0.1))  # they overlap on a loaded machine too

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(8)]


WAYS: list[Callable[[], list[Any]]] = [
    by_tasks,
    by_tasks_that_ask_twice,
    by_tasks_of_uvloop,
    by_executor,
    by_threads_in_a_lineage_block,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_identical_concurrent_prompts_were_played_in_the_wrong_order(
    way: Callable[[], list[Any]], tmp_path: Path
) -> None:
    """Each branch of the concurrent work gets the answers that it got while recording."""
    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, "all") as tape:
        heard = way()
    assert tape.report == []
    for _ in range(4):
        with aggregator.cassette(path, "none") as tape:
            assert way() == heard
        assert tape.report == []


def ask_in_turn(
    turns: list[int], ask: Callable[[int], Any], *, block: str = "branch", late: int = 0
) -> dict[int, list[Any]]:
    """Start a thread for each number and let them ask one after the other, in these turns, in one lineage.

    All but the first thread are started after `late` turns.
    """
    found: dict[int, list[Any]] = {i: [] for i in set(turns)}
    turn = {i: threading.Semaphore(0) for i in found}
    done = threading.Semaphore(0)

    def one(i: int) -> None:
        for _ in range(turns.count(i)):
            turn[i].acquire()
            with lineage(block) if block else nullcontext():
                found[i].append(ask(i))
            done.release()

    threads = [threading.Thread(target=one, args=(i,)) for i in sorted(found)]
    threads[0].start()
    for n, i in enumerate([*turns, -1]):
        for thread in threads[1:] if n == late else ():
            thread.start()
        if i >= 0:
            turn[i].release()
            done.acquire()
    for thread in threads:
        thread.join()
    return found


def ask_once(i: int) -> Any:
    return call(f"{i} {random.random()}")


def ask_within_a_block(i: int) -> Any:
    with lineage("inner"):
        return ask_once(i)


def ask_by_two_tasks(i: int) -> Any:
    async def both() -> list[str]:
        return list(await asyncio.gather(*[acall(f"{i} {random.random()}") for _ in range(2)]))  # noqa: TID251

    return asyncio.run(both())  # noqa: TID251


@pytest.mark.parametrize("ask", [ask_once, ask_within_a_block, ask_by_two_tasks], ids=lambda ask: ask.__name__)
@pytest.mark.parametrize("turns", [[0, 1, 2], [2, 0, 1], [1, 1, 0, 2], [0, 1, 0, 2, 1], [2, 0, 0, 1, 2]], ids=str)
def test_threads_that_did_not_overlap_while_recording_were_played_in_another_order(
    turns: list[int], ask: Callable[[int], Any], tmp_path: Path
) -> None:
    """Threads that one context starts side by side may ask in any order, also one after the other."""
    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, "all") as tape:
        heard = ask_in_turn(turns, ask)
    assert tape.report == []
    for others in (turns, turns[::-1], sorted(turns), sorted(turns, reverse=True)):
        with aggregator.cassette(path, "none") as tape:
            assert ask_in_turn(others, ask) == heard
        assert tape.report == []


@pytest.mark.parametrize("ask", [ask_once, ask_within_a_block, ask_by_two_tasks], ids=lambda ask: ask.__name__)
@pytest.mark.parametrize("block", ["branch", ""])
@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_call_of_the_first_thread_went_to_one_that_was_started_after_it(
    late: int, block: str, ask: Callable[[int], Any], tmp_path: Path
) -> None:
    """While recording the first thread asks before the others are started; in a replay it may ask after them."""
    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, "all") as tape:
        heard = ask_in_turn([0, 0, 1, 2, 0], ask, block=block, late=late)
    assert tape.report == []
    for others in ([0, 0, 1, 2, 0], [2, 1, 0, 0, 0], [0, 1, 0, 2, 0]):
        with aggregator.cassette(path, "none") as tape:
            assert ask_in_turn(others, ask, block=block) == heard
        assert tape.report == []


def test_what_is_added_to_a_cassette_is_told_from_what_was_there(tmp_path: Path) -> None:
    """Calls that are recorded later, by threads of the same block, play on the thread that made them."""
    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, "all"):
        first = ask_in_turn([0, 1], ask_once)
    with aggregator.cassette(path, "new_episodes"):
        heard = ask_in_turn([1, 0, 0, 1], ask_once)
    assert {i: answers[:1] for i, answers in heard.items()} == first
    with aggregator.cassette(path, "none"):
        assert ask_in_turn([0, 0, 1, 1], ask_once) == heard


def test_a_lineage_block_may_move_within_a_run(tmp_path: Path) -> None:
    """Within a lineage block branches are numbered from the block, so it may be entered anywhere in the run."""
    path = tmp_path / "a.yaml"

    def run(before: int) -> list[Any]:
        async def sample() -> list[Any]:
            for _ in range(before):
                await asyncio.create_task(asyncio.sleep(0))  # noqa: TID251 - work that is not done again
            return await asyncio.create_task(block())  # noqa: TID251

        async def block() -> list[Any]:
            with lineage("sample=1"):
                return list(await asyncio.gather(*[hopping(i) for i in range(8)]))  # noqa: TID251

        return asyncio.run(sample())  # noqa: TID251

    with aggregator.cassette(path, "all"):
        heard = run(0)
    with aggregator.cassette(path, "none"):
        assert run(3) == heard


@pytest.mark.filterwarnings("ignore:.*in an unknown order")
def test_an_ambiguous_order_was_not_reported(tmp_path: Path) -> None:
    """Recording and replay report how many identical requests overlapped; they are played in the order of issue."""
    path = tmp_path / "a.yaml"

    async def ask() -> list[str]:
        """Make eight concurrent calls in one task, like a client with its own scheduler."""
        tape = tape_here()
        assert tape is not None
        slots = [tape.issue(REQUEST) for _ in range(8)]
        found = []
        for i, slot in enumerate(slots):
            if (played := tape.play(slot)) is None:
                tape.record(slot, HTTPReply(status=200, body=f"{i}".encode(), headers={}))
            found.append(f"{i}" if played is None else played.body.decode())
        return found

    with aggregator.cassette(path, "all") as tape:
        heard = asyncio.run(ask())  # noqa: TID251
    assert any("8 identical requests overlapped in one lineage" in finding for finding in tape.report)
    with aggregator.cassette(path, "none") as tape:
        assert asyncio.run(ask()) == heard  # noqa: TID251
    assert any("8 identical requests overlapped in one lineage" in finding for finding in tape.report)


def test_sequential_calls_have_no_branch(tmp_path: Path) -> None:
    """Their order distinguishes them, and their lines do not record where they were made."""
    path = tmp_path / "a.yaml"

    async def ask() -> None:
        for i in range(3):
            await asyncio.create_task(acall(str(i)))  # noqa: TID251

    with aggregator.cassette(path, "all"):
        asyncio.run(ask())  # noqa: TID251
    recording = read(path)
    assert recording is not None
    assert [row.facts.branch for row in recording.rows] == ["", "", ""]


def test_a_changed_program_plays_in_the_order_of_issue(tmp_path: Path) -> None:
    """A branch that was not recorded gets the first answer that is left."""
    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, "all"):
        heard = by_tasks()
    with aggregator.cassette(path, "none"):
        assert sorted([call("-") for _ in range(8)]) == sorted(answer for (answer,) in heard)


Turns = list[str]
ONES = ("t0", "t1")


def ask_with_threads(turns: Turns, block: str) -> dict[str, list[str]]:
    """Let this code ("m") and threads that it has started ("t0", "t1") ask in turn; "first" comes before they start."""
    found: dict[str, list[str]] = {}
    turn = {name: threading.Semaphore(0) for name in ONES if name in turns}
    done = threading.Semaphore(0)

    def ask_as(name: str) -> None:
        with lineage(block) if block else nullcontext():
            found.setdefault(name, []).append(call(f"{name} {random.random()}"))

    def one(name: str) -> None:
        for _ in range(turns.count(name)):
            turn[name].acquire()
            ask_as(name)
            done.release()
        turn[name].acquire()

    for _ in range(turns.count("first")):
        ask_as("m")
    threads = [threading.Thread(target=one, args=(name,)) for name in turn]
    for thread in threads:
        thread.start()
    for name in turns:
        if name == "m":
            ask_as(name)
        elif name != "first":
            turn[name].release()
            done.acquire()
    for thread, semaphore in zip(threads, turn.values(), strict=True):
        semaphore.release()
        thread.join()
    return found


def ask_with_tasks(turns: Turns, block: str) -> dict[str, list[str]]:
    """The same with tasks of one event loop."""

    async def main() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        turn = {name: asyncio.Semaphore(0) for name in ONES if name in turns}
        done = asyncio.Semaphore(0)

        async def ask_as(name: str) -> None:
            with lineage(block) if block else nullcontext():
                found.setdefault(name, []).append(await acall(f"{name} {random.random()}"))

        async def one(name: str) -> None:
            for _ in range(turns.count(name)):
                await turn[name].acquire()
                await ask_as(name)
                done.release()
            await turn[name].acquire()

        if turns[0] == "first":
            await ask_as("m")
        tasks = [asyncio.create_task(one(name)) for name in turn]  # noqa: TID251 - what agents do
        for name in turns:
            if name == "m":
                await ask_as(name)
            elif name != "first":
                turn[name].release()
                await done.acquire()
        for semaphore in turn.values():
            semaphore.release()
        await asyncio.wait(tasks)
        return found

    return asyncio.run(main())  # noqa: TID251


BACKGROUND = [
    "t0 m",
    "m t0",
    "t0 m m",
    "m t0 m",
    "t0 t0 m",
    "t0 m t0 m",
    "t0 m t1",
    "t1 m t0",
    "first m t0",
    "first m t0 t0",
]


@pytest.mark.parametrize("block", ["branch", ""])
@pytest.mark.parametrize("way", [ask_with_threads, ask_with_tasks], ids=lambda way: way.__name__)
@pytest.mark.parametrize("turns", BACKGROUND)
def test_a_background_thread_and_its_starter_were_mixed_up(
    turns: str, way: Callable[[Turns, str], Any], block: str, tmp_path: Path
) -> None:
    """A background thread or task and the code that started it, without an overlap: each replays its own answers."""
    path, recorded = tmp_path / "a.yaml", turns.split()
    with aggregator.cassette(path, "all") as tape:
        heard = way(recorded, block)
    assert tape.report == []
    first = recorded[:1] if recorded[0] == "first" else []
    for others in sorted(set(permutations(recorded[len(first) :]))):
        with aggregator.cassette(path, "none") as tape:
            assert way([*first, *others], block) == heard
        assert tape.report == []


@pytest.mark.filterwarnings("ignore:.*in an unknown order")
@pytest.mark.parametrize("way", [ask_with_threads, ask_with_tasks], ids=lambda way: way.__name__)
def test_a_background_thread_between_two_calls_of_its_starter_was_not_reported(
    way: Callable[[Turns, str], Any], tmp_path: Path
) -> None:
    """The starter's calls before and after it began are one row of calls: which is the thread's is not known."""
    path, turns = tmp_path / "a.yaml", ["first", "t0", "m"]
    with aggregator.cassette(path, "all") as tape:
        heard = way(turns, "")
    assert any("identical requests overlapped in one lineage" in finding for finding in tape.report)
    with aggregator.cassette(path, "none") as tape:
        assert way(turns, "") == heard
    assert any("identical requests overlapped in one lineage" in finding for finding in tape.report)


@pytest.mark.filterwarnings("ignore:.*in an unknown order")
def test_workers_that_shared_their_items_differently_were_not_reported(tmp_path: Path) -> None:
    """Which worker takes an item from a queue depends on time: a worker that asks more often gets another's answer."""
    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, "all") as tape:
        heard = ask_in_turn([0, 1, 0, 1], ask_once)
    assert tape.report == []
    with aggregator.cassette(path, "none") as tape:
        played = ask_in_turn([0, 0, 0, 1], ask_once)
    assert sorted(chain(*played.values())) == sorted(chain(*heard.values()))
    assert any("identical requests overlapped in one lineage" in finding for finding in tape.report)


def test_work_that_was_awaited_is_one_sequence_with_its_starter(tmp_path: Path) -> None:
    """Threads and tasks whose end is awaited are one sequence with their starter, also if another thread runs on."""
    path, end = tmp_path / "a.yaml", threading.Event()

    def ask() -> list[str]:
        idle = threading.Thread(target=end.wait)
        idle.start()
        found = []
        for i in range(3):
            found.append(call(f"before {i}"))
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(call, f"inside {i}").result())
        end.set()
        idle.join()
        return found

    with aggregator.cassette(path, "all") as tape:
        heard = ask()
    assert tape.report == []
    with aggregator.cassette(path, "none"):
        assert ask() == heard
