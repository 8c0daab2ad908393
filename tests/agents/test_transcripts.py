"""Transcripts: the same tree in any order of completion, bounded, and readable."""

from __future__ import annotations

import asyncio
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from aggregator import Completion, bundle, portal, transcript
from aggregator.agents.transcripts import current_transcript, recording
from aggregator.records import Choice, Message, ToolCall


def completion(text: str | None, *calls: ToolCall) -> Completion:
    return Completion(choices=(Choice(message=Message(content=text, tool_calls=calls)),))


def ask(text: str) -> list[dict[str, object]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


@bundle()
async def operation(name: str, latency: int) -> str:
    """Work for a while."""
    seen = current_transcript()
    assert seen is not None
    call = seen.llm_call(ask(name))
    for _ in range(latency):
        await asyncio.sleep(0)
    call.finish(completion(f"reply to {name}"))
    with recording("inner", inputs=[("of", name)]) as span:
        span.finish(name)
    return name


async def forward(latencies: list[int]) -> str:
    """Start three concurrent tasks, whose operations after the wait happen in any order."""

    async def branch(i: int) -> None:
        await operation(f"first {i}", latencies[2 * i])
        await operation(f"second {i}", latencies[2 * i + 1])

    with transcript() as seen:
        async with asyncio.TaskGroup() as group:
            for i in range(5):
                group.create_task(branch(i))
        await operation("last", 0)
    return seen.render()


async def test_the_tree_does_not_depend_on_the_order_of_completion() -> None:
    """Concurrent operations and LLM calls with shuffled latencies give the same bytes."""
    expected = await forward([0] * 10)
    assert [line for line in expected.split("\n") if line.startswith("  name")] == [
        *[f'  name: "{word} {i}"' for i in range(5) for word in ("first", "second")],
        '  name: "last"',
    ]
    shuffle = random.Random(7)
    for _ in range(20):
        text = await forward([shuffle.randrange(8) for _ in range(10)])
        assert [line for line in text.split("\n") if "latency" not in line] == [
            line for line in expected.split("\n") if "latency" not in line
        ]


async def test_concurrent_llm_calls_are_in_order_of_issue() -> None:
    """A place is taken when a call is issued, not when it is answered."""

    async def call(i: int) -> None:
        seen = current_transcript()
        assert seen is not None
        slot = seen.llm_call([{"role": "user", "content": f"question {i}"}])
        for _ in range(10 - i):
            await asyncio.sleep(0)
        slot.finish(completion(f"answer {i}"))

    with transcript() as seen:
        async with asyncio.TaskGroup() as group:
            for i in range(3):
                group.create_task(call(i))
    assert seen.render() == "\n".join(f"LLM call\n  user: question {i}\n  reply: answer {i}" for i in range(3))


def test_an_llm_call_shows_messages_and_reply() -> None:
    """System, user, content parts, tool calls and refusals are readable."""
    with transcript() as seen, recording("answer", "Answer a question.", [("x", "line 1\nline 2")]) as span:
        seen.add_llm_call(
            [
                *ask("one\ntwo"),
                {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image_url"}]},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]},
                "bare text",
            ],
            completion("done"),
        )
        seen.add_llm_call(ask("x"), completion(None, ToolCall(id="1", name="search", arguments='{"q": 1}')))
        seen.llm_call([]).fail(TimeoutError("30 s"))
        seen.llm_call([])
        span.finish("out")
    assert seen.render() == (
        "answer: Answer a question.\n  x: |\n    line 1\n    line 2\n"
        "  LLM call\n    system: Be brief.\n    user: |\n      one\n      two\n    user: |\n      look\n"
        '      [image_url]\n    assistant: tool calls: [{"id": "a"}]\n    message: bare text\n    reply: done\n'
        '  LLM call\n    system: Be brief.\n    user: x\n    reply: tool call: search({"q": 1})\n'
        "  LLM call\n    failed: TimeoutError: 30 s\n  LLM call\n    reply: [... not finished]\n"
        '  returned: "out"'
    )


def test_an_unfinished_operation_is_marked() -> None:
    """An operation still running when the transcript is read is not shown as a result."""
    with transcript() as seen, recording("slow"):
        assert seen.render() == "slow\n  returned: [... not finished]"


def test_values_are_snapshots() -> None:
    """A list changed in place later is shown as it was at the call."""

    @bundle()
    def grow(items: list[int]) -> list[int]:
        items.append(2)
        return items

    with transcript() as seen:
        grow([1]).append(3)
    assert seen.render() == "grow\n  items: [1]\n  returned: [1, 2]"


def test_the_text_is_bounded() -> None:
    """A long transcript is cut in the middle, a long message at its end, and both state how much."""
    with transcript() as seen:
        seen.add_llm_call([{"role": "user", "content": "x" * 10_000}], completion("y"))
        for i in range(100):
            with recording(f"operation {i}") as span:
                span.finish("z" * 5000)
    text = seen.render(10_000)
    assert "[... 6000 more characters]" in text
    assert len(text) < 10_100
    assert text.startswith("LLM call")
    left_out = len(seen.render(10**9)) - 10_000
    assert f"\n[... {left_out} characters left out]\n" in text


def test_there_is_no_transcript_by_default() -> None:
    """Outside a transcript operations run and nothing is recorded; an inner transcript hides the outer one."""
    assert current_transcript() is None
    with transcript() as outer:
        with transcript() as inner, recording("inside"):
            assert current_transcript() is inner
        outer.add_llm_call(ask("after"), completion("yes"))
        assert current_transcript() is outer
    assert current_transcript() is None
    assert inner.render().startswith("inside")
    assert "inside" not in outer.render()


@pytest.mark.requirement("Trace: backward(retain_graph), zero_feedback, detach")
async def test_a_transcript_belongs_to_its_context() -> None:
    """Two concurrent forward passes each see their own operations."""

    async def one(name: str) -> str:
        with transcript() as seen:
            await operation(name, 3)
            return seen.render()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(name)) for name in ("a", "b")]
    assert all(f'name: "{name}"' in task.result() for name, task in zip("ab", tasks, strict=True))
    assert all(task.result().count("operation") == 1 for task in tasks)


@pytest.mark.parametrize("limit", [10, 100])
def test_bounds_hold_for_any_limit(limit: int) -> None:
    """The limit holds for the text before the line that reports the cut."""
    with transcript() as seen, recording("x" * 1000) as span:
        span.finish(None)
    assert len(seen.render(limit)) <= limit + len("\n[... 1234 characters left out]\n")


def test_items_of_a_pool_are_shown_in_the_order_of_submission() -> None:
    """It does not matter which thread records first or runs several items, so a replay has the same prompt."""
    gates = [threading.Event() for _ in range(12)]

    def work(i: int) -> None:
        gates[i].wait(20)
        seen = current_transcript()
        assert seen is not None
        seen.add_llm_call(ask(f"item {i}"), completion("done"))
        if i:
            gates[i - 1].set()

    with portal.carrying(), transcript() as seen, ThreadPoolExecutor(12) as pool:
        items = [pool.submit(work, i) for i in range(12)]
        gates[11].set()  # the last one records first
        for item in items:
            item.result()
    assert re.findall(r"user: item (\d+)", seen.render()) == [str(i) for i in range(12)]
    assert seen.to_mermaid().index("item 2") < seen.to_mermaid().index("item 10")
