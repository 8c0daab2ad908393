"""`optimize`: one call from a prompt, values, a function or an agent to trained values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, exact, from_feedback, suggest

from aggregator import ConfigError, LLMOptimizer, aoptimize, optimize
from aggregator.rules import majority

ROWS = [{"ticket": f"the parcel {i} is late", "team": "shipping"} for i in range(10)]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def right_team(x: Any, output: str, info: Any) -> tuple[float, str]:
    return float(output == info["team"]), f"the team is {info['team']}"


def model_for(template: str) -> ScriptedModel:
    """One model for all roles:

    a student that obeys once it is given the team, and an optimizer that proposes a template.
    """

    def reply(messages: list[dict[str, Any]]) -> str:
        if messages[0]["role"] == "system":
            return suggest(prompt=template)
        return "shipping" if "Answer shipping" in messages[-1]["content"] else "unknown"

    return ScriptedModel(reply)


def test_a_prompt_template_is_trained_in_one_call(capsys: pytest.CaptureFixture[str]) -> None:
    """Validation rows are split off, the plan is shown first, and the run has its own folder."""
    model = model_for("Answer shipping. {ticket}")
    result = optimize("Classify: {ticket}", ROWS, guide=right_team, model=model, observers=())
    assert result.parameters == {"prompt": "Answer shipping. {ticket}"}
    assert [len(report.sample_ids) for report in result.history] == [4, 4]
    assert capsys.readouterr().err.startswith("2 steps, ")
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{4}", folder.name)
    assert {"result.json", "parameters.json"} <= {path.name for path in folder.iterdir()}


def test_each_call_has_a_new_folder() -> None:
    """Two calls in the same second get two folders."""
    for _ in range(2):
        optimize(lambda x, *, k=1: x + k, [(i, i) for i in range(4)], guide=exact, model=ScriptedModel("TERMINATE"))
    assert len(list(Path("runs").iterdir())) == 2


def test_the_best_values_of_the_validation_part_are_kept() -> None:
    """A later update with a lower validation score is not kept."""
    model = ScriptedModel(lambda messages: suggest(k=3 if '"value": 1,' in messages[-1]["content"] else 9))

    def add(x: int, *, k: int = 1) -> int:
        return x + k

    data = [(i, i + 3) for i in range(10)]
    result = optimize(add, data, guide=exact, model=model, rule=majority, batch_size=4, run_dir=False)
    assert [report.update for report in result.history] == [{"k": 3}, {"k": 9}]
    assert add(1) == 4
    assert not Path("runs").exists()


def test_named_values_with_an_evaluator() -> None:
    """The guide of a mapping is its evaluator; the result has the values in their types."""

    def evaluator(values: dict[str, Any], row: Any) -> tuple[float, str]:
        return min(values["k"], 4) / 4, "use more"

    model = ScriptedModel(suggest(k=4))
    result = optimize({"k": 1}, ROWS, guide=evaluator, model=model, run_dir=False)
    assert result.parameters == {"k": 4}


def test_a_module_and_another_optimizer() -> None:
    """The agent itself has the trained values; instances at the declared maximum get no proposals."""
    agent, asked = Adder(3), ScriptedModel(from_feedback)
    data = [(i, i + 3) for i in range(6)]
    result = optimize(agent, data, guide=exact, optimizer=LLMOptimizer(llm=asked), max_score=1.0, run_dir=False)
    assert (agent.amount.data, asked.asked) == (3, [])
    assert result.parameters["amount"] == 3


async def test_the_async_face() -> None:
    """`await aoptimize(...)` does the same."""
    agent = Adder()
    data = [(i, i + 3) for i in range(6)]
    result = await aoptimize(agent, data, guide=exact, model=ScriptedModel(from_feedback), run_dir=False)
    assert (agent.amount.data, result.parameters["amount"]) == (3, 3)


def test_the_same_seed_gives_the_same_run() -> None:
    """Split, batches and result follow from data and seed."""
    results = [
        optimize(
            Adder(), [(i, i + 3) for i in range(9)], guide=exact, model=ScriptedModel(from_feedback), run_dir=False
        )
        for _ in range(2)
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("thing", "data", "options", "message"),
    [
        ("no placeholder", ROWS, {}, "Expected an agent"),
        (object(), ROWS, {}, "Expected an agent"),
        ("Classify: {ticket}", [], {}, "in data, got none"),
        ("Classify: {ticket}", ROWS, {"validate": 1.0}, r"validate to be a share in \[0, 1\)"),
        ("Classify: {ticket}", ROWS, {"validate": -0.1}, "validate"),
        ("Classify: {ticket}", ROWS[:1], {}, "at least 2 rows"),
        ("Classify: {ticket}", ROWS, {"batch_size": 0}, "batch_size"),
        ({"k": 1}, ROWS, {"guide": right_team}, r"Expected an evaluator \(values, row\)"),
    ],
)
def test_invalid_arguments(thing: Any, data: Any, options: dict[str, Any], message: str) -> None:
    """They are refused before anything is paid for, and no folder is left."""
    model = ScriptedModel("TERMINATE")
    with pytest.raises(ConfigError, match=message):
        optimize(thing, data, **{"guide": right_team, "model": model, **options})
    assert model.asked == []
