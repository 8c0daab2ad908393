"""Modules that programs import under an older name, or change for an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import aggregator
from aggregator.cassettes import locking
from aggregator.executors.local import LocalExecutor
from aggregator.testing import ScriptedModel
from aggregator.training import asking, schemas
from aggregator.training.executors import AsyncExecutor

QUESTION = [{"role": "user", "content": "Which number?"}]


async def test_the_executor_under_its_first_name_runs_any_work() -> None:
    """It is the local executor, which awaits any work and returns the results in order."""
    assert AsyncExecutor is LocalExecutor

    async def double(number: Any) -> Any:
        return 2 * number

    numbers: Any = [1, 2, 3]
    async with AsyncExecutor(4) as executor:
        work: Any = double
        assert await executor.map(work, numbers) == [2 * number for number in numbers]
        assert await executor.call(pow, 2, 3) == 8


def test_a_system_without_advisory_locks_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on Windows; a program turns the lock off in its module."""
    monkeypatch.setattr(locking, "fcntl", None)
    with aggregator.cassette(tmp_path / "a.yaml", "all"):
        assert (tmp_path / "a.yaml.lock").exists()
    assert list(tmp_path.iterdir()) == []


async def test_a_reply_schema_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model gets the schema that replaces ours."""
    monkeypatch.setattr(asking, "response_schema", schemas.lean_schema)
    model = ScriptedModel('{"suggestion": {}}')
    await asking.ask(model, QUESTION, [aggregator.ParameterNode(1, name="k")], max_tokens=10)
    (options,) = model.options
    schema = options["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["suggestion", "reasoning"]
