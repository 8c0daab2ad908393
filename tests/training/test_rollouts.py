"""Where a trainer's rollouts run: instance by instance, on any executor, for every kind of agent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, from_feedback, section, suggest

from aggregator import (
    AggregatedUpdate,
    ConfigError,
    LLMOptimizer,
    Minibatch,
    ParameterNode,
    PrioritySearch,
    Rollout,
    Trainer,
    TrainingError,
    portal,
)
from aggregator.errors import AuthenticationError
from aggregator.executors.local import LocalExecutor
from aggregator.executors.work import InstanceAgent, Ran
from aggregator.gates import improves_on_batch
from aggregator.guides.calling import judge
from aggregator.observing.observer import Observer
from aggregator.records import RolloutTask
from aggregator.rules import majority
from aggregator.searches import beam
from aggregator.training.checkpoints import PARAMETERS

pytestmark = pytest.mark.filterwarnings("ignore:the (agent|guide) failed:aggregator.errors.TrainingWarning")

DATA = additions(5)


def learner(agent: Any, reply: Any = from_feedback, *, kind: Any = Minibatch, **options: Any) -> Any:
    options = {"rule": majority, "observers": [], **options}
    return kind(agent, LLMOptimizer(llm=ScriptedModel(reply, jitter=lambda: 5)), **options)


def test_a_proposal_waited_for_the_slowest_rollout() -> None:
    """Each proposal starts when its rollout arrives: here the last rollout ends after all other proposals."""
    proposed = 0
    others = asyncio.Event()

    class Slowest(Adder):
        async def forward(self, x: int) -> int:
            if x == 0:
                await asyncio.wait_for(others.wait(), timeout=20)
            return await super().forward(x)

    def reply(messages: list[dict[str, Any]]) -> str:
        nonlocal proposed
        proposed += 1
        if proposed == 3:
            others.set()
        return from_feedback(messages)

    trainer = Minibatch(Slowest(), LLMOptimizer(llm=ScriptedModel(reply)), rule=majority, observers=[])
    report = trainer.train(exact, DATA, batch_size=4).history[0]
    assert (proposed, report.update) == (4, {"amount": 5})


class Elsewhere:
    """An executor that records its tasks and runs them here, the last one first."""

    def __init__(self) -> None:
        self.tasks: list[RolloutTask] = []

    async def map(self, work: Any, tasks: Sequence[RolloutTask]) -> list[Rollout]:
        self.tasks += tasks
        found = [await work(task) for task in reversed(tasks)]
        return found[::-1]


@pytest.mark.parametrize(
    "options", [{}, {"kind": Trainer, "search": beam(2)}, {"kind": Trainer, "propose_per": "batch"}]
)
def test_all_rollouts_go_through_the_executor(options: Any) -> None:
    """This includes the minibatch, trials and the test set; the result is the same."""
    executor = Elsewhere()
    results = [
        learner(Adder(), suggest(amount=5), gate=improves_on_batch(), executor=given, **options).train(
            exact, DATA, batch_size=2, test_dataset=DATA[:2]
        )
        for given in (executor, None)
    ]
    assert results[0] == results[1]
    places = {"/".join(part.split("=")[0] for part in task.lineage) for task in executor.tasks}
    assert {"train/evaluate/step/sample", "train/epoch/batch/values/sample"} <= places
    assert all(task.values.keys() == {"amount", "label"} for task in executor.tasks)


@pytest.mark.parametrize("executor", [5, LocalExecutor, object()])
def test_an_invalid_executor(executor: Any) -> None:
    """It is refused at construction."""
    with pytest.raises(ConfigError, match=r"Expected an executor such as LocalExecutor\(8\)"):
        learner(Adder(), executor=executor)


@pytest.mark.parametrize("executor", [Elsewhere(), LocalExecutor(2)])
def test_an_executor_for_a_batch_agent_is_refused(executor: Any) -> None:
    """The agent's framework runs its rollouts, so an executor would get none."""
    with pytest.raises(ConfigError, match=r"Expected no executor for an agent that takes batches, got .* for Batches"):
        learner(Batches(), executor=executor)


class Own(AggregatedUpdate):
    def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
        return {"amount": 5}


def test_an_overridden_forward_is_refused_with_a_remote_executor() -> None:
    """Another process has no trainer to call it on: the error is raised at construction."""
    with pytest.raises(ConfigError, match="Expected an executor of this process with an overridden forward"):
        Own(Adder(), None, rule=majority, executor=Elsewhere())
    Own(Adder(), None, rule=majority, executor=LocalExecutor(2)).train(exact, DATA)
    with pytest.raises(ConfigError, match="Expected an agent that can be called with one input with an overridden"):
        Own(Batches(), None, rule=majority)


class Batches:
    """A framework's agent: it takes whole batches, applies the values itself, and yields at the end."""

    max_concurrency: int | None = None

    def __init__(self, isolation: Any = "copy") -> None:
        self.isolation = isolation
        self.amount = ParameterNode(1, name="amount")
        self.batches: list[tuple[int, list[int]]] = []
        self.inside: set[int] = set()

    def parameters(self) -> list[ParameterNode[int]]:
        return [self.amount]

    async def rollouts(self, tasks: Sequence[RolloutTask], guide: Any) -> AsyncIterator[tuple[int, Rollout]]:
        amount = tasks[0].values["amount"]
        assert {task.values["amount"] for task in tasks} == {amount}
        self.batches.append((amount, [task.sample.id for task in tasks]))
        self.inside.add(amount)
        for _ in range(3):
            await asyncio.sleep(0)
            assert self.isolation != "serial" or self.inside == {amount}
        found = [(i, task.sample, task.sample.x + amount) for i, task in enumerate(tasks)]
        self.inside.discard(amount)
        for i, sample, output in reversed(found):
            score, feedback = await judge(guide, sample.x, output, sample.info)
            yield i, Rollout(sample_id=sample.id, output=output, score=score, feedback=feedback)


def test_a_batch_agent_is_trained() -> None:
    """It gets the minibatch at once, as well as a gate's trial and the test set; rollouts are in the samples' order."""
    agent = Batches()
    reports: list[Any] = []
    trainer = learner(agent, gate=improves_on_batch(), observers=[reports.append])
    result = trainer.train(exact, DATA, batch_size=4, test_dataset=DATA)
    assert (agent.amount.data, result.test_scores) == (5, [0.0, 1.0])
    order = list(result.history[0].sample_ids)
    assert agent.batches == [(1, [0, 1, 2, 3]), (1, order), (5, order), (5, [0, 1, 2, 3])]
    assert [run.sample_id for run in reports[0].rollouts] == order
    assert reports[0].lineages == tuple(f"train/epoch=0/batch=0/sample={i}" for i in order)


@pytest.mark.parametrize("isolation", ["copy", "serial", "overlay"])
def test_candidates_of_a_batch_agent_never_share_a_batch(isolation: Any) -> None:
    """Each batch has one set of values; with "serial" one candidate runs at a time."""
    agent = Batches(isolation)
    amounts = iter([5, 3, 7, 9, 11, 13, 15, 17])
    optimizer = LLMOptimizer(llm=ScriptedModel(lambda _: suggest(amount=next(amounts))))
    search = PrioritySearch(agent, optimizer, num_candidates=2, num_proposals=2, observers=[])
    result = search.train(exact, DATA, batch_size=2)
    assert result.parameters["amount"] == 5
    assert {amount for amount, _ in agent.batches} >= {1, 5, 3}


def test_an_agent_that_scores_itself_is_trained_without_a_guide() -> None:
    """It gets None as the guide, as the Protocol states; an agent of single instances needs one."""

    class Own(Batches):
        async def rollouts(self, tasks: Sequence[RolloutTask], guide: Any) -> AsyncIterator[tuple[int, Rollout]]:
            assert guide is None
            async for i, rollout in super().rollouts(tasks, exact):
                yield i, rollout

    agent = Own()
    result = learner(agent).train(None, DATA, batch_size=4, validate_dataset=DATA)
    assert (agent.amount.data, [one.score for one in result.validations]) == (5, [0.0, 1.0])
    with pytest.raises(ConfigError, match="Expected a guide"):
        learner(Adder()).train(None, DATA)


def test_an_error_that_ends_the_run_cancels_a_batch_at_once() -> None:
    """It is raised alone, and nothing waits for the missing rollouts."""

    class Broken(Batches):
        async def rollouts(self, tasks: Sequence[RolloutTask], guide: Any) -> AsyncIterator[tuple[int, Rollout]]:
            yield 0, Rollout(sample_id=tasks[0].sample.id, score=0.0, feedback="more")
            raise AuthenticationError("no such key", status=401)

    with pytest.raises(TrainingError, match="AuthenticationError: no such key"):
        learner(Broken()).train(exact, DATA, batch_size=4)


def test_a_batch_that_raises_fails_its_remaining_instances() -> None:
    """The rollouts yielded before count; the others have failed with that error."""

    class Broken(Batches):
        async def rollouts(self, tasks: Sequence[RolloutTask], guide: Any) -> AsyncIterator[tuple[int, Rollout]]:
            yield 0, Rollout(sample_id=tasks[0].sample.id, score=0.5, feedback="right")
            raise KeyError("k")

    result = learner(Broken()).train(exact, DATA, batch_size=4, min_score=0.0)
    assert sorted(result.history[0].scores, key=str) == [0.0, 0.0, 0.0, 0.5]
    assert {(record.stage, record.error) for record in result.failures} == {("agent", "KeyError")}


@pytest.mark.parametrize("limit", [1, 2])
def test_an_agents_own_limit_bounds_only_its_rollouts(limit: int) -> None:
    """The agent's max_concurrency limits rollouts while other instances' proposals are made."""
    running = most = overlapping = 0

    class Limited(InstanceAgent):
        max_concurrency = limit
        amount = ParameterNode(1, name="amount")

        def parameters(self) -> list[ParameterNode[Any]]:
            return [self.amount]

        async def run(self, task: RolloutTask, call: Any) -> Ran:
            nonlocal running, most
            running += 1
            most = max(most, running)
            for _ in range(20):
                await asyncio.sleep(0)
            running -= 1
            return Ran(output=task.sample.x + self.amount.data)

    def reply(messages: list[dict[str, Any]]) -> str:
        nonlocal overlapping
        overlapping += running > 0
        return from_feedback(messages)

    agent = Limited()
    agent.amount = ParameterNode(1, name="amount")
    assert learner(agent, reply).train(exact, DATA, batch_size=4).parameters == {"amount": 5}
    assert (most, overlapping > 0) == (limit, True)


def test_a_plain_function_is_trained_and_saved(tmp_path: Path) -> None:
    """Its keyword-only arguments change for every caller, and are saved like a Module's."""

    async def greet(x: str, *, word: str = "hi") -> str:
        return f"{word} {x}"

    def guide(x: str, output: str, info: str) -> tuple[float, str]:
        return float(output == info), f"expected {info}"

    def polite(messages: list[dict[str, Any]]) -> str:
        return suggest(word=section(messages, "Feedback").split()[1])

    trainer = Trainer(greet, LLMOptimizer(llm=ScriptedModel(polite)), rule=majority, observers=[])
    result = trainer.train(guide, [("Ada", "dear Ada"), ("Bob", "dear Bob")], batch_size=2, run_dir=tmp_path)
    assert result.parameters == {"word": "dear"}
    assert portal.call(greet, "Eve") == "dear Eve"
    saved = json.loads((tmp_path / PARAMETERS).read_bytes())
    assert (saved["parameters"], saved["types"]) == ({"word": "dear"}, {"word": "str"})
    assert trainer.agent is greet


def test_observers_see_every_rollout_without_its_handle() -> None:
    """This includes the minibatch, trials and the test set; the handle stays with its adapter."""
    seen: list[Rollout] = []

    class Watching(Observer):
        def rollout(self, rollout: Rollout, /) -> None:
            seen.append(rollout)

    learner(Adder(), gate=improves_on_batch(), observers=[Watching()]).train(
        exact, DATA, batch_size=4, test_dataset=DATA
    )
    kinds = [run.lineage.split("/")[1].split("=")[0] + str("values=" in run.lineage) for run in seen]
    assert {kind: kinds.count(kind) for kind in kinds} == {"evaluateFalse": 8, "epochFalse": 4, "epochTrue": 4}
    assert {run.handle for run in seen} == {None}


def test_without_a_rule_the_optimizers_model_merges() -> None:
    """A trainer needs no second model, nor a default one in the environment."""
    model = ScriptedModel(
        lambda messages: suggest(amount=7) if "#SuggestedValue_1" in str(messages) else from_feedback(messages)
    )
    trainer = Trainer(Adder(), LLMOptimizer(llm=model), observers=[])
    assert trainer.train(exact, [(0, 5), (1, 9)], batch_size=2).parameters["amount"] == 7
    assert [role for _, role in model.places].count("aggregator") == 1
