"""Several objectives: the scores that a guide names, and what the library measures of every rollout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from training_fakes import Adder, ScriptedModel, additions, first_suggestion, suggest

from aggregator import LLM, AggregatedUpdate, cassette
from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError, GuideError
from aggregator.gates import improves_on_batch, improves_on_validation
from aggregator.guides import Scores
from aggregator.guides.calling import ask_guide, judge
from aggregator.llm.ledger import Price
from aggregator.llm.models import as_model
from aggregator.optimizers import LLMOptimizer
from aggregator.portal import call
from aggregator.records import Choice, Completion, Failure, Message, Rollout, Usage
from aggregator.testing import FakeTransport
from aggregator.testing.fakes import text_reply
from aggregator.training.batches import samples
from aggregator.training.gates import compare_runs
from aggregator.training.step import Step


def graded(x: int, output: int, info: int) -> Scores:
    """Scores correctness first; a higher output is more polite."""
    return Scores(float(output == info), {"politeness": output / 10}, f"got {output}")


async def test_a_guide_returns_several_scores() -> None:
    """The primary score is the score, the others have names; `judge` returns a pair."""
    assert await ask_guide(graded, 1, 2, 2) == Scores(1.0, {"politeness": 0.2}, "got 2")
    assert await judge(graded, 1, 2, 2) == (1.0, "got 2")


@pytest.mark.parametrize(
    "named", [{"a": float("nan")}, {"a": "high"}, {"": 1.0}, {1: 1.0}, ["a"], {"a": None}, {"a": float("inf")}]
)
async def test_an_invalid_named_score_is_a_failure_of_the_guide(named: Any) -> None:
    """This is as for the primary score."""
    with pytest.raises(GuideError):
        await ask_guide(lambda x, output, info: Scores(1.0, named), 1, 2, 2)


def run(agent: Any, guide: Any = graded) -> Rollout:
    step = Step.of(agent, guide=guide, samples=[(1, 2)])
    return call(step.evaluate, step.values, step.samples)[0]


def test_a_rollout_carries_named_scores_and_its_length() -> None:
    """An agent without calls has no cost and no milliseconds."""
    found = run(Adder())
    assert (found.scores, found.score) == ({"length": 1.0, "politeness": 0.2}, 1.0)


class Talker(Module):
    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.prompt = ParameterNode("Say yes.")

    async def forward(self, x: Any) -> str:
        await self.llm.complete([{"role": "user", "content": self.prompt.data}])
        return str((await self.llm.complete([{"role": "user", "content": str(x)}])).text)


def test_cost_and_milliseconds_are_those_of_the_agents_calls() -> None:
    """They are summed over the calls; this process's clock is not used."""

    async def reply(messages: Any, **options: Any) -> Completion:
        message = Message(content="yes")
        return Completion(choices=(Choice(message=message),), usage=Usage(cost=0.25), milliseconds=2.0004)

    found = run(Talker(as_model(reply)), lambda x, output, info: 1.0)
    assert found.scores == {"cost": 0.5, "length": 3.0, "milliseconds": 4.0}


def test_an_unknown_cost_is_not_filled_in() -> None:
    """One call without a price makes the sum unknown."""
    costs = iter([0.25, None])

    async def reply(messages: Any, **options: Any) -> Completion:
        return Completion(choices=(Choice(message=Message(content="yes")),), usage=Usage(cost=next(costs)))

    assert "cost" not in run(Talker(as_model(reply)), lambda x, output, info: 1.0).scores


def rollouts(**named: list[float]) -> list[Rollout]:
    (values,) = named.values()
    (name,) = named
    return [Rollout(sample_id=i, score=1.0, scores={name: value}) for i, value in enumerate(values)]


def test_a_gate_compares_the_chosen_score() -> None:
    """The primary score falls, politeness rises: each gate decides by its own score."""
    step = Step.of(Adder(), guide=graded, samples=additions(1))
    gates = (improves_on_validation(additions(1)), improves_on_validation(additions(1), score="politeness"))
    found = [call(gate, {"amount": 1}, {"amount": 3}, step) for gate in gates]
    assert [decision.accepted for decision in found] == [False, True]
    assert found[1].reason == "politeness: mean score 0.25 -> 0.45 on 4 instances"
    assert call(improves_on_batch(score="politeness"), {"amount": 1}, {"amount": 3}, step).accepted


@pytest.mark.parametrize("name", ["cost", "length", "milliseconds"])
def test_lower_cost_is_better(name: str) -> None:
    """A gate on cost accepts what costs less."""
    cheap, dear = rollouts(**{name: [1.0, 2.0]}), rollouts(**{name: [2.0, 2.0]})
    assert compare_runs(dear, cheap, score=name).accepted
    assert not compare_runs(cheap, dear, score=name).accepted


def test_a_crash_is_not_cheap() -> None:
    """An agent that fails costs little, and still gets the worst cost of both sides."""
    crash = Failure(stage="agent", error="ValueError", message="no", sample_id=1)
    before = rollouts(cost=[2.0, 2.0])
    after = [before[0], Rollout(sample_id=1, score=0.0, scores={"cost": 0.0}, failure=crash)]
    assert not compare_runs(before, after, score="cost").accepted


def test_an_unknown_score_is_an_error_that_lists_the_names() -> None:
    """A misspelt name would silently refuse every update."""
    step = Step.of(Adder(), guide=graded, samples=additions(1))
    gate = improves_on_validation(additions(1), score="polite")
    with pytest.raises(ConfigError, match="length, politeness"):
        call(gate, {"amount": 1}, {"amount": 3}, step)


@pytest.mark.parametrize("score", ["", 3])
def test_an_invalid_score_name_is_refused_first(score: Any) -> None:
    """The error is raised before a run is paid for."""
    with pytest.raises(ConfigError, match="name of a score"):
        improves_on_batch(score=score)


def test_a_run_trains_by_a_named_score() -> None:
    """This covers guide, evaluation, gate and decision."""
    merged = ScriptedModel(first_suggestion)
    gate = improves_on_validation(samples_of(), score="politeness")
    trainer = AggregatedUpdate(Adder(), LLMOptimizer(llm=ScriptedModel(suggest(amount=5))), llm=merged, gate=gate)
    result = trainer.train(graded, additions(1), batch_size=4)
    assert (result.parameters["amount"], result.history[0].decision.accepted) == (5, True)


def samples_of() -> list[tuple[Any, Any]]:
    return [(sample.x, sample.info) for sample in samples(additions(1))]


def test_a_replay_has_the_cost_and_the_milliseconds_of_the_recording(tmp_path: Path) -> None:
    """A gate on either decides the same on every machine."""

    prices = {"openai/gpt-4o-mini": Price(input=1.0, output=1.0)}
    found = []
    for mode in ("all", "none"):
        transport = FakeTransport(lambda _: replace(text_reply("yes"), milliseconds=12.3456))
        llm = LLM("openai/gpt-4o-mini", api_key="none", transport=transport, prices=prices)
        with cassette(tmp_path / "calls.yaml", mode=mode):
            found.append(run(Talker(llm), lambda x, output, info: 1.0).scores)
    assert found[0] == found[1]
    assert {"cost", "length", "milliseconds"} == found[0].keys()
    assert found[0]["milliseconds"] == 24.692
