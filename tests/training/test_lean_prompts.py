"""Prompts for small models: values first, short reasons, configurable limits; sampling options of merge and judge."""

from __future__ import annotations

import json
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, section, suggest

from aggregator import AggregatedUpdate, ConfigError, LLMJudge, LLMOptimizer, Module, ParameterNode
from aggregator.portal import call
from aggregator.training.merge import LLMMerge
from aggregator.training.prompts import LEAN_PROPOSER_SYSTEM_PROMPT


def schema_of(model: ScriptedModel) -> dict[str, Any]:
    schema: dict[str, Any] = model.options[0]["response_format"]["json_schema"]["schema"]
    return schema


def test_a_small_model_writes_the_values_first() -> None:
    """The lean schema puts the values before one text of reasons, has no nulls, and requires every value."""
    model = ScriptedModel(json.dumps({"suggestion": {"amount": 3, "label": "sum"}, "reasoning": "too small"}))
    agent = Adder()
    trainer = AggregatedUpdate(agent, LLMOptimizer(llm=model, style="lean"), llm=model)
    result = trainer.train(exact, additions(3, 1))
    schema = schema_of(model)
    assert list(schema["properties"]) == ["suggestion", "reasoning"]
    assert schema["properties"]["suggestion"]["required"] == ["amount", "label"]
    assert "null" not in json.dumps(schema)
    assert model.asked[0][0]["content"] == LEAN_PROPOSER_SYSTEM_PROMPT
    assert (agent.amount.data, result.history[0].update) == (3, {"amount": 3})
    assert result.history[0].reasoning == "too small"


def test_a_type_that_strict_mode_cannot_state() -> None:
    """A dict with arbitrary keys turns strict mode off; then values may be left out."""

    class Table(Module):
        def __init__(self) -> None:
            self.table = ParameterNode({"a": 1})

        async def forward(self, x: int) -> int:
            return x

    model = ScriptedModel("TERMINATE")
    AggregatedUpdate(Table(), LLMOptimizer(llm=model, style="lean"), llm=model).train(exact, additions(3, 1))
    assert model.options[0]["response_format"]["json_schema"]["strict"] is False
    assert schema_of(model)["properties"]["suggestion"]["required"] == []


@pytest.mark.parametrize("style", ["full", "lean"])
def test_how_much_of_output_and_transcript_is_shown(style: Any) -> None:
    """Both limits are in characters, and the prompt says how much was left out."""

    class Wordy(Adder):
        async def forward(self, x: int) -> Any:
            return "w" * 100

    model = ScriptedModel("TERMINATE")
    optimizer = LLMOptimizer(llm=model, style=style, output_limit=10, transcript_limit=5)
    AggregatedUpdate(Wordy(), optimizer, llm=model).train(exact, additions(3, 1))
    assert section(model.asked[0], "Output") == "w" * 10 + " [... 90 more characters]"


@pytest.mark.parametrize("options", [{"style": "short"}, {"output_limit": 0}, {"transcript_limit": True}])
def test_an_invalid_style_or_limit(options: dict[str, Any]) -> None:
    """It is refused at construction."""
    with pytest.raises(ConfigError, match="style|limit"):
        LLMOptimizer(llm=ScriptedModel("x"), **options)


def test_merge_and_judge_accept_temperature_and_seed() -> None:
    """The options reach the model; by default nothing is sent, as before."""
    merge = ScriptedModel(suggest(amount=3))
    optimizer = ScriptedModel(suggest(amount=3), suggest(amount=4))
    rule = LLMMerge(merge, temperature=0.0, seed=7)
    trainer = AggregatedUpdate(Adder(), LLMOptimizer(llm=optimizer), rule=rule)
    trainer.train(exact, additions(3, 2), batch_size=2, max_concurrency=1)
    assert (merge.options[0]["temperature"], merge.options[0]["seed"]) == (0.0, 7)
    judge = ScriptedModel('{"score": 1, "feedback": "good"}')
    call(LLMJudge(judge, temperature=0.5, seed=3), "x", "output")
    call(LLMJudge(judge), "x", "output")
    assert (judge.options[0]["temperature"], judge.options[0]["seed"]) == (0.5, 3)
    assert {"temperature", "seed"} & judge.options[1].keys() == set()
