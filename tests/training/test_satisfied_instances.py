"""Instances that are right already: no optimizer call, and support for the current value."""

from __future__ import annotations

import json
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, first_suggestion, section, suggest

from aggregator import AggregatedUpdate, LLMMerge, MinibatchAlgorithm, exact_match
from aggregator.errors import ConfigError
from aggregator.optimizers import LLMOptimizer
from aggregator.portal import call
from aggregator.records import Proposal
from aggregator.training.merge import LLMChoice, majority, mean, tree_merge
from aggregator.training.step import Step


def fives(x: int, output: int, info: int) -> tuple[float, str]:
    return (5.0, "right") if output == info else (0.0, f"expected {info}, got {output}")


def one_wrong(count: int = 4) -> list[tuple[int, int]]:
    """An Adder of 1 is right on all but the first."""
    return [(0, 9), *additions(1, count)[1:]]


def train(
    kind: Any, data: list[tuple[int, int]], *, guide: Any = exact_match, merge: Any = None, **options: Any
) -> Any:
    asked = ScriptedModel(lambda _: suggest(amount=7))
    merged = ScriptedModel(merge or first_suggestion)
    given = {"llm": merged} if kind is AggregatedUpdate else {}
    trainer = kind(Adder(), LLMOptimizer(llm=asked), **given, **options)
    return trainer.train(guide, data, batch_size=len(data)), asked, merged


@pytest.mark.parametrize("kind", [AggregatedUpdate, MinibatchAlgorithm])
def test_the_optimizer_is_not_called_if_all_instances_are_right(kind: Any) -> None:
    """Every instance has the maximum: the value stays."""
    result, asked, _ = train(kind, additions(1), skip_perfect=True)
    assert (asked.asked, result.parameters["amount"]) == ([], 1)


def test_every_instance_gets_a_proposal_by_default() -> None:
    """This is the seed's behaviour."""
    _, asked, _ = train(AggregatedUpdate, additions(1))
    assert len(asked.asked) == 4


def test_the_optimizer_of_a_whole_minibatch_sees_the_remaining_instances() -> None:
    """A satisfied instance is left out of the prompt."""
    _, asked, _ = train(MinibatchAlgorithm, one_wrong(3), skip_perfect=True)
    (request,) = asked.asked
    assert section(request, "Output") == "1"


def test_one_proposal_against_satisfied_instances_is_merged() -> None:
    """The merge is called, and sees the support of the current value."""
    result, asked, merged = train(AggregatedUpdate, one_wrong(10), skip_perfect=True, merge=lambda _: "TERMINATE")
    assert (len(asked.asked), len(merged.asked), result.parameters["amount"]) == (1, 1, 1)
    assert "confidence: 0.5\nsupport: 9\n" in merged.asked[0][-1]["content"]


def test_the_maximum_is_declared_and_never_inferred() -> None:
    """A guide without max_score needs the argument; the argument overrides the guide."""
    with pytest.raises(ConfigError, match="declared maximum"):
        train(AggregatedUpdate, additions(1), guide=fives, skip_perfect=True)
    _, asked, _ = train(AggregatedUpdate, additions(1), guide=fives, skip_perfect=True, max_score=5.0)
    assert asked.asked == []
    _, asked, _ = train(AggregatedUpdate, additions(1), guide=fives, skip_perfect=True, max_score=6.0)
    assert len(asked.asked) == 4


@pytest.mark.parametrize("options", [{"skip_perfect": "yes"}, {"skip_perfect": True, "max_score": float("nan")}])
def test_invalid_options_are_refused_before_the_first_call(options: dict[str, Any]) -> None:
    """The error for a value that is not a bool or a finite number names the argument."""
    with pytest.raises(ConfigError, match=r"skip_perfect|max_score"):
        train(AggregatedUpdate, additions(1), **options)


def test_a_crash_is_never_satisfied() -> None:
    """An agent that fails gets a proposal even if min_score is the maximum."""

    class Broken(Adder):
        async def forward(self, x: int) -> int:
            if x == 0:
                raise ValueError("no zero")
            return await super().forward(x)

    asked = ScriptedModel(lambda _: "TERMINATE")
    trainer = AggregatedUpdate(Broken(), LLMOptimizer(llm=asked), llm=asked, skip_perfect=True)
    with pytest.warns(match="the agent failed 1 times"):
        trainer.train(exact_match, additions(1), batch_size=4, min_score=1.0)
    assert len(asked.asked) == 1


def test_an_overridden_forward_that_calls_ours_skips_too() -> None:
    """`super().forward` makes no call if the instance is satisfied."""

    class Own(AggregatedUpdate):
        async def aforward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
            return await super().aforward(agent, x, guide, info, verbose)

    asked = ScriptedModel(lambda _: suggest(amount=7))
    merged = ScriptedModel(lambda _: "TERMINATE")
    Own(Adder(), LLMOptimizer(llm=asked), llm=merged, skip_perfect=True).train(exact_match, one_wrong(), batch_size=4)
    assert len(asked.asked) == 1
    assert "support: 3" in merged.asked[0][-1]["content"]


def test_majority_counts_satisfied_instances_as_votes_for_the_current_value() -> None:
    """Two votes for another value lose against three satisfied instances, and win against one."""
    votes = [Proposal(values={"k": 5}), Proposal(values={"k": 5})]
    assert call(majority, votes, Step(values={"k": 3}, satisfied=3)) == []
    assert call(majority, votes, Step(values={"k": 3}, satisfied=1))[0].values == {"k": 5}


def test_mean_counts_satisfied_instances_as_proposals_of_the_current_value() -> None:
    """One proposal of 10 and three instances satisfied with 2 have the mean 4."""
    step = Step(values={"k": 2.0}, stepsize=1.0, satisfied=3)
    assert call(mean, [Proposal(values={"k": 10.0})], step)[0].values == {"k": 4.0}


@pytest.mark.parametrize("count", [1, 4])
def test_a_tree_of_merges_weighs_satisfied_instances_once_at_its_root(count: int) -> None:
    """Only the last round states the support of the current value, and it also happens for a single proposal."""
    model = ScriptedModel(lambda _: json.dumps({"suggestion": {"amount": 50}}))
    step = Step.of(Adder())
    step = type(step)(values=step.values, parameters=step.parameters, satisfied=9)
    proposals = [Proposal(values={"amount": i + 2}, sample_ids=(i,)) for i in range(count)]
    call(tree_merge(LLMMerge(model), fan_in=2), proposals, step)
    stated = ["support: 9" in request[-1]["content"] for request in model.asked]
    assert sum(stated) == 1


def test_a_choice_between_one_proposal_and_satisfied_instances_is_made() -> None:
    """LLMChoice may keep the current value, which is number 0."""
    model = ScriptedModel(lambda _: json.dumps({"suggestion": {"choice": 0}}))
    step = Step(values={"amount": 1}, satisfied=2)
    assert call(LLMChoice(model), [Proposal(values={"amount": 3})], step) == []
