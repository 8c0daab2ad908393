"""Invalid parts are refused at construction, before the first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel

from aggregator import AggregatedUpdate, ConfigError, LLMMerge, LLMOptimizer, Trainer
from aggregator.gates import improves_on_batch, improves_on_validation
from aggregator.rules import chain, majority, top_k, tree_merge

DATA = [(1, 2)]
SILENT = ScriptedModel("TERMINATE")


def trainer(agent: Any = None, optimizer: Any = None, **options: Any) -> AggregatedUpdate:
    return AggregatedUpdate(agent or Adder(), optimizer or LLMOptimizer(llm=SILENT), llm=SILENT, **options)


async def of_old(current: Any, proposals: Any, *, stepsize: float) -> Any:
    """A rule of the old form, without the step as an argument."""
    return proposals


async def gate_of_old(before: Any, after: Any, batch: Any) -> Any:
    """A gate of the old form, without the step as an argument."""


@pytest.mark.parametrize("rule", [5, "majority", top_k, chain, LLMMerge, lambda proposals: proposals, of_old])
@pytest.mark.parametrize("use", [lambda rule: trainer(rule=rule), lambda rule: chain(majority, rule), tree_merge])
def test_an_invalid_rule(use: Callable[[Any], Any], rule: Any) -> None:
    """It raised a TypeError after the first minibatch had been paid for."""
    with pytest.raises(ConfigError, match=r"Expected a rule, async \(proposals, step\) -> proposals"):
        use(rule)


@pytest.mark.parametrize(
    "gate", [5, "always", improves_on_batch, improves_on_validation, lambda values: True, gate_of_old]
)
def test_an_invalid_gate(gate: Any) -> None:
    """It raised a TypeError after the first minibatch had been paid for."""
    with pytest.raises(ConfigError, match=r"Expected a gate, async \(before, after, step\) -> Decision"):
        trainer(gate=gate)


@pytest.mark.parametrize("optimizer", [None, "openai/gpt-4o-mini", LLMOptimizer, SILENT])
def test_an_invalid_optimizer(optimizer: Any) -> None:
    """The proposal of every instance failed, and the run learned nothing."""
    with pytest.raises(ConfigError, match="Expected an optimizer such as LLMOptimizer"):
        AggregatedUpdate(Adder(), optimizer, llm=SILENT)


def test_an_overridden_forward_needs_no_optimizer(adder: Adder) -> None:
    """A subclass that overrides `forward` may have none."""

    class Fixed(AggregatedUpdate):
        def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
            return {"amount": 7}

    Fixed(adder, None, llm=SILENT).train(lambda x, output, info: 0.0, DATA)
    assert adder.amount.data == 7


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        (Adder, r"an agent, got the class Adder; make an instance, Adder\(\)\. An agent is a Module; a template"),
        ("agent", r"an agent, got 'agent', a text without a placeholder\. An agent is a Module; a template"),
        (len, r"an agent, got <built-in function len>\. An agent is a Module; a template"),
        ({"prompt": "x"}, r"an evaluator \(values, row\)"),  # named values without a guide
    ],
)
def test_an_invalid_agent(agent: Any, expected: str) -> None:
    """A class instead of its instance, or a bare function, raised an AttributeError from inside."""
    with pytest.raises(ConfigError, match=f"^Expected {expected}"):
        trainer(agent)


@pytest.mark.parametrize("threshold", ["0.1", None, float("nan"), True])
@pytest.mark.parametrize("gate", [improves_on_batch, lambda threshold: improves_on_validation(DATA, threshold)])
def test_an_invalid_threshold(gate: Callable[[Any], Any], threshold: Any) -> None:
    """NaN refused every update; text failed after the first minibatch had been paid for."""
    with pytest.raises(ConfigError, match="Expected threshold to be a finite number"):
        gate(threshold)


@pytest.mark.parametrize("guide", [lambda x, output: 1.0, None, "exact", float])
def test_a_guide_that_takes_other_arguments(guide: Any) -> None:
    """It failed after the agent had run on every instance."""
    with pytest.raises(ConfigError, match=r"Expected a guide: a callable \(x, output, info\)"):
        trainer().train(guide, DATA)


class PrintsOnly:
    def log(self, name: str, data: Any, step: int) -> None: ...


@pytest.mark.parametrize("logger", [5, print, PrintsOnly()])
def test_an_invalid_logger(logger: Any) -> None:
    """It failed after the first step had been paid for."""
    with pytest.raises(ConfigError, match=r"Expected a logger that has log\(name, data, step, \*\*kwargs\)"):
        trainer(logger=logger)


@pytest.mark.parametrize("observers", [print, [3], [lambda: None]])
def test_invalid_observers(observers: Any) -> None:
    """They failed after the first step had been paid for."""
    with pytest.raises(ConfigError, match=r"Expected observers=\[\.\.\.\], each a callable that takes a StepReport"):
        trainer(observers=observers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_score": "zero"}, "Expected min_score to be a finite number"),
        ({"min_score": float("nan")}, "Expected min_score to be a finite number"),
        ({"max_failure_ratio": "half"}, r"Expected max_failure_ratio in \[0, 1\]"),
        ({"run_dir": ""}, "Expected run_dir to be the path of a folder"),
        ({"run_dir": 3}, "Expected run_dir to be the path of a folder"),
        ({"run_dir": __file__}, "Expected run_dir to be a folder, got the file"),
    ],
)
def test_arguments_that_failed_late_or_with_a_type_error(arguments: dict[str, Any], message: str) -> None:
    """An empty run_dir filled the current folder; a min_score of text became an instance's score."""
    with pytest.raises(ConfigError, match=message):
        trainer().train(lambda x, output, info: 0.0, DATA, **arguments)


@pytest.mark.parametrize("memory_size", [-1, "5", True, 1.0])
def test_an_invalid_memory_size(memory_size: Any) -> None:
    """-1 recalled nothing; text failed on every instance."""
    with pytest.raises(ConfigError, match="Expected memory_size to be an int of at least 0"):
        LLMOptimizer(llm=SILENT, memory_size=memory_size)


@pytest.mark.parametrize("budget", [5, "5 USD", {"usd": 5}])
def test_an_invalid_budget(budget: Any) -> None:
    """It lost every call with an AttributeError from inside."""
    with pytest.raises(ConfigError, match=r"Expected budget=Budget\(usd=\.\.\., tokens="):
        trainer(budget=budget)


class OfOld:
    """An optimizer of the old form, without the step as an argument."""

    async def propose(self, rollout: Any, parameters: Any, *, history: Any = ()) -> Any: ...


def test_an_optimizer_of_the_old_form_is_refused_with_the_new_signature() -> None:
    """`(rollout, parameters, *, history)` has two positional arguments too, and would have failed on every instance."""
    with pytest.raises(ConfigError, match=r"one with async propose\(rollouts, step\), got"):
        trainer(optimizer=OfOld())


@pytest.mark.parametrize("checks", [5, "short", [5], [lambda before, after: None], [ConfigError]])
def test_invalid_checks(checks: Any) -> None:
    """They are refused at construction."""
    with pytest.raises(ConfigError, match="Expected (checks=|a check, )"):
        trainer(checks=checks)


@pytest.mark.parametrize("propose_per", ["minibatch", None, 1])
def test_an_invalid_propose_per(propose_per: Any) -> None:
    """The error lists the two choices."""
    with pytest.raises(ConfigError, match="Expected propose_per 'instance' or 'batch'"):
        Trainer(Adder(), LLMOptimizer(llm=SILENT), propose_per=propose_per)
