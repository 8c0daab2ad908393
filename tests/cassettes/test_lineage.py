"""Lineage: a path for each context, independent of the object that extends it."""

from __future__ import annotations

import asyncio
from contextvars import copy_context

import pytest

from aggregator.cassettes.lineage import current_lineage, current_role, lineage


async def test_one_object_in_two_tasks_mixed_their_paths() -> None:
    """One lineage object may be entered by several tasks at once; each restores its own path."""
    shared = lineage("retrieve", role="guide")
    meet = asyncio.Barrier(2)

    async def work(name: str) -> list[tuple[str, str]]:
        seen = []
        with lineage(name):
            await meet.wait()
            with shared:
                await meet.wait()
                seen.append((current_lineage(), current_role()))
                if name == "first":
                    await asyncio.sleep(0)
            seen.append((current_lineage(), current_role()))
            await meet.wait()
        return [*seen, (current_lineage(), current_role())]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work(name)) for name in ("first", "second")]
    for task, name in zip(tasks, ("first", "second"), strict=True):
        assert task.result() == [(f"{name}/retrieve", "guide"), (name, "agent"), ("", "agent")]


def test_an_object_may_be_entered_recursively() -> None:
    """Recursion extends the path each time, and restores it step by step."""
    again = lineage("again")
    with again, again:
        assert current_lineage() == "again/again"
        with pytest.raises(ZeroDivisionError), again:
            raise ZeroDivisionError
        assert current_lineage() == "again/again"
    assert current_lineage() == ""


def test_exiting_in_another_context() -> None:
    """Exiting a lineage in a context that did not enter it changes nothing."""
    opened = lineage("x")
    copy_context().run(opened.__enter__)
    opened.__exit__(None, None, None)
    assert (current_lineage(), current_role()) == ("", "agent")
