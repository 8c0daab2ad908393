"""The best values are chosen by the validation set; the test set is only measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_fakes import ScriptedModel, suggest

from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import BudgetExceededError, ConfigError, ParameterError
from aggregator.llm.budget import Budget
from aggregator.training.algorithms import AggregatedUpdate
from aggregator.training.proposers import LLMOptimizer

DATA = [("q", "no")] * 6
TEST = [("t", "no")]


class Says(Module):
    """Answers with the last word of its prompt."""

    def __init__(self, start: str = "Say yes.") -> None:
        self.prompt = ParameterNode(start)
        self.runs: list[tuple[str, str]] = []

    def forward(self, x: str) -> str:
        self.runs.append((x, self.prompt.data))
        return self.prompt.data.split()[-1].strip(".")


def exact(x: str, output: str, info: str) -> tuple[float, str]:
    return float(output == info), "fb"


def up_and_down(messages: list[dict[str, Any]]) -> str:
    """0 -> 1 -> 0: the best value is in the middle."""
    shown = messages[-1]["content"].split("#Transcript")[0]
    return suggest(prompt="Say no." if "Say yes" in shown else "Say worse.")


def train(agent: Says, **options: Any) -> Any:
    llm = ScriptedModel(up_and_down)
    trainer = AggregatedUpdate(agent, LLMOptimizer(llm=llm), llm=llm, budget=options.pop("budget", None))
    return trainer, trainer.train(exact, DATA, **{"batch_size": 2, **options})


def test_the_best_values_are_in_the_agent_and_in_its_files(tmp_path: Path) -> None:
    """Before, it held the last values, and no public method stored the best ones."""
    agent = Says()
    trainer, result = train(agent, validate_dataset=DATA, test_dataset=TEST, run_dir=tmp_path / "run")
    assert result.validation_scores == [one.score for one in result.validations] == [0.0, 1.0, 0.0, 0.0]
    assert result.parameters == result.best_parameters == {"prompt": "Say no."}
    assert (result.last_parameters, result.kept, result.best_step) == ({"prompt": "Say worse."}, "best", 1)
    assert agent.prompt.data == "Say no."
    written = json.loads((tmp_path / "run" / "parameters.json").read_bytes())
    assert (written["parameters"], written["values"]) == ({"prompt": "Say no."}, "best")
    assert [update["step"] for update in result.provenance["prompt"]] == [0]  # not the later, worse update
    assert "validation score (used for selection) 0 -> 0" in str(result)
    assert "kept: the best values, after 1 step" in str(result)
    assert trainer.restore("last") == {"prompt": "Say worse."}
    agent.save(tmp_path / "last.json")
    assert json.loads((tmp_path / "last.json").read_bytes())["values"] == "last"
    assert trainer.restore() == {"prompt": "Say no."}
    assert agent.prompt.data == "Say no."
    agent.prompt.data = "Say something else."
    agent.save(tmp_path / "other.json")
    assert "values" not in json.loads((tmp_path / "other.json").read_bytes())
    Says().load(tmp_path / "last.json")


def test_without_a_validation_set_the_last_values_are_kept() -> None:
    """This is the seed's behaviour; the test set chose `best_parameters`."""
    agent = Says()
    _, result = train(agent, test_dataset=TEST)
    assert result.test_scores == [0.0, 1.0, 0.0, 0.0]
    assert result.parameters == result.best_parameters == result.last_parameters == {"prompt": "Say worse."}
    assert (agent.prompt.data, result.kept) == ("Say worse.", "last")


def test_the_last_values_were_saved_as_the_best(tmp_path: Path) -> None:
    """Without a validation set none were chosen, so that `restore("best")` restores the last values, and says so."""
    agent = Says()
    trainer, _ = train(agent, test_dataset=TEST)
    assert trainer.restore("best") == {"prompt": "Say worse."}
    agent.save(tmp_path / "restored.json")
    assert json.loads((tmp_path / "restored.json").read_bytes())["values"] == "last"


def test_the_last_values_can_be_asked_for() -> None:
    """`keep="last"` works with a validation set; any other value is refused."""
    agent = Says()
    trainer, result = train(agent, validate_dataset=DATA, keep="last")
    assert (agent.prompt.data, result.kept, result.best_parameters) == ("Say worse.", "last", {"prompt": "Say no."})
    assert trainer.restore("best") == {"prompt": "Say no."}
    with pytest.raises(ConfigError, match="Expected 'best' or 'last', got 'first'"):
        trainer.restore("first")
    with pytest.raises(ConfigError, match="Expected keep 'best' or 'last', got 'first'"):
        train(Says(), validate_dataset=DATA, keep="first")
    with pytest.raises(ConfigError, match="Expected validate_dataset with keep='best'"):
        train(Says(), test_dataset=TEST, keep="best")
    with pytest.raises(ConfigError, match="call train first"):
        AggregatedUpdate(agent, LLMOptimizer(llm=ScriptedModel("")), llm=ScriptedModel("")).restore()


def test_the_baseline_competes_and_ties_keep_the_earlier_values() -> None:
    """Of two prompts with the same score the one before training is kept."""
    agent = Says("Say no.")
    _, result = train(agent, validate_dataset=DATA)
    assert (result.best_step, agent.prompt.data) == (0, "Say no.")
    tied = Says()
    _, result = train(tied, validate_dataset=[("v", "something else")])
    assert (result.best_step, tied.prompt.data) == (0, "Say yes.")


def test_values_that_crash_are_not_the_best() -> None:
    """They were better on the remaining instances."""

    class Crashes(Says):
        def forward(self, x: str) -> str:
            if "no" in self.prompt.data and x.startswith("v") and x != "v0":
                raise KeyError(x)
            return super().forward(x)

    agent = Crashes()
    llm = ScriptedModel(lambda messages: suggest(prompt="Say no."))
    validation = [("v0", "no"), ("v1", "yes"), ("v2", "yes")]
    with pytest.warns(Warning, match="failed 2 times"):
        result = AggregatedUpdate(agent, LLMOptimizer(llm=llm), llm=llm).train(
            exact, DATA[:1], validate_dataset=validation
        )
    assert (result.best_step, agent.prompt.data) == (0, "Say yes.")
    assert [one.score for one in result.validations] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]


def test_unchanged_values_are_validated_once() -> None:
    """A step that changes nothing runs no validation."""
    agent = Says("Say no.")
    llm = ScriptedModel("TERMINATE")
    AggregatedUpdate(agent, LLMOptimizer(llm=llm), llm=llm).train(
        exact, DATA, batch_size=2, validate_dataset=[("v", "no")]
    )
    assert [x for x, _ in agent.runs if x == "v"] == ["v"]


def test_a_resumed_run_continues_from_the_last_values(tmp_path: Path) -> None:
    """It ends with the same bytes as an unbroken run, although the agent held the best values in between."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options: dict[str, Any] = {"validate_dataset": DATA, "num_epochs": 2}
    _, expected = train(Says(), run_dir=whole, **options)
    agent = Says()
    with pytest.raises(BudgetExceededError) as caught:
        train(agent, run_dir=broken, budget=Budget(calls=5), **options)
    assert caught.value.result is not None
    assert caught.value.result.last_parameters == {"prompt": "Say worse."}
    assert agent.prompt.data == "Say no."
    _, result = train(Says(), run_dir=broken, resume=True, **options)
    assert result == expected
    for name in ("result.json", "parameters.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_values_are_applied_all_or_none() -> None:
    """An unknown parameter name changes nothing."""
    agent = Says()
    with pytest.raises(ParameterError, match="Expected values of the parameters prompt of Says, got 'other'"):
        agent.apply({"prompt": "new", "other": 1})
    assert agent.prompt.data == "Say yes."
    agent.apply({"prompt": "new"})
    assert agent.prompt.data == "new"
