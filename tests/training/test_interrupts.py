"""Interrupts, cancellation and foreign errors: a run stops promptly, and never with a partial update."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, first_suggestion, from_feedback, section, suggest

from aggregator import LLM, cassette
from aggregator.errors import BudgetExceededError, CassetteMissError, RateLimitError, TrainingError
from aggregator.protocols import Transport
from aggregator.records import Decision, HTTPReply, HTTPRequest, TrainingResult, Values
from aggregator.training.algorithms import AggregatedUpdate
from aggregator.training.checkpoints import RESULT
from aggregator.training.gates import improves_on_batch, improves_on_validation
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.step import Gate

pytestmark = pytest.mark.filterwarnings("ignore:the (agent|guide) failed:aggregator.errors.TrainingWarning")

HERE = Path(__file__).parent


def trainer(agent: Any, *replies: Any, gate: Gate | None = None, **options: Any) -> AggregatedUpdate:
    optimizer = LLMOptimizer(llm=ScriptedModel(*(replies or [from_feedback]), jitter=lambda: 2))
    return AggregatedUpdate(agent, optimizer, llm=ScriptedModel(first_suggestion), gate=gate, **options)


@pytest.mark.parametrize("kind", ["sleeping", "blocking", "asking", "stubborn"])
def test_ctrl_c_leaves_train_and_the_process(tmp_path: Path, kind: str) -> None:
    """SIGINT ends train with KeyboardInterrupt whatever the agent does; nothing is left behind but the partial result.

    Agents await, hold a thread, ask a model in a loop from a thread, or swallow their first cancellation.
    """
    command = [sys.executable, "-W", "error", "-X", "dev", str(HERE / "interrupted_runs.py"), kind, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "busy\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not re.search(r"Warning|never (awaited|retrieved)|was destroyed|Exception ignored", errors), errors
    partial = json.loads((tmp_path / RESULT).read_bytes())
    assert len(partial["history"]) == 2
    assert partial["parameters"]["amount"] == 5


class Pair(Adder):
    """Two parameters that one update changes together: `amount` and its name."""

    async def forward(self, x: int) -> int:
        await asyncio.sleep(0)
        return await super().forward(x)


def both(messages: list[dict[str, Any]]) -> str:
    """Ask for a new amount and, to distinguish updates, for the same in words."""
    asked = json.loads(section(messages, "Parameters"))["amount"]["value"]
    return suggest(amount=asked + 1, label=f"sum {asked + 1}")


async def cancelled_after(turns: int, run: Any) -> bool:
    """Start a run in a task, cancel it after some iterations of the event loop; return True if it was running."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(run)
        for _ in range(turns):
            await asyncio.sleep(0)
        return task.cancel()


@pytest.mark.parametrize("gate", [None, improves_on_batch()])
async def test_a_cancelled_run_leaves_only_whole_updates(gate: Gate | None) -> None:
    """`atrain` in the caller's event loop is cancelled at any iteration: both parameters belong to the same update."""
    seen = set()
    for turns in range(0, 400, 3):
        agent = Pair(amount=0, label="sum 0")
        run = trainer(agent, both, gate=gate).atrain(closer, additions(9), batch_size=2, num_epochs=4)
        under_way = await cancelled_after(turns, run)
        assert agent.label.data == f"sum {agent.amount.data}"
        seen.add((under_way, agent.amount.data))
    assert {amount for _, amount in seen} >= {0, 4, 8}
    assert {under_way for under_way, _ in seen} == {True, False}


async def closer(x: int, output: int, info: int) -> tuple[float, str]:
    """Return a higher score for a nearer output; async, so that the iterations of the loop are the same each time."""
    return -abs(float(info - output)), f"expected {info}, got {output}"


@pytest.mark.parametrize("make", [improves_on_batch, lambda: improves_on_validation(additions(9))])
async def test_a_cancelled_gate_leaves_the_agent_unchanged(make: Any) -> None:
    """Candidates are tried under an overlay: no other code reads one, and nothing has to be restored."""
    trying = asyncio.Event()

    class Watched(Pair):
        async def forward(self, x: int) -> int:
            if self.amount.data == 1:
                trying.set()
                await asyncio.sleep(3600)
            return await super().forward(x)

    agent = Watched(amount=0, label="sum 0")
    run = trainer(agent, both, gate=make()).atrain(closer, additions(9), batch_size=4)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(run)
        await trying.wait()
        assert (agent.amount.data, agent.label.data) == (0, "sum 0")
        task.cancel()
    assert (agent.amount.data, agent.label.data) == (0, "sum 0")


class Quits(Adder):
    """Raises a given exception for one of its inputs."""

    def __init__(self, error: BaseException, *, at: int = 0) -> None:
        super().__init__()
        self.error, self.at = error, at

    async def forward(self, x: int) -> int:
        if x == self.at:
            raise self.error
        return await super().forward(x)


class QuitsInAThread(Quits):
    def forward(self, x: int) -> int:  # type: ignore[override]
        if x == self.at:
            raise self.error
        return int(x + self.amount.data)


@pytest.mark.parametrize("kind", [Quits, QuitsInAThread])
@pytest.mark.parametrize(
    ("error", "name"),
    [
        (SystemExit(2), "SystemExit"),
        (asyncio.CancelledError("its own"), "CancelledError"),
        (ExceptionGroup("tasks", [ValueError("b"), KeyError("a")]), "KeyError"),
        (RecursionError("deep"), "RecursionError"),
    ],
)
def test_an_agent_that_exits_or_cancels_itself_has_failed_like_any_other(
    kind: type[Quits], error: BaseException, name: str
) -> None:
    """`sys.exit()` in an agent ends neither the run nor the library's loop; the other instances run."""
    agent = kind(error)
    result = trainer(agent).train(exact, additions(5), batch_size=4, min_score=-1.0, max_concurrency=1)
    assert agent.amount.data == 5
    assert [(record.stage, record.error) for record in result.failures] == [("agent", name)]
    assert sorted(result.history[0].scores, key=str) == [-1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("error", [SystemExit(2), asyncio.CancelledError("its own"), ZeroDivisionError("by zero")])
def test_a_guide_that_exits_gives_no_score(asynchronous: bool, error: BaseException) -> None:
    """The instance has no score, which differs from 0, and the failure is the guide's."""

    def sync_guide(x: int, output: int, info: int) -> tuple[float, str]:
        if x == 0:
            raise error
        return exact(x, output, info)

    async def async_guide(x: int, output: int, info: int) -> tuple[float, str]:
        return sync_guide(x, output, info)

    result = trainer(Adder()).train(async_guide if asynchronous else sync_guide, additions(5), batch_size=4)
    assert sorted(result.history[0].scores, key=str) == [0.0, 0.0, 0.0, None]
    assert [(record.stage, record.error) for record in result.failures] == [("guide", type(error).__name__)]


def test_a_guide_that_always_fails_ends_the_run() -> None:
    """Without scores nothing can be learned: the run stops and names the guide's error and its line."""

    def broken(x: int, output: int, info: int) -> float:
        raise ZeroDivisionError("by zero")

    with pytest.raises(TrainingError, match="(?s)the guide to work .*4 rollouts in a row.*ZeroDivisionError: by zero"):
        trainer(Adder()).train(broken, additions(5), batch_size=4)


def test_a_custom_optimizer_that_raises_loses_one_instance() -> None:
    """The proposals of the other instances are kept and applied."""

    class Own(LLMOptimizer):
        async def propose(self, rollouts: Any, step: Any) -> Any:
            if rollouts[0].sample_id == 0:
                raise KeyError("k")
            return await super().propose(rollouts, step)

    agent = Adder()
    own = Own(llm=ScriptedModel(from_feedback))
    result = AggregatedUpdate(agent, own, llm=ScriptedModel("x")).train(exact, additions(5), batch_size=4)
    assert agent.amount.data == 5
    assert [(record.stage, record.error, record.sample_id) for record in result.failures] == [
        ("proposal", "KeyError", 0)
    ]


class Stop(BaseException):
    """An exception class that the library does not know."""


@pytest.mark.requirement("Trace's defect 26: evaluate swallowed interrupts, and a broken agent looked like a bad one")
@pytest.mark.parametrize("kind", [Quits, QuitsInAThread])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stop(), GeneratorExit()])
def test_interrupts_raised_by_an_agent_end_train(kind: type[Quits], error: BaseException, tmp_path: Path) -> None:
    """They are raised unchanged, with the partial result on disk, and the library's loop keeps running."""
    agent = kind(error, at=3)
    with pytest.raises(type(error)):
        trainer(agent).train(exact, additions(5), max_concurrency=1, run_dir=tmp_path / "run")
    partial = json.loads((tmp_path / "run" / RESULT).read_bytes())
    assert 0 < len(partial["history"]) < 4
    assert trainer(Adder()).train(exact, additions(5)).train_scores[-1] == 1.0


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (RateLimitError("slow down", status=429), None),
        (BudgetExceededError("spent"), BudgetExceededError),
        (CassetteMissError("not recorded"), CassetteMissError),
    ],
)
def test_errors_in_a_group_are_classified_one_by_one(error: Exception, ended: type[Exception] | None) -> None:
    """An agent that uses a TaskGroup raises a group: a lost call in it is not the agent's failure."""

    class Fanning(Adder):
        async def forward(self, x: int) -> int:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.ask(x))
                group.create_task(asyncio.sleep(3600 if x == 0 else 0))
            return await super().forward(x)

        async def ask(self, x: int) -> None:
            if x == 0:
                raise error

    run = trainer(Fanning())
    if ended is not None:
        with pytest.raises(ended):
            run.train(exact, additions(5), batch_size=4)
        return
    result = run.train(exact, additions(5), batch_size=4)
    assert [(record.stage, record.error, record.infrastructure) for record in result.failures] == [
        ("agent", "RateLimitError", True)
    ]
    assert sorted(result.history[0].scores, key=str) == [0.0, 0.0, 0.0, None]


class Model(Transport):
    """Answers 7 to everything."""

    def __init__(self, on_asked: Callable[[], Any] = lambda: None) -> None:
        self.served = 0
        self.on_asked = on_asked

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        self.served += 1
        self.on_asked()
        await asyncio.sleep(0.01)
        choice = {"index": 0, "message": {"role": "assistant", "content": "7"}, "finish_reason": "stop"}
        return HTTPReply(status=200, body=msgspec.json.encode({"choices": [choice]}), headers={})


class Careless(Adder):
    """Returns 0 for any failure of its model, and asks again and again."""

    def __init__(self, llm: LLM, calls: int = 1) -> None:
        super().__init__()
        self.llm, self.calls = llm, calls
        self.done = threading.Event()

    def forward(self, x: int) -> int:  # type: ignore[override]
        total = 0
        for i in range(self.calls):
            try:
                total += int(self.llm(messages=f"{x}, for the {i}th time").text)
            except Exception:  # noqa: BLE001 - carelessness is the point
                total += 0
        self.done.set()
        return total


def careless_run(model: Model, **options: Any) -> TrainingResult:
    agent = Careless(LLM("openai-compatible/x", base_url="http://localhost/v1", transport=model))
    return trainer(agent).train(exact, additions(5), batch_size=2, **options)


def test_a_swallowed_miss_ends_the_run(tmp_path: Path) -> None:
    """`except Exception` in agent code does not turn a missing recording into a bad answer."""
    model = Model()
    with cassette(tmp_path / "a.yaml"):
        careless_run(model)
    with pytest.raises(CassetteMissError):
        replayed(tmp_path / "a.yaml", model, run_dir=tmp_path / "run")
    assert model.served == 4
    assert json.loads((tmp_path / "run" / RESULT).read_bytes())["history"] == []


class BySDK(Careless):
    """Asks through an SDK that takes every exception for a lost connection, and so gets the miss as a status."""

    def forward(self, x: int) -> int:  # type: ignore[override]
        with httpx.Client() as client:
            headers = {"x-stainless-lang": "python"}
            reply = client.post("http://localhost/v1/chat/completions", json={"x": x}, headers=headers)
        assert reply.status_code == 424
        self.done.set()
        return 0


def test_a_miss_that_an_sdk_got_as_a_status_became_a_bad_answer(tmp_path: Path) -> None:
    """The tape remembers the miss: the run ends with it after the rollouts, without a step."""
    with cassette(tmp_path / "a.yaml", "all", clients="httpx"):
        pass
    agent = BySDK(LLM("openai-compatible/x", base_url="http://localhost/v1", transport=Model()))
    asked = "POST http://localhost/v1/chat/completions"
    with (
        pytest.raises(CassetteMissError, match=asked),  # the end of the block
        cassette(tmp_path / "a.yaml", "none", clients="httpx"),
        pytest.raises(CassetteMissError, match=asked),  # the end of the rollouts
    ):
        trainer(agent).train(exact, additions(5), batch_size=2, run_dir=tmp_path / "run")
    assert agent.done.is_set()
    assert json.loads((tmp_path / "run" / RESULT).read_bytes())["history"] == []


def replayed(path: Path, model: Model, **options: Any) -> None:
    """Train from a cassette in another order than it was recorded in."""
    with cassette(path, "none"), pytest.raises(CassetteMissError):
        careless_run(model, seed=1, **options)


async def test_a_thread_of_a_cancelled_run_makes_no_more_calls() -> None:
    """A thread cannot be stopped, but no call is sent or paid for after the run has ended."""
    asked, loop = asyncio.Event(), asyncio.get_running_loop()
    model = Model(lambda: loop.call_soon_threadsafe(asked.set))
    agent = Careless(LLM("openai-compatible/x", base_url="http://localhost/v1", transport=model), calls=1000)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(trainer(agent).atrain(exact, additions(5)))
        await asked.wait()
        task.cancel()
    served = model.served
    assert agent.done.wait(timeout=20)
    assert model.served <= served + 1
    assert served < 1000


@pytest.mark.parametrize("use_asyncio", [True, False])
def test_synchronous_hooks_and_agents_use_separate_threads(use_asyncio: bool) -> None:
    """A synchronous `forward` holds a thread while `super().forward` runs a synchronous agent in another."""

    class Sync(Adder):
        def forward(self, x: int) -> int:  # type: ignore[override]
            return int(x + self.amount.data)

    class Watching(AggregatedUpdate):
        def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
            return super().forward(agent, x, guide, info, verbose)

        def update(self, outputs: Any, verbose: bool | str = False) -> Any:
            return super().update(outputs, verbose)

    agent = Sync()
    optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
    run = Watching(agent, optimizer, use_asyncio, llm=ScriptedModel("x"), max_concurrency=2)
    result = run.train(exact, additions(5), batch_size=4, ensure_improvement=True)
    assert agent.amount.data == 5
    assert result.history[0].decision.reason == "mean score 0 -> 1 on 4 instances"


async def test_a_cancelled_synchronous_update_writes_nothing() -> None:
    """`super().update` in a thread is cancelled with its run, although the thread continues."""
    gated, loop = asyncio.Event(), asyncio.get_running_loop()
    left = threading.Event()

    async def slow(before: Values, after: Values, step: Any) -> Decision:
        loop.call_soon_threadsafe(gated.set)
        await asyncio.sleep(3600)
        return Decision(accepted=True)

    class Watching(AggregatedUpdate):
        def update(self, outputs: Any, verbose: bool | str = False) -> Any:
            try:
                return super().update(outputs, verbose)
            finally:
                left.set()

    agent = Adder()
    run = Watching(agent, LLMOptimizer(llm=ScriptedModel(from_feedback)), llm=ScriptedModel("x"), gate=slow)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(run.atrain(exact, additions(5), batch_size=4))
        await gated.wait()
        task.cancel()
    assert left.wait(timeout=20)
    assert agent.amount.data == 1
