"""`instance_timeout=`: an instance that takes too long fails, and replays as a failure on any machine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, first_suggestion

from aggregator import LLM, AggregatedUpdate, Budget, LLMOptimizer, Module, ParameterNode, cassette
from aggregator.adapters.agents import as_agent
from aggregator.errors import ConfigError
from aggregator.executors.local import LocalExecutor
from aggregator.executors.work import AgentWork
from aggregator.records import Rollout, RolloutTask, Sample, TrainingResult
from aggregator.stops import seconds
from aggregator.testing import FakeTransport, suggestion
from aggregator.training.batches import minibatches
from aggregator.training.checkpoints import RESULT

pytestmark = pytest.mark.filterwarnings("ignore:the (agent|guide) failed:aggregator.errors.TrainingWarning")

LIMIT = 0.3
SLOW = 2
"""The input at which an agent hangs."""


class Asking(Module):
    """Calls a model twice, and hangs between the two calls at one input, unless `quick`."""

    def __init__(
        self, transport: FakeTransport, *, hangs: bool = True, pauses: float = 0.0, waits_at: int = -1
    ) -> None:
        self.hint = ParameterNode("none")
        self.llm = LLM("openai/gpt-4o-mini", api_key="none", transport=transport)
        self.ran: list[int] = []
        self.hangs, self.pauses, self.waits_at = hangs, pauses, waits_at

    async def forward(self, x: int) -> int:
        self.ran.append(x)
        if x == self.waits_at:
            sys.stdout.write("waiting\n")
            sys.stdout.flush()
            time.sleep(3600)  # noqa: ASYNC251 - the process is killed now
        await self.llm.complete(f"first about {x}")
        await asyncio.sleep(3600 if x == SLOW and self.hangs else self.pauses)
        await self.llm.complete(f"second about {x}")
        return x + 5


class Blocking(Asking):
    """The same with synchronous code, which cannot be stopped."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.release = threading.Event()
        self.late: list[str] = []

    def forward(self, x: int) -> int:  # type: ignore[override]
        self.ran.append(x)
        self.llm(messages=f"first about {x}")
        if x == SLOW and self.hangs:
            try:
                self.release.wait(30)
                self.llm(messages=f"second about {x}")
            except BaseException as error:
                self.late.append(type(error).__name__)
                raise
            self.late.append("answered")
        time.sleep(self.pauses)
        self.llm(messages=f"second about {x}")
        return x + 5


def transport() -> FakeTransport:
    return FakeTransport("5")


def trainer(agent: Any, **options: Any) -> AggregatedUpdate:
    optimizer = LLMOptimizer(llm=ScriptedModel(lambda messages: suggestion(hint="go on")))
    return AggregatedUpdate(agent, optimizer, llm=ScriptedModel(first_suggestion), observers=[], **options)


def train(agent: Any, guide: Any = exact, limit: float | None = LIMIT, **options: Any) -> TrainingResult:
    arguments: dict[str, Any] = {"batch_size": 4, "instance_timeout": limit, **options}
    return trainer(agent).train(guide, additions(5), **arguments)


@pytest.mark.parametrize("kind", [Asking, Blocking])
def test_an_instance_that_hangs_fails_and_the_others_are_judged(kind: type[Asking]) -> None:
    """It gets the lowest score, the optimizer sees the reason, and the run continues."""
    agent = kind(transport())
    result = train(agent)
    (report,) = result.history
    scores = dict(zip(report.sample_ids, report.scores, strict=True))
    assert scores == {0: 1.0, 1: 1.0, 2: None, 3: 1.0}
    (failure,) = report.failures
    assert (failure.stage, failure.error, failure.sample_id) == ("agent", "InstanceTimeoutError", SLOW)
    assert failure.message == "Expected the agent to end within instance_timeout=0.3 s, got no answer"
    assert result.usage["agent"].calls == 7


def test_calls_of_an_abandoned_thread_are_refused() -> None:
    """The thread continues later: nothing is sent."""
    fake = transport()
    agent = Blocking(fake)
    train(agent)
    sent = len(fake.requests)
    agent.release.set()
    while not agent.late:
        time.sleep(0.01)
    assert agent.late == ["CancelledError"]
    assert len(fake.requests) == sent


def test_calls_of_a_coroutine_that_ignores_its_cancellation_are_refused() -> None:
    """An agent that swallows its cancellation neither delays the run nor pays for calls."""
    fake, late = transport(), []

    class Stubborn(Asking):
        async def forward(self, x: int) -> int:
            if x != SLOW:
                return await super().forward(x)
            for _ in range(3):
                try:
                    await asyncio.sleep(3600)
                except BaseException:  # noqa: BLE001 - as a bare `except:` in a loop of retries does
                    try:
                        await self.llm.complete(f"more about {x}")
                    except BaseException as error:  # noqa: BLE001 - as above
                        late.append(type(error).__name__)
            return x

    result = train(Stubborn(fake))
    assert result.history[0].failures[0].error == "InstanceTimeoutError"
    assert late == ["CancelledError"]
    assert not [body for body in fake.bodies() if "more" in str(body)]


async def test_a_hanging_thread_frees_its_place() -> None:
    """With a single place the next instance runs, and leaving the executor does not wait."""
    release, ran = threading.Event(), []

    def agent(x: int, *, hint: str = "") -> int:
        ran.append(x)
        if x == 0:
            release.wait(30)
        return x

    tasks = [RolloutTask(sample=Sample(i, i), lineage=(f"sample={i}",), timeout=LIMIT) for i in range(3)]
    async with LocalExecutor(1) as executor:
        runs = await executor.map(AgentWork(as_agent(agent), None, call=executor.call), tasks)
    assert [run.output for run in runs] == [None, 1, 2]
    assert ran == [0, 1, 2]
    release.set()


def test_a_hanging_guide_loses_the_instance() -> None:
    """The agent has answered, so it gets no score of 0."""

    async def hanging(x: int, output: int, info: int) -> float:
        await asyncio.sleep(3600 if x == SLOW else 0)
        return float(output == info)

    result = train(Asking(transport(), hangs=False), hanging)
    (failure,) = result.history[0].failures
    assert (failure.stage, failure.error) == ("guide", "InstanceTimeoutError")
    assert result.train_scores == [1.0]


@pytest.mark.parametrize("kind", [Asking, Blocking])
@pytest.mark.parametrize("stage", ["agent", "guide"])
def test_a_timeout_is_replayed_on_a_fast_machine(tmp_path: Path, kind: type[Asking], stage: str) -> None:
    """An instance that timed out is not run again; its calls count as replayed, so no warning is given."""
    path = tmp_path / "tape.yaml"

    async def judge(x: int, output: int, info: int, hangs: bool) -> tuple[float, str]:
        if x == SLOW and stage == "guide" and hangs:
            await asyncio.sleep(3600)
        return exact(x, output, info)

    async def hanging(x: int, output: int, info: int) -> tuple[float, str]:
        return await judge(x, output, info, hangs=True)

    async def quick(x: int, output: int, info: int) -> tuple[float, str]:
        return await judge(x, output, info, hangs=False)

    with cassette(path):
        recorded = train(kind(transport(), hangs=stage == "agent"), hanging, test_dataset=additions(5), repeats=1)
    fast = kind(transport(), hangs=False)
    with cassette(path, mode="none") as tape:
        replayed = train(fast, quick, test_dataset=additions(5))
    assert [failure.stage for failure in recorded.failures] == [stage] * 3
    assert replayed == recorded
    assert (SLOW in fast.ran) == (stage == "guide")
    assert not [line for line in tape.report if "not played" in line]


@pytest.mark.parametrize("kind", [Asking, Blocking])
@pytest.mark.parametrize("mode", ["none", "new_episodes"])
def test_a_slow_machine_replays_instances_that_ended_in_time(tmp_path: Path, kind: type[Asking], mode: Any) -> None:
    """If there is a recording, it decides, not the clock."""
    path = tmp_path / "tape.yaml"
    with cassette(path):
        recorded = train(kind(transport(), hangs=False))
    with cassette(path, mode=mode):
        replayed = train(kind(transport(), hangs=False, pauses=2 * LIMIT))
    assert replayed == recorded
    assert not recorded.failures


def test_a_timeout_survives_a_resume(tmp_path: Path) -> None:
    """A run is cut off in the step of the timeout; its resume, in which nothing hangs, ends with the same bytes."""

    class Interrupted(Asking):
        breaks = False

        async def forward(self, x: int) -> int:
            if x == 3 and type(self).breaks:
                raise KeyboardInterrupt
            return await super().forward(x)

    options: dict[str, Any] = {"max_concurrency": 1, "seed": hangs_before_it_breaks()}
    train(Interrupted(transport()), run_dir=tmp_path / "whole", **options)
    Interrupted.breaks = True
    first = Interrupted(transport())
    with pytest.raises(KeyboardInterrupt):
        train(first, run_dir=tmp_path / "run", **options)
    assert SLOW in first.ran
    Interrupted.breaks = False
    fast = Interrupted(transport(), hangs=False)
    result = train(fast, run_dir=tmp_path / "run", resume=True, **options)
    assert SLOW not in fast.ran
    assert [failure.error for failure in result.failures] == ["InstanceTimeoutError"]
    assert (tmp_path / "run" / RESULT).read_bytes() == (tmp_path / "whole" / RESULT).read_bytes()


def test_a_timeout_and_the_seconds_survive_a_kill(tmp_path: Path) -> None:
    """After SIGKILL in the step of the timeout, a resume in which nothing hangs has the bytes of an unbroken run."""
    seed = hangs_before_it_breaks()
    options: dict[str, Any] = {"max_concurrency": 1, "seed": seed, "stop": seconds(3600)}
    train(Asking(transport()), run_dir=tmp_path / "whole", **options)
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_instance_timeouts import Asking, seconds, train, transport
train(Asking(transport(), waits_at=3), run_dir=sys.argv[1], max_concurrency=1, seed={seed}, stop=seconds(3600))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        child.kill()
    fast = Asking(transport(), hangs=False)
    train(fast, run_dir=tmp_path / "run", resume=True, **options)
    assert SLOW not in fast.ran
    assert (tmp_path / "run" / RESULT).read_bytes() == (tmp_path / "whole" / RESULT).read_bytes()


def hangs_before_it_breaks() -> int:
    """Return a seed for which the input that hangs precedes the one that breaks the run."""
    orders = ((seed, minibatches(4, 4, seed=seed, epoch=0)[0]) for seed in range(100))
    return next(seed for seed, order in orders if order.index(SLOW) < order.index(3))


def test_calls_of_a_replayed_timeout_count_in_the_budget(tmp_path: Path) -> None:
    """They count as in the recording."""
    path, budgets = tmp_path / "tape.yaml", (Budget(calls=100), Budget(calls=100))
    with cassette(path):
        trainer(Asking(transport()), budget=budgets[0]).train(exact, additions(5), batch_size=4, instance_timeout=LIMIT)
    with cassette(path, mode="none"):
        trainer(Asking(transport()), budget=budgets[1]).train(exact, additions(5), batch_size=4, instance_timeout=LIMIT)
    assert budgets[0].spent.calls == budgets[1].spent.calls


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), "5", True])
def test_an_invalid_timeout_is_refused(wrong: Any) -> None:
    """The error is raised before anything runs."""
    with pytest.raises(ConfigError, match="Expected instance_timeout in seconds above 0"):
        train(Adder(), limit=wrong)


def test_a_timeout_is_refused_if_instances_cannot_be_timed() -> None:
    """This holds for an overridden forward and for agents that run whole batches."""

    class Own(AggregatedUpdate):
        async def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: Any = False) -> Any:
            return await self.aforward(agent, x, guide, info)

    class Batch:
        isolation = "overlay"
        max_concurrency = None

        def __init__(self) -> None:
            self.hint = ParameterNode("", name="hint")

        def parameters(self) -> list[Any]:
            return [self.hint]

        async def rollouts(self, tasks: Any, guide: Any) -> Any:
            for i, task in enumerate(tasks):
                yield i, Rollout(sample_id=task.sample.id, score=1.0)

    optimizer = LLMOptimizer(llm=ScriptedModel("TERMINATE"))
    with pytest.raises(ConfigError, match="instance_timeout=None with an overridden forward"):
        Own(Adder(), optimizer, llm=ScriptedModel(first_suggestion)).train(exact, additions(5), instance_timeout=1)
    with pytest.raises(ConfigError, match="instance_timeout=None with Batch"):
        train(Batch())


def test_a_run_with_another_timeout_is_not_resumed(tmp_path: Path) -> None:
    """The timeout changes which instances fail."""
    train(Adder(), run_dir=tmp_path / "run")
    for other in (1.0, None):
        with pytest.raises(Exception, match="got other values of instance_timeout;"):
            train(Adder(), limit=other, run_dir=tmp_path / "run", resume=True)
