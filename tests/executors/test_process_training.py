"""Training with worker processes: the same bytes as in this process, and lost instances have no score."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from process_parts import Odd

from aggregator import LLM, AggregatedUpdate, LLMOptimizer, cassette, save_result
from aggregator.demo.run import TicketRouter, right_team, tickets
from aggregator.errors import BudgetExceededError, ConfigError, TrainingError
from aggregator.executors import LocalExecutor, ProcessExecutor
from aggregator.gates import improves_on_batch
from aggregator.llm.budget import Budget
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest, TrainingResult
from aggregator.simulation.model import complete
from aggregator.testing import ScriptedModel, suggestion

URL = "http://simulated-model.invalid/v1"


class Simulated(Transport):
    """The simulated model without a server."""

    def __init__(self) -> None:
        self.count = 0

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        self.count += 1
        body = complete(msgspec.json.decode(request.body))
        return HTTPReply(status=200, body=msgspec.json.encode(body), headers={})


class Absent(Transport):
    """A missing network."""

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        raise AssertionError(f"a replay went to {request.url}")


@pytest.fixture(scope="module")
def executor() -> Iterator[ProcessExecutor]:
    with ProcessExecutor(2) as shared:
        yield shared


def train(executor: Any, transport: Transport, **options: Any) -> TrainingResult:
    """Train the demo's router, including code, for two epochs of two steps."""
    llm = LLM("openai-compatible/simulated-1", base_url=URL, transport=transport)
    trainer = AggregatedUpdate(
        TicketRouter(llm), LLMOptimizer(llm=llm), llm=llm, gate=improves_on_batch(), executor=executor, observers=[]
    )
    trainer.budget = options.pop("budget", None)
    pairs = [(ticket.text, ticket.team) for ticket in tickets().train[:10]]
    return trainer.train(
        right_team, pairs, test_dataset=pairs[:4], batch_size=5, num_epochs=2, eval_frequency=2, **options
    )


@pytest.mark.parametrize("recorded", ["process", "local"])
def test_a_run_in_processes_equals_one_in_this_process(
    recorded: str, executor: ProcessExecutor, tmp_path: Path
) -> None:
    """One executor's recording replays with the other to the same bytes of result.json, without a request."""
    executors: dict[str, Any] = {"process": executor, "local": LocalExecutor(4)}
    with cassette(tmp_path / "run.yaml", mode="all"):
        save_result(train(executors.pop(recorded), Simulated()), tmp_path / "recorded.json")
    (other,) = executors.values()
    with cassette(tmp_path / "run.yaml", mode="none") as tape:
        result = train(other, Absent())
    save_result(result, tmp_path / "replayed.json")
    assert (tmp_path / "replayed.json").read_bytes() == (tmp_path / "recorded.json").read_bytes()
    assert tape.unplayed() == []
    assert any(report.decision.accepted for report in result.history)


def test_a_run_in_processes_can_be_resumed(executor: ProcessExecutor, tmp_path: Path) -> None:
    """A run that its budget ended continues in this process like an unbroken one; nothing is paid for twice."""
    whole, first, second = Simulated(), Simulated(), Simulated()
    train(LocalExecutor(4), whole, run_dir=tmp_path / "whole")
    with pytest.raises(BudgetExceededError):
        train(executor, first, run_dir=tmp_path / "run", budget=Budget(calls=whole.count // 2))
    train(LocalExecutor(4), second, run_dir=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "result.json").read_bytes() == (tmp_path / "whole" / "result.json").read_bytes()
    assert first.count + second.count == whole.count


def test_an_instance_whose_worker_dies_is_not_averaged(executor: ProcessExecutor) -> None:
    """It has no score, its failure is infrastructure, and the step continues with the others."""
    model = ScriptedModel(suggestion(amount=2))
    trainer = AggregatedUpdate(Odd(), LLMOptimizer(llm=model), llm=model, executor=executor, observers=[])
    result = trainer.train(always_one, [("a", None), ("die", None), ("b", None)], batch_size=3, min_score=0.0)
    (report,) = result.history
    assert sorted(report.scores, key=str) == [1.0, 1.0, None]
    assert report.score == 1.0
    assert [(failure.stage, failure.infrastructure) for failure in report.failures] == [("agent", True)]


def always_one(x: Any, output: Any, info: Any) -> float:
    return 1.0


def test_a_run_in_which_every_worker_dies_stops(executor: ProcessExecutor) -> None:
    """It stops like a run whose calls are all lost."""
    model = ScriptedModel(suggestion(amount=2))
    trainer = AggregatedUpdate(Odd(), LLMOptimizer(llm=model), llm=model, executor=executor, observers=[])
    with pytest.raises(TrainingError, match="WorkerLostError"):
        trainer.train(always_one, [("die", None)] * 4, batch_size=4)


class Forwarding(AggregatedUpdate):
    """A trainer with an overridden `forward`."""

    def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
        raise NotImplementedError


def test_what_cannot_run_in_processes_is_refused_before_a_call(executor: ProcessExecutor) -> None:
    """An overridden `forward` is refused at construction, a guide that cannot be pickled when the run begins."""
    model = ScriptedModel(suggestion(amount=2))
    with pytest.raises(ConfigError, match="Expected an executor of this process with an overridden forward"):
        Forwarding(Odd(), LLMOptimizer(llm=model), llm=model, executor=executor)
    trainer = AggregatedUpdate(Odd(), LLMOptimizer(llm=model), llm=model, executor=executor, observers=[])
    with pytest.raises(ConfigError, match="Expected a guide that pickles"):
        trainer.train(lambda x, output, info: 1.0, [("a", None)])
    assert model.asked == []
