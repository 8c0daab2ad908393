"""Exact replay in any order of completion: identical bodies, dependent requests, shuffled completion."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

import aggregator
from aggregator.cassettes.lineage import current_tape
from aggregator.records import HTTPReply, HTTPRequest

SLOTS = 8
URL = "https://api.example.com/v1"


async def ask(question: str, draw: random.Random, serial: list[int]) -> str:
    """Make a call as a client does, to a server that takes time and answers each request differently."""
    tape = current_tape()
    assert tape is not None
    slot = tape.issue(HTTPRequest(url=URL, body=f'{{"q": "{question}"}}'.encode(), headers={}))
    reply = tape.play(slot)
    if reply is None:
        for _ in range(draw.randrange(5)):
            await asyncio.sleep(0)
        serial[0] += 1
        reply = HTTPReply(status=200, body=f"answer {serial[0]}".encode(), headers={})
        tape.record(slot, reply)
    await asyncio.sleep(0)
    return reply.body.decode()


async def sample(index: int, draw: random.Random, serial: list[int], turn: asyncio.Semaphore) -> list[str]:
    """Ask the same as every other sample, twice, then ask what depends on the answers."""
    with aggregator.lineage(f"sample={index}"):
        async with turn:
            first = await ask("the same", draw, serial)
        second = await ask("the same", draw, serial)
        with aggregator.lineage("propose", role="optimizer"):
            return [first, second, await ask(f"after {first} and {second}", draw, serial)]


async def run(path: Path, seed: int) -> list[list[str]]:
    """Run every sample at once, in its own order of starts and completions."""
    draw, serial, turn = random.Random(seed), [0], asyncio.Semaphore(3)
    order = draw.sample(range(SLOTS), SLOTS)
    with aggregator.cassette(path, "once"):
        async with asyncio.TaskGroup() as group:
            tasks = {index: group.create_task(sample(index, draw, serial, turn)) for index in order}
    return [tasks[index].result() for index in range(SLOTS)]


async def exact(folder: Path, seeds: range) -> int:
    """Return for how many seeds every slot replayed its own answers, three times."""
    good = 0
    for seed in seeds:
        path = folder / f"{seed}.yaml"
        recorded = await run(path, seed)
        good += all([await run(path, other) == recorded for other in (seed + 1, seed + 2, seed + 3)])
    return good


async def test_shuffled_completion_is_slot_exact(tmp_path: Path) -> None:
    """Every slot replays its own answers, in each of many completion orders."""
    assert await exact(tmp_path, range(20)) == 20


@pytest.mark.long
async def test_shuffled_completion_is_slot_exact_a_thousand_times(tmp_path: Path) -> None:
    """This holds for 1,000 recordings, each replayed in three other orders."""
    assert await exact(tmp_path, range(10_000, 11_000)) == 1000


async def test_the_file_does_not_depend_on_the_order(tmp_path: Path) -> None:
    """The finished file is in canonical order, for any order of completion."""
    places = []
    for seed in (1, 2):
        await run(tmp_path / f"{seed}.yaml", seed)
        text = (tmp_path / f"{seed}.yaml").read_text()
        places.append([line.split('"lineage":"')[1].split('"')[0] for line in text.splitlines() if '"lineage"' in line])
    expected = [f"sample={i}{rest}" for i in range(SLOTS) for rest in ("", "", "/propose")]
    assert places == [expected, expected]
