"""Minimal agents: a prompt template, and named values with an evaluator."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aggregator import AggregatedUpdate, LLMOptimizer
from aggregator.adapters.agents import as_agent
from aggregator.adapters.template import EvaluatedValues, TemplateAgent, own_verdict
from aggregator.errors import ConfigError
from aggregator.testing import ScriptedModel, suggestion

pytestmark = pytest.mark.filterwarnings("ignore:the (agent|guide) failed:aggregator.errors.TrainingWarning")

ROWS = [{"ticket": "the parcel is late", "team": "shipping"}, {"ticket": "a wrong sum", "team": "billing"}]


def right_team(x: Any, output: str, info: Any) -> tuple[float, str]:
    return float(output == info["team"]), f"the team is {info['team']}"


def route(messages: list[dict[str, Any]]) -> str:
    """A student that answers correctly once the prompt names the teams."""
    text = messages[-1]["content"]
    if "shipping or billing" not in text:
        return "unknown"
    return "shipping" if "parcel" in text else "billing"


def test_a_template_is_trained_on_rows_with_named_columns() -> None:
    """The only parameter is the template; each row fills it, and the guide gets the row."""
    model = ScriptedModel(route)
    agent = as_agent("Classify: {ticket}", model=model)
    optimizer = LLMOptimizer(llm=ScriptedModel(suggestion(prompt="Is it shipping or billing? {ticket}")))
    result = AggregatedUpdate(agent, optimizer, llm=ScriptedModel("TERMINATE")).train(
        right_team, ROWS, batch_size=2, test_dataset=ROWS
    )
    assert (result.test_scores, result.parameters) == ([0.0, 1.0], {"prompt": "Is it shipping or billing? {ticket}"})
    assert model.asked[0] == [{"role": "user", "content": "Classify: the parcel is late"}]


@pytest.mark.parametrize("template", ["Classify the ticket.", "", '{"team": 1}'])
def test_a_template_without_a_placeholder(template: str) -> None:
    """Its output would not depend on the input, so it is refused before anything is paid for."""
    with pytest.raises(ConfigError, match=r"Expected .* a template with a placeholder, as in 'Classify: \{ticket\}'"):
        as_agent(template)


def test_a_row_without_the_templates_column_ends_the_run() -> None:
    """A wrong column name is the user's mistake, and not feedback for the optimizer."""
    agent = TemplateAgent("Classify: {text}", ScriptedModel("x"))
    optimizer = LLMOptimizer(llm=ScriptedModel("TERMINATE"))
    with pytest.raises(ConfigError, match="column 'text'"):
        AggregatedUpdate(agent, optimizer, llm=ScriptedModel("TERMINATE")).train(right_team, ROWS)


def longer(values: dict[str, Any], row: dict[str, Any]) -> tuple[float, str]:
    return float(min(values["k"] / 4, 1.0)), "use more"


async def longer_async(values: dict[str, Any], row: dict[str, Any]) -> float:
    return float(min(values["k"] / 4, 1.0))


@pytest.mark.parametrize("evaluator", [longer, longer_async])
def test_named_values_are_trained_with_an_evaluator(evaluator: Any) -> None:
    """The evaluator, sync or async, is agent and guide in one; values keep their types."""
    agent = as_agent({"k": 1, "style": "plain"}, evaluator=evaluator)
    optimizer = LLMOptimizer(llm=ScriptedModel(json.dumps({"suggestion": {"k": "4"}})))
    result = AggregatedUpdate(agent, optimizer, llm=ScriptedModel("TERMINATE")).train(own_verdict, ROWS, batch_size=2)
    assert (result.train_scores, result.parameters) == ([0.25], {"k": 4, "style": "plain"})


@pytest.mark.parametrize(
    ("values", "evaluator", "message"),
    [
        ({}, longer, "Expected named seed values"),
        ({1: "a"}, longer, "Expected named seed values"),
        ({"k": 1}, None, r"Expected an evaluator \(values, row\)"),
        ({"k": 1}, lambda values: 1.0, r"Expected an evaluator \(values, row\)"),
    ],
)
def test_named_values_without_an_evaluator(values: Any, evaluator: Any, message: str) -> None:
    """A mapping needs names and an evaluator of two arguments."""
    with pytest.raises(ConfigError, match=message):
        as_agent(values, evaluator=evaluator)


def test_an_evaluator_that_raises_is_feedback() -> None:
    """Its error is the agent's failure, with the message."""

    def fails(values: dict[str, Any], row: Any) -> float:
        raise ValueError("no such row")

    agent = EvaluatedValues({"k": 1}, fails)
    optimizer = LLMOptimizer(llm=ScriptedModel("TERMINATE"))
    result = AggregatedUpdate(agent, optimizer, llm=ScriptedModel("TERMINATE")).train(own_verdict, ROWS[:1])
    assert [(record.stage, record.message) for record in result.failures] == [("agent", "no such row")]
