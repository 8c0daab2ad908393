"""One rollout, run alone: it needs nothing from its surroundings."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Sequence
from threading import current_thread
from typing import Any

import pytest

from aggregator.adapters.agents import as_agent
from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.cassettes.lineage import current_lineage, current_role, lineage
from aggregator.errors import APIConnectionError, AuthenticationError, ConfigError
from aggregator.executors.local import LocalExecutor
from aggregator.executors.work import AgentWork, run_batch
from aggregator.records import Rollout, RolloutTask, Sample


class Adder(Module):
    """Adds its parameter; returns its lineage for the input -1, and fails on request."""

    def __init__(self) -> None:
        self.amount = ParameterNode(1)

    async def forward(self, x: Any) -> Any:
        if isinstance(x, Exception):
            raise x
        if x == -1:
            return f"{current_lineage()} {current_role()}"
        self.amount.data += 1
        return x + self.amount.data


def guide(x: Any, output: Any, info: Any) -> tuple[float, str]:
    if isinstance(info, Exception):
        raise info
    return 0.5, f"saw {output}"


def task(x: Any = 3, info: Any = None, **facts: Any) -> RolloutTask:
    return RolloutTask(sample=Sample(7, x, info), **facts)


async def test_a_rollout_uses_its_tasks_values() -> None:
    """They override the agent's own, and assignments during the rollout end with it."""
    agent = Adder()
    found = await AgentWork(as_agent(agent), guide)(task(values={"amount": 10}, repeat=2, lineage=("a", "b")))
    assert (found.sample_id, found.x, found.output, found.score, found.feedback) == (7, 3, 14, 0.5, "saw 14")
    assert (found.lineage, found.repeat, found.ms > 0) == ("a/b", 2, True)
    assert agent.amount.data == 1


async def test_a_tasks_lineage_is_absolute() -> None:
    """It is the same in a worker, whatever lineage surrounds the call here."""
    work = AgentWork(as_agent(Adder()), guide)
    with lineage("somewhere", "else"):
        found = await work(task(-1, lineage=("train", "sample=7"), role="guide"))
        assert current_lineage() == "somewhere/else"
    assert found.output == "train/sample=7 guide"


async def test_without_capture_there_is_no_transcript() -> None:
    """A trial needs none, and capturing one costs time."""
    work = AgentWork(as_agent(Adder()), None)
    assert (await work(task(capture=False))).score is None


@pytest.mark.parametrize("min_score", [None, -1.0])
async def test_an_agents_error_is_its_feedback(min_score: float | None) -> None:
    """It scores `min_score`; a lost call has no score, and an error that ends the run is raised."""
    work = AgentWork(as_agent(Adder()), guide)
    failed = await work(task(ValueError("no"), min_score=min_score))
    assert (failed.score, failed.failure is not None) == (min_score, True)
    assert failed.feedback == "The agent failed on this input with ValueError: no"
    lost = await work(task(APIConnectionError("reset"), min_score=min_score))
    assert lost.failure is not None
    assert (lost.score, lost.feedback, lost.failure.infrastructure) == (None, "", True)
    with pytest.raises(AuthenticationError):
        await work(task(AuthenticationError("no", status=401)))


async def test_a_guides_error_leaves_no_score() -> None:
    """The output is kept, and the failure is the guide's."""
    found = await AgentWork(as_agent(Adder()), guide)(task(info=KeyError("k")))
    assert found.failure is not None
    assert (found.output, found.score, found.failure.stage) == (5, None, "guide")


class Batches:
    """A framework's agent that takes batches, and yields at the end."""

    isolation = "overlay"
    max_concurrency = None

    def __init__(self, *found: Any) -> None:
        self.prompt = ParameterNode("a", name="prompt")
        self.found = found

    def parameters(self) -> list[ParameterNode[str]]:
        return [self.prompt]

    async def rollouts(self, tasks: Sequence[RolloutTask], guide: Any) -> AsyncIterator[tuple[int, Rollout]]:
        for item in self.found or reversed(range(len(tasks))):
            if isinstance(item, Exception):
                raise item
            if isinstance(item, int):
                yield item, Rollout(sample_id=tasks[item].sample.id, output=self.prompt.data, score=1.0)
            else:
                yield item


async def batched(agent: Any, count: int = 3) -> list[Rollout]:
    found: dict[int, Rollout] = {}
    tasks = [RolloutTask(sample=Sample(i, i), values={"prompt": "b"}) for i in range(count)]
    await run_batch(as_agent(agent), tasks, guide, found.__setitem__)
    return [found[i] for i in range(count)]


async def test_a_batch_agent_is_run_once_for_all_tasks() -> None:
    """Its rollouts have their tasks' indexes, and the candidate's values."""
    agent = Batches()
    assert [(run.sample_id, run.output) for run in await batched(agent)] == [(0, "b"), (1, "b"), (2, "b")]
    one = await AgentWork(as_agent(agent), guide)(RolloutTask(sample=Sample(5, 5), values={"prompt": "c"}))
    assert (one.sample_id, one.output) == (5, "c")
    assert agent.prompt.data == "a"


async def test_a_batch_that_raises_keeps_its_rollouts() -> None:
    """The remaining tasks have failed with the error; an error that ends the run is raised."""
    runs = await batched(Batches(1, ValueError("half-way")))
    assert [run.failure and run.failure.message for run in runs] == ["half-way", None, "half-way"]
    with pytest.raises(AuthenticationError):
        await batched(Batches(1, AuthenticationError("no", status=401)))


@pytest.mark.parametrize("found", [(3, Rollout(sample_id=3)), (0, "text"), "text", (0, None)])
async def test_a_batch_with_an_invalid_rollout(found: Any) -> None:
    """It is refused when it is yielded, with what was expected."""
    with pytest.raises(ConfigError, match=r"Expected \(index, rollout\) for each task once from BatchAgent"):
        await batched(Batches(found))


async def test_a_batch_with_a_missing_or_repeated_task() -> None:
    """Both are errors."""
    with pytest.raises(ConfigError, match="Expected a rollout of every task"):
        await batched(Batches(0, 1))
    with pytest.raises(ConfigError, match="for each task once"):
        await batched(Batches(0, 0))


async def test_an_agent_of_single_instances_yields_rollouts_as_they_end() -> None:
    """A Module's `rollouts` works without a trainer; an error that ends a run is raised itself."""
    agent = as_agent(Adder())
    tasks = [RolloutTask(sample=Sample(i, i)) for i in range(5)]
    found = {i: rollout async for i, rollout in agent.rollouts(tasks, guide)}
    assert [found[i].output for i in range(5)] == [2, 3, 4, 5, 6]
    with pytest.raises(AuthenticationError):
        async for _ in agent.rollouts([task(AuthenticationError("no", status=401))], guide):
            pass


async def test_the_local_executor_bounds_all_its_rollouts_together() -> None:
    """Two concurrent calls share its slots; results are in the order of the tasks."""
    running, most = 0, 0

    class Counting(Adder):
        def forward(self, x: Any) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            running -= 1
            return x

    import asyncio

    async with LocalExecutor(2) as executor:
        work = AgentWork(as_agent(Counting()), None, call=executor.call)
        tasks = [RolloutTask(sample=Sample(i, i)) for i in range(6)]
        async with asyncio.TaskGroup() as group:
            both = [group.create_task(executor.map(work, tasks)) for _ in range(2)]
    assert [[run.output for run in series.result()] for series in both] == [list(range(6))] * 2
    assert most <= 2


def echo(x: Any, *, word: str = "hi") -> str:
    """A function that can be pickled by name."""
    return f"{word} {x}"


async def test_work_is_pickled_with_agent_and_guide_only() -> None:
    """A worker creates its own threads."""
    work = pickle.loads(pickle.dumps(AgentWork(as_agent(echo), guide)))
    assert (await work(task("Ada", values={"word": "bye"}))).output == "bye Ada"


async def test_an_answer_that_contains_itself_is_an_answer() -> None:
    """It ended the run with RecursionError; an unfinished value is looked for in two levels only."""
    cyclic: list[Any] = ["x"]
    cyclic.append(cyclic)

    def agent(x: Any, *, k: int = 1) -> Any:
        return cyclic

    found = await AgentWork(as_agent(agent), lambda x, output, info: float(output is cyclic))(task(capture=False))
    assert (found.failure, found.score) == (None, 1.0)


async def test_a_guide_that_only_computes_runs_on_the_event_loop() -> None:
    """A thread for each comparison costs more than the comparison; any other synchronous guide may block."""
    threads = []

    def compare(x: Any, output: Any, info: Any) -> float:
        threads.append(current_thread())
        return 1.0

    class Compare:
        instant = True

        def __call__(self, x: Any, output: Any, info: Any) -> float:
            return compare(x, output, info)

    async with LocalExecutor(2) as executor:
        for guide in (Compare(), compare):
            await AgentWork(as_agent(Adder()), guide, call=executor.call)(task(capture=False))
    assert [thread is current_thread() for thread in threads] == [True, False]
