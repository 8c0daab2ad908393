"""A budget counts every call of a run, and an exhausted budget ends the run with its partial result."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from router_runs import train

from aggregator import LLM, AggregatedUpdate, Budget, LLMOptimizer
from aggregator.errors import BudgetExceededError, TrainingWarning
from aggregator.llm.budget import Spending, spending
from aggregator.observing.observer import Observer
from aggregator.records import Rollout
from aggregator.simulation import SimulatedModel
from aggregator.testing import FakeTransport, ScriptedModel
from aggregator.training.checkpoints import RESULT, load_result


@pytest.fixture
def server() -> Iterator[SimulatedModel]:
    with SimulatedModel() as model:
        yield model


def paid(server: SimulatedModel) -> int:
    return sum(server.calls.values())


@pytest.mark.requirement("built 6: the partial result is kept")
@pytest.mark.parametrize("concurrency", [1, 8, 64])
@pytest.mark.parametrize("calls", [0, 3, 30, 75])
def test_no_call_is_made_beyond_the_budget(
    server: SimulatedModel, tmp_path: Path, calls: int, concurrency: int
) -> None:
    """Agent, optimizer, aggregator and gate count together; the error carries the partial result, also on disk."""
    budget = Budget(calls=calls)
    with pytest.raises(BudgetExceededError, match=f"within the budget of {calls} calls, got one") as caught:
        train(server.base_url, budget=budget, run_dir=tmp_path / "run", max_concurrency=concurrency)
    assert paid(server) == budget.spent.calls == calls
    assert caught.value.result is not None
    assert len(caught.value.result.history) < 8
    assert load_result(tmp_path / "run" / RESULT).parameters == caught.value.result.parameters
    assert (len(caught.value.result.history) > 0) == (calls >= 30)


def test_a_run_continues_with_a_larger_budget(server: SimulatedModel, tmp_path: Path) -> None:
    """Paid calls are not repeated, and the result equals that of a run with enough budget."""
    train(server.base_url, run_dir=tmp_path / "whole")
    unbroken = paid(server)
    with pytest.raises(BudgetExceededError):
        train(server.base_url, budget=Budget(calls=70), run_dir=tmp_path / "short")
    train(server.base_url, budget=Budget(calls=1000), run_dir=tmp_path / "short", resume=True)
    assert (tmp_path / "short" / RESULT).read_bytes() == (tmp_path / "whole" / RESULT).read_bytes()
    assert paid(server) == 2 * unbroken


@pytest.mark.parametrize("calls", [40, 70])
def test_a_budget_survives_a_resume(server: SimulatedModel, tmp_path: Path, calls: int) -> None:
    """Each resume got the whole limit again; now all of them together spend what one run does."""
    whole = Budget(calls=1000)
    train(server.base_url, run_dir=tmp_path / "whole", budget=whole)
    before = paid(server)
    with pytest.raises(BudgetExceededError):
        train(server.base_url, budget=Budget(calls=calls), run_dir=tmp_path / "short")
    again = Budget(calls=calls)
    with pytest.raises(BudgetExceededError):
        train(server.base_url, budget=again, run_dir=tmp_path / "short", resume=True)
    assert again.spent.calls <= calls
    assert paid(server) - before <= calls
    enough = Budget(calls=1000)
    train(server.base_url, budget=enough, run_dir=tmp_path / "short", resume=True)
    assert enough.spent == whole.spent
    assert (tmp_path / "short" / RESULT).read_bytes() == (tmp_path / "whole" / RESULT).read_bytes()


def test_a_budget_counted_a_replay_of_the_interrupted_step_twice(server: SimulatedModel, tmp_path: Path) -> None:
    """With one budget in one process, a run interrupted in a step and resumed has spent what was paid."""
    budget = Budget(calls=1000)

    class Interrupting(Observer):
        seen = 0

        def rollout(self, rollout: Rollout) -> None:
            Interrupting.seen += 1
            if Interrupting.seen == 14:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(server.base_url, run_dir=tmp_path / "run", budget=budget, observers=[Interrupting()])
    assert budget.spent.calls == paid(server)
    result = train(server.base_url, run_dir=tmp_path / "run", budget=budget, resume=True)
    assert len(result.history) == 8
    assert budget.spent.calls == paid(server)
    assert budget.reserved == Spending()


def test_a_budget_counts_a_finished_run_once(server: SimulatedModel, tmp_path: Path) -> None:
    """Resuming a finished run in the same process costs nothing."""
    budget = Budget(calls=1000)
    train(server.base_url, run_dir=tmp_path / "run", budget=budget)
    spent = budget.spent
    train(server.base_url, run_dir=tmp_path / "run", budget=budget, resume=True)
    assert budget.spent == spent
    other = Budget(calls=1000)
    train(server.base_url, run_dir=tmp_path / "run", budget=other, resume=True)
    assert other.spent == spent


def test_one_budget_serves_several_runs(server: SimulatedModel) -> None:
    """Two runs with their own models share the remaining budget."""
    train(server.base_url)
    one_run = paid(server)
    budget = Budget(calls=one_run + 10)
    train(server.base_url, budget=budget)
    with pytest.raises(BudgetExceededError):
        train(server.base_url, budget=budget)
    assert budget.spent.calls == one_run + 10 == paid(server) - one_run


def test_a_budget_around_a_run_counts_it_too(server: SimulatedModel) -> None:
    """A run without a budget counts in the one that its caller opened."""
    outer = Budget(calls=20)
    with pytest.raises(BudgetExceededError), spending(outer):
        train(server.base_url)
    assert outer.spent.calls == paid(server) == 20


def test_usage_without_a_price_is_a_warning(server: SimulatedModel) -> None:
    """An unknown cost is not 0: one warning gives the number of calls of each role."""
    result = train(server.base_url)
    assert {role: usage.cost for role, usage in result.usage.items()} == dict.fromkeys(result.usage)
    calls = ", ".join(f"{role} {usage.calls}" for role, usage in result.usage.items())
    assert [warning.split(";")[0] for warning in result.warnings] == [f"the cost of these calls is unknown: {calls}"]


def test_calls_of_a_thread_older_than_the_run_give_a_warning() -> None:
    """Work passed through a queue has no context: budget and transcript silently stayed empty."""
    asked: queue.Queue[tuple[str, queue.Queue[str]]] = queue.Queue()
    llm = LLM("openai/gpt-4o-mini", api_key="none", transport=FakeTransport("no"))

    def serve() -> None:
        for _ in range(2):
            text, answer = asked.get()
            answer.put(llm(messages=text).text)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    def agent(x: str, *, hint: str = "") -> str:
        answer: queue.Queue[str] = queue.Queue()
        asked.put((x, answer))
        return answer.get(timeout=10)

    optimizer = LLMOptimizer(llm=ScriptedModel("TERMINATE"))
    trainer = AggregatedUpdate(agent, optimizer, llm=ScriptedModel("TERMINATE"), observers=[])
    with pytest.warns(TrainingWarning, match="2 calls of models came from threads started before the run"):
        trainer.train(lambda x, output, info: 1.0, [("a", None), ("b", None)], batch_size=2)
