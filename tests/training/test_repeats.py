"""Repeated rollouts: training, gates and evaluation see the mean per instance."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from training_fakes import Adder, ScriptedModel, additions, first_suggestion, section, suggest

from aggregator import AggregatedUpdate
from aggregator.agents.parameters import ParameterNode
from aggregator.cassettes.lineage import current_lineage
from aggregator.errors import ConfigError, TrainingWarning
from aggregator.executors.work import failure
from aggregator.gates import improves_on_validation
from aggregator.observing.observer import Observer
from aggregator.optimizers import LLMOptimizer
from aggregator.records import Rollout, RolloutTask
from aggregator.training.evaluation import join_repeats


def repeat() -> int:
    """Return the current rollout's repeat, from its lineage."""
    _, _, number = current_lineage().partition("/repeat=")
    return int(number.split("/")[0]) if number else 0


class Noisy(Adder):
    """Right in every other repeat, beginning with the first."""

    async def forward(self, x: int) -> int:
        return int(x + self.amount.data) + repeat() % 2


def right(x: int, output: int, info: int) -> tuple[float, str]:
    return float(output == info), f"got {output}"


class Seen(Observer):
    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.steps: list[Any] = []

    async def rollout(self, rollout: Rollout) -> None:
        self.rollouts.append(rollout)

    async def step(self, report: Any) -> None:
        self.steps.append(report)


def trainer(agent: Any, reply: str = "TERMINATE", **options: Any) -> tuple[AggregatedUpdate, ScriptedModel]:
    asked = ScriptedModel(lambda _: reply)
    merged = ScriptedModel(first_suggestion)
    return AggregatedUpdate(agent, LLMOptimizer(llm=asked), llm=merged, **options), asked


def test_scores_of_a_run_are_means_of_the_repeats() -> None:
    """Two of four rollouts are right: each instance scores 0.5 in training and on the test set."""
    train, asked = trainer(Noisy())
    result = train.train(right, additions(1), batch_size=4, test_dataset=additions(1), repeats=4)
    assert result.history[0].scores == (0.5, 0.5, 0.5, 0.5)
    assert result.evaluations[0].scores == (0.5, 0.5, 0.5, 0.5)
    assert len(asked.asked) == 4


def test_the_first_rollout_keeps_its_lineage_and_the_others_extend_it() -> None:
    """`repeat=0` adds no part to the lineage, so a recording without repeats serves the first."""
    seen = Seen()
    train, _ = trainer(Noisy(), observers=[seen])
    train.train(right, additions(1, 1), repeats=3)
    place = "train/epoch=0/batch=0/sample=0"
    assert sorted([place, f"{place}/repeat=1", f"{place}/repeat=2"]) == sorted(run.lineage for run in seen.rollouts)
    assert (place,) == seen.steps[0].lineages


def test_one_repeat_is_the_default() -> None:
    """Lineages and result equal those without the argument."""
    results = []
    given: list[dict[str, Any]] = [{}, {"repeats": 1}]
    for options in given:
        train, _ = trainer(Noisy(), suggest(amount=2))
        results.append(train.train(right, additions(2), batch_size=2, **options))
    assert results[0] == results[1]


def test_the_optimizer_sees_the_worst_repeat_and_the_mean_score() -> None:
    """A correct first rollout does not hide a wrong second one."""
    train, asked = trainer(Noisy())
    train.train(right, additions(1, 1), repeats=2)
    assert [section(asked.asked[0], name) for name in ("Output", "Score", "Feedback")] == ["2", "0.5", "got 2"]


def test_a_gate_compares_means_of_the_repeats() -> None:
    """The first rollout alone gives 1 -> 0, the mean of four 0.5 -> 0.75: the update is accepted."""

    class Steadier(Adder):
        async def forward(self, x: int) -> int:
            wrong = repeat() in ((0,) if self.amount.data == 2 else (1, 2))
            return -1 if wrong else x

    train, _ = trainer(Steadier(), suggest(amount=2), gate=improves_on_validation([(0, 0), (1, 1)]))
    result = train.train(right, [(0, 0)], repeats=4)
    assert (
        result.history[0].decision.accepted,
        result.history[0].decision.before,
        result.history[0].decision.after,
    ) == (True, 0.5, 0.75)


def test_identical_repeats_give_a_warning() -> None:
    """Repeats of a deterministic agent show no noise, whatever they cost."""
    train, _ = trainer(Adder())
    with pytest.warns(TrainingWarning, match="the 3 repeats of all 4 instances so far are identical"):
        train.train(right, additions(1), batch_size=4, repeats=3)


def test_different_repeats_give_no_warning() -> None:
    """One instance that differs is enough."""
    train, _ = trainer(Noisy())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the .* repeats", TrainingWarning)
        train.train(right, additions(1), batch_size=2, repeats=2)


def test_a_crash_in_one_repeat_counts_as_the_lowest_score_and_a_lost_call_is_left_out() -> None:
    """Of 1, a crash and a lost call the mean is 0.5; the optimizer sees the crash."""
    crash = failure("agent", ValueError("no"), sample_id=0)
    lost = failure("agent", TimeoutError("late"), sample_id=0)
    runs = [Rollout(sample_id=0, score=1.0), Rollout(sample_id=0, failure=crash, repeat=1)]
    joined = join_repeats([*runs, Rollout(sample_id=0, failure=replace(lost, infrastructure=True), repeat=2)])
    assert (joined.score, joined.failure, joined.repeat) == (0.5, crash, 0)


def test_named_scores_are_averaged_by_name() -> None:
    """A score that only some repeats have is the mean of these."""
    runs = [
        Rollout(sample_id=0, score=1.0, scores={"a": 1.0, "b": 4.0}),
        Rollout(sample_id=0, score=1.0, scores={"a": 2.0}),
    ]
    assert join_repeats(runs).scores == {"a": 1.5, "b": 4.0}


def test_an_agent_that_takes_batches_is_repeated_too() -> None:
    """All repeats of a minibatch are one batch."""

    class Batched:
        isolation = "overlay"
        max_concurrency = None

        def __init__(self) -> None:
            self.sizes: list[int] = []
            self.amount = ParameterNode(1, name="amount")

        def parameters(self) -> list[ParameterNode[Any]]:
            return [self.amount]

        async def rollouts(self, tasks: Sequence[RolloutTask], guide: Any) -> AsyncIterator[tuple[int, Rollout]]:
            self.sizes.append(len(tasks))
            for i, task in enumerate(tasks):
                await asyncio.sleep(0)
                yield i, Rollout(sample_id=task.sample.id, output=task.repeat, score=float(task.repeat), feedback="so")

    agent = Batched()
    train, _ = trainer(agent)
    result = train.train(right, additions(1, 2), batch_size=2, repeats=3)
    assert (agent.sizes, result.history[0].scores) == ([6], (1.0, 1.0))


def test_repeats_respect_max_concurrency() -> None:
    """Repeats share the slots of the instances."""
    busy: list[int] = []
    most: list[int] = []

    class Busy(Adder):
        async def forward(self, x: int) -> int:
            busy.append(x)
            most.append(len(busy))
            for _ in range(5):
                await asyncio.sleep(0)
            busy.pop()
            return repeat()

    train, _ = trainer(Busy(), max_concurrency=4)
    train.train(right, additions(1, 8), batch_size=8, repeats=3)
    assert max(most) <= 4


@pytest.mark.parametrize("repeats", [0, -1, 1.5, "two"])
def test_invalid_repeats_are_refused(repeats: Any) -> None:
    """The error is raised before the first call."""
    train, _ = trainer(Adder())
    with pytest.raises(ConfigError, match="repeats"):
        train.train(right, additions(1), repeats=repeats)


def test_an_overridden_forward_cannot_be_repeated() -> None:
    """It runs the agent by itself, as the error says."""

    class Own(AggregatedUpdate):
        def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
            return None

    own = Own(Adder(), LLMOptimizer(llm=ScriptedModel("TERMINATE")), llm=ScriptedModel("TERMINATE"))
    with pytest.raises(ConfigError, match="repeats=1"):
        own.train(right, additions(1), repeats=2)


def test_a_plan_counts_the_repeats() -> None:
    """Four instances three times."""
    train, _ = trainer(Adder())
    with pytest.warns(TrainingWarning):
        planned = train.plan(right, additions(1), repeats=3)
    assert planned.rollouts["training"] == 12
