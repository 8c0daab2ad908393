"""Planning: what a run would do, counted in advance, or measured on a few rollouts on request."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, from_feedback, suggest

from aggregator import (
    AggregatedUpdate,
    BasicSearchAlgorithm,
    BeamSearch,
    ConfigError,
    LLMJudge,
    LLMMerge,
    LLMOptimizer,
    MinibatchAlgorithm,
    Module,
    ParameterNode,
    SequentialSearch,
)
from aggregator.errors import TrainingWarning
from aggregator.records import Usage
from aggregator.rules import LLMChoice, best_tried, chain, dedupe, majority
from aggregator.training.gates import both, improves_on_batch, improves_on_validation


def trainer(**options: Any) -> AggregatedUpdate:
    model = ScriptedModel(from_feedback)
    return AggregatedUpdate(Adder(), LLMOptimizer(llm=model), llm=model, **options)


def test_a_plan_counts_what_a_run_does() -> None:
    """Its rollouts and calls equal those of the run, and planning runs nothing."""
    optimizer, merge = ScriptedModel(from_feedback), ScriptedModel("TERMINATE")
    agent = Adder()
    own = AggregatedUpdate(agent, LLMOptimizer(llm=optimizer), llm=merge)
    arguments: dict[str, Any] = {"batch_size": 2, "num_epochs": 2, "test_dataset": additions(3, 3), "eval_frequency": 2}
    plan = own.plan(exact, additions(3, 6), **arguments)
    assert (optimizer.asked, merge.asked) == ([], [])
    assert plan.rollouts == {"training": 12, "evaluation": 12, "gate": 0}
    assert plan.calls == {"agent": 24, "optimizer": 12, "aggregator": 6, "guide": 0}
    assert plan.evaluation_share == 0.5
    result = own.train(exact, additions(3, 6), **arguments)
    assert sum(len(evaluation.scores) for evaluation in result.evaluations) == plan.rollouts["evaluation"]
    assert sum(len(report.scores) for report in result.history) == plan.rollouts["training"]
    assert len(result.history) == plan.steps
    assert len(optimizer.asked) <= plan.calls["optimizer"]
    assert str(plan).startswith("6 steps, 24 rollouts (12 training, 12 evaluation, 0 gate), 50% of them evaluation\n")


@pytest.mark.parametrize(
    ("gate", "rollouts"),
    [
        (improves_on_batch(), 6),
        (improves_on_validation(additions(3, 5)), 20),
        (both(improves_on_batch(), improves_on_validation(additions(3, 5))), 26),
    ],
)
def test_cost_of_a_gate(gate: Any, rollouts: int) -> None:
    """It runs the minibatch once more, or the validation set for each candidate and once for the current values."""
    assert trainer(gate=gate).plan(exact, additions(3, 6), batch_size=2).rollouts["gate"] == rollouts


def test_cost_of_a_search() -> None:
    """Each of 3 explored candidates runs the minibatch, and each of their 2 new ones is tried on it."""
    model = ScriptedModel(from_feedback)
    search = BeamSearch(Adder(), LLMOptimizer(llm=model), num_candidates=3, num_proposals=2, rule=majority)
    plan = search.plan(exact, additions(3, 4), batch_size=2)
    assert plan.rollouts == {"training": 12, "evaluation": 0, "gate": 24}


class Counted(Adder):
    """Counts its runs."""

    runs = 0

    async def forward(self, x: int) -> int:
        self.runs += 1
        return await super().forward(x)


def new_amounts() -> ScriptedModel:
    numbers = count(10)
    return ScriptedModel(lambda _messages: suggest(amount=next(numbers)))


@pytest.mark.parametrize(
    ("kind", "options", "choices"),
    [
        (BasicSearchAlgorithm, {"num_proposals": 3}, {}),
        (BasicSearchAlgorithm, {"validate_dataset": additions(3, 3)}, {}),
        (BasicSearchAlgorithm, {"validate_guide": exact}, {}),
        (SequentialSearch, {"validate_dataset": additions(3, 3)}, {}),
        (AggregatedUpdate, {"rule": best_tried}, {}),
        (AggregatedUpdate, {"rule": chain(dedupe, best_tried)}, {}),
        (AggregatedUpdate, {}, {"num_candidates": 3, "select": best_tried}),
        (MinibatchAlgorithm, {}, {"num_candidates": 3, "select": best_tried}),
    ],
)
def test_trials_of_candidates_were_not_counted(kind: Any, options: Any, choices: Any) -> None:
    """What compares by running was counted as free, so that a run cost more than its plan."""
    agent, model = Counted(), new_amounts()
    options = {"llm": model, **options} if kind is AggregatedUpdate and "rule" not in options else options
    own = kind(agent, LLMOptimizer(llm=model, **choices), **options)
    plan = own.plan(exact, additions(3, 4), batch_size=2)
    assert agent.runs == 0
    own.train(exact, additions(3, 4), batch_size=2)
    assert plan.calls["agent"] == sum(plan.rollouts.values()) == agent.runs


def test_the_validation_set_was_not_counted() -> None:
    """It is evaluated as often as the test set, including the baseline; repeats multiply every rollout."""
    sets: Any = {"validate_dataset": additions(3, 5), "test_dataset": additions(3, 1)}
    with pytest.warns(TrainingWarning, match="72 of 90 rollouts evaluate the test and validation sets"):
        plan = trainer().plan(exact, additions(3, 6), batch_size=2, repeats=3, **sets)
    assert plan.rollouts == {"training": 18, "evaluation": 3 * 4 * (5 + 1), "gate": 0}
    assert plan.calls["optimizer"] == 6
    with pytest.warns(TrainingWarning, match="evaluate the validation set"):
        trainer().plan(exact, additions(3, 4), batch_size=2, validate_dataset=additions(3, 10))


def test_skipped_samples_were_counted() -> None:
    """`skip_samples` is part of the plan."""
    plan = trainer(skip_samples=[0, 3]).plan(exact, additions(3, 6), batch_size=6)
    assert (plan.rollouts["training"], plan.calls["optimizer"]) == (4, 4)


def test_an_optimizer_of_whole_minibatches_was_counted_per_instance() -> None:
    """It is called once a step, and nothing is merged."""
    model = ScriptedModel(from_feedback)
    plan = MinibatchAlgorithm(Adder(), LLMOptimizer(llm=model)).plan(exact, additions(3, 6), batch_size=3)
    assert (plan.calls["optimizer"], plan.calls["aggregator"]) == (2, 0)
    beam = BeamSearch(Adder(), LLMOptimizer(llm=model), num_candidates=3, num_proposals=2)
    assert beam.plan(exact, additions(3, 4), batch_size=2).calls["optimizer"] == 2 * 3 * 2


def test_a_merge_at_the_end_of_a_chain_was_not_counted() -> None:
    """Every rule that calls a model counts."""
    model = ScriptedModel(from_feedback)
    for rule, calls in (
        (chain(dedupe, LLMMerge(model)), 3),
        (chain(LLMMerge(model), LLMChoice(model)), 6),
        (dedupe, 0),
    ):
        assert trainer(rule=rule).plan(exact, additions(3, 6), batch_size=2).calls["aggregator"] == calls


def test_calls_of_a_judge_and_of_several_candidates() -> None:
    """A judge is called once per rollout, an optimizer once per candidate."""
    model = ScriptedModel(from_feedback)
    own = AggregatedUpdate(Adder(), LLMOptimizer(llm=model, num_candidates=3), llm=model)
    plan = own.plan(LLMJudge(model), additions(3, 4), batch_size=2)
    assert (plan.calls["guide"], plan.calls["optimizer"]) == (4, 12)


def test_an_aggregator_that_is_never_called() -> None:
    """With the seed's batch_size=1 nothing is merged."""
    with pytest.warns(TrainingWarning, match="aggregator is idle: batch_size=1 .* larger batch_size"):
        plan = trainer().plan(exact, additions(3, 3))
    assert (plan.calls["aggregator"], "aggregator is idle" in str(plan)) == (0, True)


def test_a_larger_batch_is_no_remedy_where_there_is_one_training_instance() -> None:
    """The warning asked for a batch_size larger than 4 with one instance to train on."""
    with pytest.warns(TrainingWarning, match="aggregator is idle"):
        plan = trainer().plan(exact, [(0, 3)], batch_size=4)
    assert "the aggregator is idle: 1 training instance gives one proposal a step" in str(plan)
    assert "give more data" in str(plan)
    assert "larger batch_size" not in str(plan)


def test_a_run_that_mostly_evaluates() -> None:
    """With the seed's eval_frequency=1 the test set is run after every step."""
    with pytest.warns(TrainingWarning, match="30 of 34 rollouts evaluate the test set"):
        trainer().plan(exact, additions(3, 4), batch_size=2, test_dataset=additions(3, 10))


class Asking(Module):
    """Calls its model twice for each input."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.prompt = ParameterNode("Add.")

    async def forward(self, x: int) -> int:
        for _ in range(2):
            await self.llm.complete([{"role": "user", "content": f"{self.prompt} {x}"}])
        return x


def test_a_sample_measures_tokens_and_cost() -> None:
    """Four rollouts are run and extrapolated; the plan says so, and names what it leaves out."""
    student = ScriptedModel("3", usage=Usage(input_tokens=10, output_tokens=5, cost=0.001, calls=1))
    optimizer = ScriptedModel("TERMINATE")
    own = AggregatedUpdate(Asking(student), LLMOptimizer(llm=optimizer), llm=optimizer)
    plan = own.plan(exact, additions(3, 8), batch_size=4, sample=4)
    assert (len(student.asked), len(optimizer.asked)) == (8, 0)
    assert (plan.sampled, plan.calls["agent"]) == (4, 16)
    assert plan.usage["agent"] == Usage(input_tokens=160, output_tokens=80, cost=0.016, calls=16)
    assert plan.cost == pytest.approx(0.016)
    assert "4 rollouts were run to measure this" in str(plan)


@pytest.mark.parametrize("options", [{"sample": -1}, {"sample": True}, {"batch_size": 0}, {"num_epochs": -1}])
def test_invalid_arguments(options: dict[str, Any]) -> None:
    """Arguments that `train` refuses are refused here too."""
    with pytest.raises(ConfigError):
        trainer().plan(exact, additions(3, 3), **options)
