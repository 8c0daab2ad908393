"""A crash is the lowest result: an agent that fails on an instance never looks better than one that does not."""

from __future__ import annotations

from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, suggest

from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError, RateLimitError
from aggregator.records import Candidate, Failure, Proposal, Rollout, TrainingResult
from aggregator.training.algorithms import AggregatedUpdate, BasicSearchAlgorithm, Minibatch, PrioritySearch
from aggregator.training.evaluation import evaluate, lowest_of
from aggregator.training.gates import compare, compare_runs, improves_on_batch, improves_on_validation
from aggregator.training.merge import best_tried
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.searches import compare_on_shared, mean_score, with_scores
from aggregator.training.step import Gate, Step

pytestmark = pytest.mark.filterwarnings("ignore:the (agent|guide) failed:aggregator.errors.TrainingWarning")

DATA = [(f"q{i}", "no") for i in range(4)]


class Fragile(Module):
    """Raises on all inputs but the first once its prompt asks to be terse."""

    def __init__(self, lost: type[Exception] = KeyError) -> None:
        self.prompt = ParameterNode("good")
        self.lost = lost

    def forward(self, x: str) -> str:
        if "terse" in self.prompt.data and x != "q0":
            raise self.lost("lang")
        return self.prompt.data


def terse_is_better(x: str, output: str, info: str) -> tuple[float, str]:
    return (1.0 if "terse" in output else 0.9), "fb"


def negative(x: str, output: str, info: str) -> tuple[float, str]:
    return (-1.0 if "terse" in output else -2.0 if x == "q0" else -1.5), "fb"


def train(gate: Gate | None = None, guide: Any = terse_is_better, kind: Any = AggregatedUpdate, **facts: Any) -> Any:
    llm = ScriptedModel(lambda messages: suggest(prompt="be terse"))
    parts = {"llm": llm} if kind is AggregatedUpdate else {}
    agent = facts.pop("agent", None) or Fragile()
    trainer = kind(agent, LLMOptimizer(llm=llm), gate=gate, **parts, **facts)
    return agent, trainer.train(guide, DATA, batch_size=4, test_dataset=DATA)


@pytest.mark.parametrize("guide", [terse_is_better, negative])
@pytest.mark.parametrize("gate", [improves_on_validation(DATA), improves_on_batch(), improves_on_batch(-10.0)])
def test_a_candidate_that_crashes_on_three_of_four_instances_is_refused(gate: Gate, guide: Any) -> None:
    """It was compared on the one remaining instance: "mean score 0.9 -> 1 on 1 instances"."""
    agent, result = train(gate, guide)
    assert agent.prompt.data == "good"

    reason = result.history[0].decision.reason
    assert "on 4 instances; 1 judged on both sides, the agent failed on 0 before and 3 after" in reason


@pytest.mark.parametrize("kind", [BasicSearchAlgorithm, PrioritySearch])
@pytest.mark.parametrize("guide", [terse_is_better, negative])
@pytest.mark.parametrize("lost", [KeyError, RateLimitError])
def test_a_search_never_takes_a_candidate_that_crashes_or_is_lost(kind: Any, guide: Any, lost: Any) -> None:
    """Its mean was that of the one instance on which it did not crash."""
    agent, result = train(guide=guide, kind=kind, agent=Fragile(lost))
    assert (agent.prompt.data, result.history[0].decision.accepted) == ("good", False)


def test_the_test_score_counts_crashes() -> None:
    """Without a gate the crashing prompt is accepted, and its test score covers all instances: it was 1.0."""
    _, result = train()
    assert result.test_scores == [0.9, 0.25]
    assert result.evaluations[1].scores == (1.0, None, None, None)


def test_lost_calls_after_an_update_are_not_a_gain() -> None:
    """A candidate with three calls lost twice each is not judged on the remaining one."""
    agent, result = train(improves_on_validation(DATA), agent=Fragile(RateLimitError))
    assert agent.prompt.data == "good"
    assert "3 more that were lost after, each at 0" in result.history[0].decision.reason


def test_a_lost_call_is_made_again() -> None:
    """The second answer counts."""
    failed: set[str] = set()

    class Once(Fragile):
        def forward(self, x: str) -> str:
            if "terse" in self.prompt.data and x not in failed:
                failed.add(x)
                raise RateLimitError("429")
            return self.prompt.data

    agent, result = train(improves_on_validation(DATA), agent=Once())
    assert result.history[0].decision.reason == "mean score 0.9 -> 1 on 4 instances"
    assert agent.prompt.data == "be terse"


def test_a_lost_call_before_the_update_is_made_again_for_the_batch_gate() -> None:
    """The minibatch lost the rollout; the gate runs it again before it compares."""
    left = ["q2"]

    class Once(Fragile):
        def forward(self, x: str) -> str:
            if x in left:
                left.remove(x)
                raise RateLimitError("429")
            return self.prompt.data

    _, result = train(improves_on_batch(), agent=Once())
    assert result.history[0].decision.reason == "mean score 0.9 -> 1 on 4 instances"


@pytest.mark.parametrize("guide", [terse_is_better])
def test_a_guide_may_declare_its_minimum(guide: Any) -> None:
    """A crash scores the guide's minimum, unless `min_score` is given."""

    class Guide:
        min_score = -3.0

        def __call__(self, x: str, output: str, info: str) -> tuple[float, str]:
            return terse_is_better(x, output, info)

    agent, result = train(guide=Guide())
    assert result.evaluations[1].scores == (1.0, -3.0, -3.0, -3.0)
    assert evaluate(agent, Guide(), DATA) == [1.0, -3.0, -3.0, -3.0]
    assert evaluate(agent, Guide(), DATA, min_score=-1.0) == [1.0, -1.0, -1.0, -1.0]
    Guide.min_score = float("nan")
    with pytest.raises(ConfigError, match="Expected min_score of the guide"):
        train(guide=Guide())


def test_a_lost_instance_never_helps() -> None:
    """This holds even if `min_score` is above the score before."""
    assert compare([0.0, -4.0], [1.0, None]).accepted
    assert not compare([0.0, 0.5], [0.1, None]).accepted
    assert not compare([0.5, -4.0], [0.5, None], min_score=0.0).accepted
    assert not compare([0.5, 0.5, 0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0, None], significance=0.05).accepted


def test_mending_a_crash_is_a_gain() -> None:
    """This holds even if every other score is below zero."""
    crash = Rollout(sample_id=1, failure=Failure(stage="agent", error="KeyError", message="lang"))
    before = [Rollout(sample_id=0, score=-2.0), crash]
    after = [Rollout(sample_id=0, score=-2.0), Rollout(sample_id=1, score=-1.0)]
    assert compare_runs(before, after).accepted
    assert not compare_runs(after, before).accepted
    assert lowest_of([-2.0, None], [-1.0]) == -2.0


def test_a_lost_candidate_is_ranked_below_a_complete_one() -> None:
    """Its lost instances count as the lowest score."""
    whole = with_scores(Candidate(id="a", values={}), [(0, 0.8), (1, 0.8)])
    part = with_scores(Candidate(id="b", values={}), [(0, 1.0)], lost=[1])
    assert mean_score(part) < mean_score(whole)
    assert not compare_on_shared(whole, part).accepted
    found = with_scores(part, [(1, 1.0)])
    assert (found.lost, compare_on_shared(whole, found).accepted) == ((), True)


async def test_best_of_n_never_keeps_a_candidate_that_crashes() -> None:
    """`best_tried` compared the means of the remaining instances."""
    wanted = [Proposal(values={"prompt": "be terse"})]
    assert await best_tried(wanted, Step.of(Fragile(), guide=terse_is_better, samples=DATA)) == []
    assert await best_tried(wanted, Step.of(Fragile(), guide=terse_is_better, samples=DATA[:1])) == wanted


def test_results_without_crashes_are_unchanged() -> None:
    """If everything was judged, nothing is added to the reason."""
    agent = Fragile()
    llm = ScriptedModel(lambda messages: suggest(prompt="terse"))
    result: TrainingResult = AggregatedUpdate(agent, LLMOptimizer(llm=llm), llm=llm, gate=improves_on_batch()).train(
        terse_is_better, DATA[:1]
    )
    assert result.history[0].decision.reason == "mean score 0.9 -> 1 on 1 instances"


def test_a_crash_counts_if_update_is_overridden() -> None:
    """The step's score was the mean of the instances that had not crashed."""

    class Silent(AggregatedUpdate):
        async def update(self, outputs: Any, verbose: Any = False) -> None:
            return None

    agent, llm = Fragile(), ScriptedModel(lambda messages: suggest(prompt="be terse"))
    agent.prompt.data = "be terse"
    result = Silent(agent, LLMOptimizer(llm=llm), llm=llm).train(terse_is_better, DATA, batch_size=4)
    assert result.train_scores == [0.25]


@pytest.mark.parametrize("given", [None, 3.0])
def test_a_crash_was_better_than_the_best_score(given: float | None) -> None:
    """The score of a failure was above the declared maximum, as with swapped limits."""

    class Swapped:
        min_score = 2.0
        max_score = 1.0

        def __call__(self, x: int, output: int, info: int) -> float:
            return 0.5

    trainer = Minibatch(Adder(), LLMOptimizer(llm=ScriptedModel("never asked")))
    with pytest.raises(ConfigError, match=r"Expected min_score.* of at most the maximum 1, got [23]"):
        trainer.train(Swapped(), additions(3), min_score=given)
