"""Defects of Trace's trainer that no other test file covers; `tests/test_requirements.py` lists all of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, from_feedback, section, suggest

from aggregator import AggregatedUpdate, LLMOptimizer, Module, bundle, evaluate
from aggregator.errors import TrainingError, TrainingWarning
from aggregator.llm.client import LLM
from aggregator.simulation import SimulatedModel
from aggregator.training.merge import LLMMerge
from aggregator.training.prompts import AGGREGATOR_SYSTEM_PROMPT, PROPOSER_SYSTEM_PROMPT, REPLY_FORMAT

pytestmark = pytest.mark.filterwarnings("ignore:the (agent|guide) failed:aggregator.errors.TrainingWarning")

ROOT = Path(__file__).parents[2]


def scripted(agent: Any, *replies: Any, aggregator: Any = "never asked", **options: Any) -> AggregatedUpdate:
    optimizer = LLMOptimizer(llm=ScriptedModel(*(replies or [from_feedback])))
    return AggregatedUpdate(agent, optimizer, llm=ScriptedModel(aggregator), **options)


@pytest.mark.requirement("Trace's defect 4: use_asyncio did nothing")
@pytest.mark.parametrize(("use_asyncio", "at_once"), [(True, 8), (False, 1)])
def test_use_asyncio_alone_makes_it_concurrent(use_asyncio: bool, at_once: int) -> None:
    """Trace ignored the argument: without num_threads everything was sequential."""
    running, most = 0, 0

    def jitter() -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        return 5

    def reply(_: Any) -> str:
        nonlocal running
        running -= 1
        return "TERMINATE"

    async def guide(x: int, output: int, info: int) -> tuple[float, str]:  # not in a thread
        return exact(x, output, info)

    optimizer = LLMOptimizer(llm=ScriptedModel(reply, jitter=jitter))
    run = AggregatedUpdate(Adder(), optimizer, use_asyncio, llm=ScriptedModel("x"))
    run.train(guide, additions(5, count=8), batch_size=8)
    assert most == at_once


@pytest.mark.requirement("Trace's defect 6: operations shared state between threads, and forward ignored its agent")
def test_forward_runs_the_agent_it_is_given() -> None:
    """Trace's forward ignored its `agent` argument and used the trainer's own agent for run and prompt."""
    own, other = Adder(1), Adder(10)
    assert scripted(own).forward(other, 0, exact, 5).values == {"amount": 5}
    assert (own.amount.data, other.amount.data) == (1, 10)


class Operated(Adder):
    """Has an operation that is not trained, which Trace could not pickle."""

    @bundle()
    def shift(self, x: int) -> int:
        """Add the amount."""
        return x + self.amount.data

    async def forward(self, x: int) -> int:
        return self.shift(x)


@pytest.mark.requirement(
    "Trace: train(save_frequency, save_path)",
    "Trace's defect 11: agents with operations could not be saved",
)
def test_an_agent_with_operations_is_saved_while_it_is_trained(tmp_path: Path) -> None:
    """It is saved to save_path every save_frequency steps, and an agent of the same class loads it."""
    path = tmp_path / "agent.json"
    scripted(Operated()).train(exact, additions(5), save_frequency=1, save_path=str(path))
    production = Operated()
    production.load(path)
    assert production.amount.data == 5
    assert [file.name for file in tmp_path.iterdir()] == ["agent.json"]


@pytest.mark.requirement("Trace: OptoPrime(log)", "Trace's defect 12: replies that change nothing were not logged")
def test_replies_without_a_change_are_in_the_journal(tmp_path: Path) -> None:
    """A TERMINATE is paid for like any other reply; Trace left it out of its log."""
    with SimulatedModel() as server:
        llm = LLM("openai-compatible/simulated-1", base_url=server.base_url)
        run = AggregatedUpdate(Adder(), LLMOptimizer(llm=llm), llm=llm)
        run.train(lambda x, output, info: (1.0, "Correct."), additions(1), run_dir=tmp_path / "run")
        asked = server.calls["optimizer"]
    journal = (tmp_path / "run" / "journal.yaml").read_text()
    assert asked == 4
    assert journal.count('"request":') == asked


@pytest.mark.requirement("Trace's defect 19: code that does not compile was installed")
def test_aggregated_code_that_does_not_compile_is_not_installed() -> None:
    """The aggregator's answer is checked like a proposal; a refused one is a failure, not an update."""

    class Coded(Module):
        @bundle(trainable=True)
        def code(self, x: int) -> int:
            return x

        async def forward(self, x: int) -> int:
            return self.code(x)

    agent = Coded()
    before = agent.parameters()[0].data
    good = iter(range(9))

    def proposal(_: Any) -> str:
        return suggest(code__code=f"def code(self, x):\n    return x + {next(good)}")

    broken = suggest(code__code="def code(self, x:\n  retrn")
    result = scripted(agent, proposal, aggregator=broken).train(exact, additions(5), batch_size=4)
    assert agent.parameters()[0].data == before
    assert result.history[0].update == {}
    assert [(record.stage, record.error) for record in result.failures] == [("aggregation", "SuggestionError")]


@pytest.mark.requirement("Trace's defect 23: a failing instance spoilt the score of its batch")
@pytest.mark.parametrize("min_score", [None, 0.0])
def test_a_failing_instance_under_ensure_improvement(min_score: float | None) -> None:
    """Trace silently rejected the update, or raised on None minus a float: a crash counts as the lowest score."""

    class Flaky(Adder):
        async def forward(self, x: int) -> int:
            if x == 0 and self.amount.data == 1:
                raise ZeroDivisionError("by zero")
            return await super().forward(x)

    agent = Flaky()
    run = scripted(agent, suggest(amount=5))
    result = run.train(exact, additions(5), batch_size=4, ensure_improvement=True, min_score=min_score)
    assert agent.amount.data == 5
    reason = result.history[0].decision.reason
    assert reason.startswith("mean score 0 -> 1 on 4 instances; 3 judged on both sides, the agent failed on 1 before")


@pytest.mark.requirement("Trace's defect 25: the prompts contradicted themselves")
def test_the_prompts_are_consistent() -> None:
    """The user prompt has every section that the system prompt names, and asks for one form of reply."""
    model = ScriptedModel(suggest(amount=7))
    optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
    AggregatedUpdate(Adder(), optimizer, rule=LLMMerge(model)).train(exact, [(0, 5), (1, 9)], batch_size=2)
    (messages,) = model.asked
    for heading in set(re.findall(r"#\w+", AGGREGATOR_SYSTEM_PROMPT)):
        assert section(messages, heading[1:].replace("_i", "_1")) != ""
    for prompt in (AGGREGATOR_SYSTEM_PROMPT, PROPOSER_SYSTEM_PROMPT):
        assert prompt.endswith(REPLY_FORMAT)
        assert "python" not in prompt.lower()
    assert 'or, where only JSON can be sent, with an empty "suggestion"' in REPLY_FORMAT


class Broken(Adder):
    async def forward(self, x: int) -> int:
        return int(self.nonsense)  # type: ignore[attr-defined]


@pytest.mark.requirement(
    "Trace: evaluate",
    "Trace's defect 26: evaluate swallowed interrupts, and a broken agent looked like a bad one",
)
def test_a_crashing_agent_is_distinguished_from_a_bad_one() -> None:
    """A bad agent scores 0; one that raises has no score, unless min_score is given, and its error is reported."""
    inputs, infos = zip(*additions(5), strict=True)
    assert evaluate(Adder(), exact, inputs, infos) == [0.0] * 4
    with pytest.warns(TrainingWarning, match="4 of 4 instances have no score; .*no attribute 'nonsense'"):
        assert evaluate(Broken(), exact, inputs, infos) == [None] * 4
    with pytest.raises(TrainingError, match="(?s)4 rollouts in a row.*no attribute 'nonsense'") as caught:
        scripted(Broken(), "TERMINATE").train(exact, additions(5), min_score=0.0)
    assert (result := caught.value.result) is not None
    assert {(record.stage, record.error) for record in result.failures} == {("agent", "AttributeError")}
    assert "nonsense" in result.failures[0].message


@pytest.mark.requirement("Trace's defect 26: evaluate swallowed interrupts, and a broken agent looked like a bad one")
def test_an_interrupt_ends_evaluate() -> None:
    """Trace's bare `except` turned KeyboardInterrupt into a list of None."""

    class Interrupted(Adder):
        async def forward(self, x: int) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(), exact, [0, 1], [0, 1])


@pytest.mark.requirement(
    'Trace: train(verbose="output")',
    "Trace's defect 32: a custom model raised a NameError; verbose, timeouts and usage were lost",
)
def test_verbose_reaches_forward() -> None:
    """verbose="output" shows every output of the agent; Trace stopped it on the way."""
    logged: list[tuple[str, Any]] = []

    class Logger:
        def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
            logged.append((name, data))

    scripted(Adder(), "TERMINATE", logger=Logger()).train(exact, additions(5), batch_size=4, verbose="output")
    assert sorted(data for name, data in logged if name == "Output") == [1, 2, 3, 4]


@pytest.mark.requirement("Trace's defect 35: failing checks passed")
def test_a_failing_check_fails_the_build() -> None:
    """Neither the Makefile nor the CI script hides a failure."""
    for file in (ROOT / "Makefile", ROOT / ".ci" / "run"):
        assert re.search(r"\|\|\s*(true|:)|continue-on-error|\bset \+e\b", file.read_text()) is None
    assert "set -euo pipefail" in (ROOT / ".ci" / "run").read_text()
