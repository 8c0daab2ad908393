"""Data sets of pydantic-evals as data and guide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("pydantic_evals", reason="runs in the environment pydantic-ai of tests/environments.py")

from pydantic_evals import Case, Dataset
from pydantic_evals.evaluators import Contains, EqualsExpected, EvaluationReason, Evaluator, EvaluatorContext

from aggregator.adapters.pydantic_evals import cases
from aggregator.errors import ConfigError, GuideError
from aggregator.simulation import SimulatedModel
from aggregator.training.optimize import aoptimize


@dataclass
class Short(Evaluator[Any, Any, Any]):
    """An evaluator with a score, a reason, and a label."""

    limit: int

    def evaluate(self, context: EvaluatorContext[Any, Any, Any]) -> Any:
        return {
            "short": EvaluationReason(value=min(1.0, self.limit / len(context.output)), reason="shorter is better"),
            "language": "English",
        }


@dataclass
class AsyncRight(Evaluator[Any, Any, Any]):
    async def evaluate(self, context: EvaluatorContext[Any, Any, Any]) -> bool:
        return bool(context.output == context.metadata)


@dataclass
class Label(Evaluator[Any, Any, Any]):
    def evaluate(self, context: EvaluatorContext[Any, Any, Any]) -> str:
        return "good"


def test_cases_are_pairs_of_inputs_and_positions() -> None:
    """By its position the guide finds the case of a rollout, in whatever order they run."""
    data, _ = cases(Dataset(name="t", cases=[Case(inputs="a"), Case(inputs={"b": 1})], evaluators=[EqualsExpected()]))
    assert data == [("a", 0), ({"b": 1}, 1)]


async def test_the_score_is_the_mean_and_the_feedback_holds_reasons_and_expected_outputs() -> None:
    case = Case(inputs="the invoice", expected_output="billing", evaluators=(Contains("bill"),))
    _, guide = cases(Dataset(name="t", cases=[case], evaluators=[EqualsExpected(), Short(limit=5)]))
    found = await guide("the invoice", "bill them !", 0)
    assert found.primary == pytest.approx((1.0 + 0.0 + 5 / 11) / 3)
    assert found.named == {"Contains": 1.0, "EqualsExpected": 0.0, "short": pytest.approx(5 / 11)}
    assert "(shorter is better)" in found.feedback
    assert "language: English" in found.feedback
    assert found.feedback.endswith("Expected 'billing', got 'bill them !'.")


async def test_async_evaluators_see_the_metadata_of_their_case() -> None:
    _, guide = cases(Dataset(name="t", cases=[Case(inputs="x", metadata="y")], evaluators=[AsyncRight()]))
    assert (await guide("x", "y", 0)).primary == 1.0


def test_a_data_set_without_evaluators_is_refused() -> None:
    with pytest.raises(ConfigError, match="got one without"):
        cases(Dataset(name="t", cases=[], evaluators=[EqualsExpected()]))
    with pytest.raises(ConfigError, match="got none for case first"):
        cases(Dataset(name="t", cases=[Case(name="first", inputs="a")]))


async def test_labels_alone_are_not_a_score() -> None:
    """An evaluator that returns a text does not judge: it is a GuideError, not a score of 0."""
    _, guide = cases(Dataset(name="t", cases=[Case(inputs="x")], evaluators=[Label()]))
    with pytest.raises(GuideError, match="Expected a number or a bool from an evaluator, got Label: good"):
        await guide("x", "y", 0)


async def test_an_agent_is_trained_on_a_data_set() -> None:
    from pydantic_ai import Agent

    from aggregator import LLM, trainable
    from aggregator.hosts.pydantic_ai import model

    teams = [("the invoice", "billing"), ("my parcel", "shipping"), ("a lamp", "sales"), ("your invoice", "billing")]
    made = [Case(inputs=ticket, expected_output=team) for ticket, team in teams]
    data, guide = cases(Dataset(name="t", cases=made, evaluators=[EqualsExpected()]))
    async with SimulatedModel(seed=1, wrong_rate=0.0) as server:
        llm = LLM("openai-compatible/simulated-1", base_url=server.base_url)
        agent = trainable(Agent(model(llm), instructions="If no rule applies, answer sales."))
        options: dict[str, Any] = {"run_dir": False, "show": False, "test_dataset": data, "validate": 0}
        result = await aoptimize(agent, data, guide=guide, model=llm, **options)
    assert result.test_scores[0] == 0.25
    assert (result.test_scores[-1] or 0) > 0.25
