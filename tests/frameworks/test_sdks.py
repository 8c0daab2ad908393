"""Each SDK in a cassette, the real package against a loopback server: recorded, replayed, each call in its slot.

`make test-frameworks` runs this in an environment for each group of SDKs. An SDK that is not installed is skipped.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from calls import Call, version_of
from model_server import ModelServer

import aggregator
from aggregator.errors import CassetteMissError

AT_ONCE = 8

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the SDKs, whose warnings we cannot fix
    pytest.mark.usefixtures("surroundings"),
]


def ask_at_once(call: Call, url: str, *batches: list[str]) -> list[list[Any]]:
    """Ask a fresh client all prompts of a batch at once, in tasks or in threads, one batch after the other."""
    if call.is_async:

        async def ask(prompts: list[str]) -> list[Any]:
            client = call.open(url)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(call.ask(client, prompt)) for prompt in prompts]
            return [task.result() for task in tasks]

        with asyncio.Runner() as runner:
            return [runner.run(ask(prompts), context=contextvars.copy_context()) for prompts in batches]
    answers = []
    for prompts in batches:
        ask_one = partial(call.ask, call.open(url))
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers.append(list(pool.map(ask_one, prompts)))
    return answers


@pytest.fixture
def note(call: Call) -> Iterator[dict[str, Any]]:
    """Record a line of the table."""
    row: dict[str, Any] = {"sdk": call.package or "urllib", "call": call.name, "version": version_of(call)}
    yield row
    if table := os.environ.get("AGGREGATOR_SDK_TABLE"):
        with Path(table).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def test_an_sdk_records_and_replays(call: Call, note: dict[str, Any], server: ModelServer, tmp_path: Path) -> None:
    """Distinct and identical concurrent calls are recorded and replayed without the server, each in its slot."""
    path, batches = tmp_path / "a.yaml", [[f"question {i}" for i in range(AT_ONCE)], ["the same"] * AT_ONCE]
    with aggregator.cassette(path, "all", clients=[call.clients], warn=False) as tape:
        distinct, identical = ask_at_once(call, server.url, *batches)
        note["recorded"] = f"{tape.recorded} of {server.hits}"
        assert tape.recorded == server.hits
    hits = server.hits
    for _ in range(3):
        with aggregator.cassette(path, "none", clients=[call.clients], warn=False) as tape:
            played, again = ask_at_once(call, server.url, *batches)
        note["replayed"] = "exact" if played == distinct else "wrong"
        slots = sum(one == other for one, other in zip(again, identical, strict=True))
        note["identical"] = min(note.get("identical", f"{AT_ONCE} of {AT_ONCE}"), f"{slots} of {AT_ONCE}")
        assert (played, again) == (distinct, identical)
        assert (server.hits, tape.report) == (hits, [])


def tells_a_miss(error: BaseException | None) -> bool:
    """Return True if an error is a miss, is caused by one, or is a group that holds one."""
    if error is None or isinstance(error, CassetteMissError):
        return error is not None
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return any(tells_a_miss(one) for one in (*inner, error.__cause__ or error.__context__))


def test_an_sdk_does_not_retry_a_miss_for_seconds(
    call: Call, note: dict[str, Any], server: ModelServer, tmp_path: Path
) -> None:
    """The SDK gives up soon, nothing reaches the server, and the block raises the miss."""
    tapes: list[Any] = []

    def ask() -> None:
        with aggregator.cassette(tmp_path / "a.yaml", "none", clients=[call.clients], warn=False) as tape:
            tapes.append(tape)
            ask_at_once(call, server.url, ["never recorded"])

    with pytest.raises(Exception) as raised:  # noqa: PT011 - of the SDK, if it says that a miss is its cause
        ask()
    assert tells_a_miss(raised.value)
    (tape,) = tapes
    note["miss_asked"] = len(tape.misses)
    assert server.hits == 0
    assert note["miss_asked"] >= 1
