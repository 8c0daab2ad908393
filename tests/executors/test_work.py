"""One rollout, run alone: what an executor runs needs nothing from its surroundings."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Sequence
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
    """Adds its parameter; says where it is for the input -1, and fails as it is told to."""

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


async def test_a_rollout_runs_under_the_values_of_its_task() -> None:
    """They are laid over the agent's own, and what it assigns on its way ends with the rollout."""
    agent = Adder()
    found = await AgentWork(as_agent(agent), guide)(task(values={"amount": 10}, repeat=2, lineage=("a", "b")))
    assert (found.sample_id, found.x, found.output, found.score, found.feedback) == (7, 3, 14, 0.5, "saw 14")
    assert (found.lineage, found.repeat, found.ms > 0) == ("a/b", 2, True)
    assert agent.amount.data == 1


async def test_the_lineage_of_a_task_is_counted_from_the_root() -> None:
    """So it is the same in a worker, whatever surrounds the call here."""
    work = AgentWork(as_agent(Adder()), guide)
    with lineage("somewhere", "else"):
        found = await work(task(-1, lineage=("train", "sample=7"), role="guide"))
        assert current_lineage() == "somewhere/else"
    assert found.output == "train/sample=7 guide"


async def test_without_capture_there_is_no_transcript() -> None:
    """A trial of values needs none, and taking one costs time."""
    work = AgentWork(as_agent(Adder()), None)
    assert (await work(task(capture=False))).score is None


@pytest.mark.parametrize("min_score", [None, -1.0])
async def test_an_agents_error_is_its_feedback(min_score: float | None) -> None:
    """It scores `min_score`; a lost call has no score, and what ends a run is raised."""
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
    """An agent of a framework that takes batches, and yields at the end."""

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


async def test_an_agent_that_takes_batches_is_run_as_one() -> None:
    """Its rollouts come back under their index, and under the values on trial."""
    agent = Batches()
    assert [(run.sample_id, run.output) for run in await batched(agent)] == [(0, "b"), (1, "b"), (2, "b")]
    one = await AgentWork(as_agent(agent), guide)(RolloutTask(sample=Sample(5, 5), values={"prompt": "c"}))
    assert (one.sample_id, one.output) == (5, "c")
    assert agent.prompt.data == "a"


async def test_a_batch_that_breaks_off_keeps_what_it_had() -> None:
    """The tasks that are left have failed with the error; an error that ends the run is raised."""
    runs = await batched(Batches(1, ValueError("half-way")))
    assert [run.failure and run.failure.message for run in runs] == ["half-way", None, "half-way"]
    with pytest.raises(AuthenticationError):
        await batched(Batches(1, AuthenticationError("no", status=401)))


@pytest.mark.parametrize("found", [(3, Rollout(sample_id=3)), (0, "text"), "text", (0, None)])
async def test_a_batch_that_yields_no_rollout_of_its_tasks(found: Any) -> None:
    """It is refused where it returns, and says what was expected."""
    with pytest.raises(ConfigError, match=r"Expected \(index, rollout\) for each task once from BatchAgent"):
        await batched(Batches(found))


async def test_a_batch_that_leaves_a_task_out_or_yields_it_twice() -> None:
    """Neither is guessed at."""
    with pytest.raises(ConfigError, match="Expected a rollout of every task"):
        await batched(Batches(0, 1))
    with pytest.raises(ConfigError, match="for each task once"):
        await batched(Batches(0, 0))


async def test_an_agent_that_runs_instances_yields_them_as_they_end() -> None:
    """The Protocol's `rollouts` of a Module works alone; an error that ends a run is raised by itself."""
    agent = as_agent(Adder())
    tasks = [RolloutTask(sample=Sample(i, i)) for i in range(5)]
    found = {i: rollout async for i, rollout in agent.rollouts(tasks, guide)}
    assert [found[i].output for i in range(5)] == [2, 3, 4, 5, 6]
    with pytest.raises(AuthenticationError):
        async for _ in agent.rollouts([task(AuthenticationError("no", status=401))], guide):
            pass


async def test_local_executor_bounds_all_its_rollouts_together() -> None:
    """Two series at once share its slots; results come in the order of the tasks."""
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
    """A function that pickle can find."""
    return f"{word} {x}"


async def test_work_is_sent_with_agent_and_guide_alone() -> None:
    """A worker makes its own threads."""
    work = pickle.loads(pickle.dumps(AgentWork(as_agent(echo), guide)))
    assert (await work(task("Ada", values={"word": "bye"}))).output == "bye Ada"
