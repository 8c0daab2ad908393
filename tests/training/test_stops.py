"""`stop=` ends a run between two steps with its result; decisions by a clock are recorded and replayed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, first_suggestion, from_feedback, suggest

import aggregator
from aggregator import AggregatedUpdate, LLMOptimizer, cassette
from aggregator.errors import ConfigError, ServerError
from aggregator.observing.observer import Observer
from aggregator.records import Evaluation, StepReport, TrainingResult
from aggregator.rules import majority
from aggregator.stops import Reached, patience, seconds, target
from aggregator.training import stops
from aggregator.training.checkpoints import CHECKPOINT, RESULT, load_result

HERE = Path(__file__).parent


def train(stop: Any, *, replies: Any = from_feedback, agent: Any = None, **options: Any) -> TrainingResult:
    optimizer = LLMOptimizer(llm=ScriptedModel(replies))
    watching = options.pop("observers", [])
    trainer = AggregatedUpdate(agent or Adder(), optimizer, llm=ScriptedModel(first_suggestion), observers=watching)
    arguments: dict[str, Any] = {"batch_size": 2, "num_epochs": 4, **options}
    return trainer.train(exact, additions(5), stop=stop, **arguments)


def worse(messages: list[dict[str, Any]]) -> str:
    """An optimizer whose proposals are all wrong, each by another amount."""
    return suggest(amount=len(str(messages)) % 1000 + 10)


class Hand:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    """Replace the stops' clock with the test's."""
    made = Hand()
    monkeypatch.setattr(stops, "time", made)
    return made


class Timed(Adder):
    """Takes a given number of seconds of the test's clock for each instance."""

    def __init__(self, hand: Hand, takes: float, breaks_at: float = 1e9) -> None:
        super().__init__()
        self.hand, self.takes, self.breaks_at = hand, takes, breaks_at

    async def forward(self, x: int) -> int:
        if self.hand.now >= self.breaks_at:
            raise KeyboardInterrupt
        self.hand.now += self.takes
        return await super().forward(x)


def test_a_run_stops_at_its_target_with_the_reason_in_the_result() -> None:
    """The first minibatch fails, the second one is right; six steps are skipped."""
    result = train(target(0.95))
    assert len(result.history) == 2
    assert result.train_scores == [0.0, 1.0]
    assert result.stopped == "target(0.95) was reached with a score of 1"
    assert "stopped: target(0.95) was reached" in str(result)


def test_the_validation_set_decides_if_there_is_one() -> None:
    """A minibatch that is right by chance does not stop the run; the test set never decides."""
    far = [(i, i + 7) for i in range(4)]
    assert train(target(0.95), validate_dataset=far).stopped == ""
    assert train(target(0.95), test_dataset=additions(5), num_epochs=1).train_scores == [0.0, 1.0]
    before = train(target(0.95), validate_dataset=additions(1), test_dataset=additions(5))
    assert (len(before.history), before.validations[0].score) == (0, 1.0)


def test_a_target_is_not_reached_by_a_few_judged_instances() -> None:
    """Three of four calls were lost: the mean of the judged ones is 1, and says nothing about the others."""

    class Losing(Adder):
        async def forward(self, x: int) -> int:
            if x and self.amount.data == 5:
                raise ServerError("answered 503", status=503)
            return await super().forward(x)

    result = train(target(0.95), agent=Losing(), validate_dataset=additions(5), max_failure_ratio=1.0, batch_size=4)
    assert result.validations[-1].score == 1.0
    assert result.stopped == ""


@pytest.mark.parametrize("eval_frequency", [0, 5])
def test_a_stopped_run_is_evaluated_at_its_end(eval_frequency: int) -> None:
    """With rare validation, the best values were those of before training, whatever was learned since."""
    seen: list[tuple[str, int]] = []

    class Watch(Observer):
        def evaluation(self, evaluation: Evaluation) -> None:
            seen.append(("test", evaluation.step))

        def validation(self, evaluation: Evaluation) -> None:
            seen.append(("validation", evaluation.step))

    agent = Adder()
    sets = {"validate_dataset": additions(5), "test_dataset": additions(5, 2)}
    result = train(
        lambda history: len(history) == 2, agent=agent, observers=[Watch()], eval_frequency=eval_frequency, **sets
    )
    assert [(one.step, one.score) for one in result.validations] == [(0, 0.0), (2, 1.0)]
    assert result.parameters["amount"] == agent.amount.data == 5
    assert [one.step for one in result.evaluations] == ([0, 2] if eval_frequency else [])
    assert ("validation", 2) in seen
    assert (("test", 2) in seen) == bool(eval_frequency)


def test_patience_counts_measurements_without_a_better_score() -> None:
    """The baseline is the first; ties are not an improvement."""
    result = train(patience(3), replies=worse, validate_dataset=additions(5))
    assert len(result.history) == 3
    assert result.stopped == "patience(3): the score of 0 was not exceeded in 3 measurements"
    assert train(patience(3), replies=worse).train_scores == [0.0] * 4


def test_patience_restarts_with_each_better_score() -> None:
    """A gain within `min_delta` does not count."""
    scores = [0.1, 0.1, 0.2, 0.2, 0.25]
    reached = Reached(validations=[Evaluation(step=i, score=score, scores=()) for i, score in enumerate(scores)])
    assert patience(2).reason(reached) == ""
    assert patience(2, min_delta=0.05).reason(reached).startswith("patience(2, min_delta=0.05): the score of 0.2 was")
    unjudged = [Evaluation(step=i, score=score, scores=()) for i, score in enumerate([None, 0.5, None, None])]
    assert patience(2).reason(Reached(validations=unjudged)) != ""
    assert patience(1).reason(Reached(validations=unjudged[:1])) == target(0.0).reason(Reached()) == ""


@pytest.mark.parametrize(
    "asked",
    [
        lambda history: len(history) == 3,
        lambda history: len(history) >= 3 and "enough",
        [target(2.0), [lambda history: history[-1].step == 2]],
    ],
)
def test_a_callable_stops_a_run(asked: Any) -> None:
    """It is called with every finished step's report; a string that it returns is the reason."""
    result = train(asked)
    assert len(result.history) == 3
    assert result.stopped in {"<lambda> returned True", "enough"}


async def test_an_async_callable_is_awaited() -> None:
    """A coroutine is truthy, and would stop the run after its first step."""
    seen: list[int] = []

    async def enough(history: Sequence[StepReport]) -> bool:
        await asyncio.sleep(0)
        seen.append(len(history))
        return len(history) == 2

    trainer = AggregatedUpdate(Adder(), LLMOptimizer(llm=ScriptedModel(worse)), llm=ScriptedModel(first_suggestion))
    result = await trainer.atrain(exact, additions(5), batch_size=1, stop=enough)
    assert (seen, result.stopped) == ([1, 2], "enough returned True")


def test_a_callables_error_ends_the_run_and_is_named(tmp_path: Path) -> None:
    """The partial result is on the error and on disk."""

    def broken(history: Sequence[StepReport]) -> bool:
        raise KeyError(len(history))

    with pytest.raises(KeyError) as caught:
        train(broken, run_dir=tmp_path / "run")
    assert caught.value.__notes__ == ["raised by stop=broken, which ends the run"]
    assert len(caught.value.result.history) == 1  # type: ignore[attr-defined]
    assert len(load_result(tmp_path / "run" / RESULT).history) == 1


@pytest.mark.parametrize("wrong", [0.95, True, "patience", target, [patience], lambda: True, Reached, [target(1), 3]])
def test_an_invalid_stop_is_refused_before_the_run_begins(wrong: Any) -> None:
    """This covers a number, a function that was not called, a callable without an argument, and a class."""
    with pytest.raises(ConfigError, match="Expected stop="):
        train(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: target(float("nan")),
        lambda: target("high"),  # type: ignore[arg-type]
        lambda: patience(0),
        lambda: patience(1.5),  # type: ignore[arg-type]
        lambda: patience(1, min_delta=-1),
        lambda: seconds(-1),
        lambda: seconds(float("inf")),
    ],
)
def test_a_stop_with_an_invalid_number_is_refused(wrong: Callable[[], Any]) -> None:
    """The error names the argument."""
    with pytest.raises(
        ConfigError, match="Expected (score of target|measurements of patience|min_delta|seconds) to be"
    ):
        wrong()


def test_a_run_stops_after_a_number_of_seconds(hand: Hand) -> None:
    """The current step is finished; the reason holds no measured time, so that a replay has the same bytes."""
    result = train(seconds(3), agent=Timed(hand, 1.0))
    assert (len(result.history), result.stopped) == (2, "seconds(3) had passed")


@pytest.mark.parametrize("takes", [0.0, 100.0])
def test_a_replay_stops_where_the_recording_did(tmp_path: Path, hand: Hand, takes: float) -> None:
    """The run is the same on a much faster or slower machine."""
    path = tmp_path / "tape.yaml"
    with cassette(path):
        recorded = train(seconds(5), agent=Timed(hand, 1.0))
    with cassette(path, mode="none"):
        replayed = train(seconds(5), agent=Timed(hand, takes))
    assert len(recorded.history) == 3
    assert replayed == recorded


def test_the_decision_of_a_callable_is_replayed(tmp_path: Path) -> None:
    """A callable may read its own clock."""
    path, verdicts = tmp_path / "tape.yaml", iter([False, True])

    def by_its_own_clock(history: Sequence[StepReport]) -> bool:
        return next(verdicts, False)

    with cassette(path):
        recorded = train(by_its_own_clock)
    with cassette(path, mode="none"):
        assert train(by_its_own_clock) == recorded
    assert len(recorded.history) == 2


def test_the_seconds_of_a_run_survive_its_interruption(tmp_path: Path, hand: Hand) -> None:
    """The time before the interruption counts, so that the run ends like an unbroken one."""

    whole = train(seconds(7), agent=Timed(hand, 1.0), run_dir=tmp_path / "whole")
    hand.now = 0.0
    with pytest.raises(KeyboardInterrupt):
        train(seconds(7), agent=Timed(hand, 1.0, breaks_at=4), run_dir=tmp_path / "run")
    hand.now = 1000.0  # another process, whose clock starts at another value
    again = train(seconds(7), agent=Timed(hand, 1.0), run_dir=tmp_path / "run", resume=True)
    assert (len(again.history), again.stopped) == (4, "seconds(7) had passed")
    assert (tmp_path / "run" / RESULT).read_bytes() == (tmp_path / "whole" / RESULT).read_bytes()
    assert whole == again


def test_a_stopped_run_stays_stopped_until_it_gets_other_stops(tmp_path: Path, hand: Hand) -> None:
    """With more time it continues where it was."""
    train(seconds(3), agent=Timed(hand, 1.0), run_dir=tmp_path / "run")
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    same = train(seconds(3), agent=Timed(hand, 1.0), run_dir=tmp_path / "run", resume=True)
    assert (len(same.history), same.stopped) == (2, "seconds(3) had passed")
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before
    longer = train(seconds(6), agent=Timed(hand, 1.0), run_dir=tmp_path / "run", resume=True)
    assert (len(longer.history), longer.stopped) == (3, "seconds(6) had passed")
    rest = train(None, agent=Timed(hand, 1.0), run_dir=tmp_path / "run", resume=True)
    assert (len(rest.history), rest.stopped) == (8, "")


def test_optimize_accepts_stops() -> None:
    """They are passed on to `train`."""
    result = aggregator.optimize(
        Adder(5),
        additions(5),
        guide=exact,
        optimizer=LLMOptimizer(llm=ScriptedModel(from_feedback)),
        rule=majority,
        stop=target(0.9),
        instance_timeout=60,
        run_dir=False,
        show=False,
    )
    assert (len(result.history), result.stopped) == (0, "target(0.9) was reached with a score of 1")


INTERRUPTED = """
import asyncio, sys, os, signal
sys.path.insert(0, sys.argv[2])
from training_fakes import Adder, ScriptedModel, additions, exact, first_suggestion, from_feedback
from aggregator import AggregatedUpdate, LLMOptimizer

class Slow(Adder):
    async def forward(self, x):
        if x == 3:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(3600)
        return await super().forward(x)

class Blocking(Adder):
    def forward(self, x):
        if x == 3:
            os.kill(os.getpid(), signal.SIGINT)
            import time; time.sleep(3600)
        return x + self.amount.data

agent = Blocking() if sys.argv[1].endswith("blocking") else Slow()
optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
trainer = AggregatedUpdate(agent, optimizer, llm=ScriptedModel(first_suggestion), observers=[])
data = [(0, 5), (1, 6), (2, 7), (3, 8)] * 2
run = lambda: trainer.atrain(exact, data, batch_size=1, num_epochs=5, seed=SEED)

async def inside():
    try:
        await run()
    except KeyboardInterrupt as error:
        print("inside", len(error.result.history) > 0)
        raise

ways = {
    "train": lambda: trainer.train(exact, data, batch_size=1, num_epochs=5, seed=SEED),
    "train blocking": lambda: trainer.train(exact, data, batch_size=1, num_epochs=5, seed=SEED),
    "asyncio.run": lambda: asyncio.run(run()),
    "asyncio.run blocking": lambda: asyncio.run(run()),
    "a main coroutine": lambda: asyncio.run(inside()),
}
try:
    ways[sys.argv[1]]()
except KeyboardInterrupt as error:
    result = error.result
    print(type(error).__name__, len(result.history), result.parameters["amount"])
    trainer.restore("last")
    print(agent.amount.data)
"""


@pytest.mark.parametrize("way", ["train", "train blocking", "asyncio.run", "asyncio.run blocking", "a main coroutine"])
def test_ctrl_c_has_the_partial_result_on_the_interrupt(tmp_path: Path, way: str) -> None:
    """This includes `asyncio.run`, which turns a cancellation into the interrupt."""
    order = [i for i in range(200) if first_steps(i)]
    script = INTERRUPTED.replace("SEED", str(order[0]))
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", script, way, str(HERE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "KeyboardInterrupt 2 5\n5\n" in done.stdout, done.stderr
    assert ("inside True" in done.stdout) == (way == "a main coroutine")


def first_steps(seed: int) -> bool:
    """Return True if the third instance in this seed's order is the first one that interrupts."""
    from aggregator.training.batches import minibatches

    order = [ids[0] % 4 for ids in minibatches(8, 1, seed=seed, epoch=0)]
    return order.index(3) == 2


async def test_a_cancelled_run_has_its_partial_result_on_the_cancellation() -> None:
    """A server that cancels a training can read what it reached."""
    reached = asyncio.Event()

    class Waiting(Adder):
        async def forward(self, x: int) -> int:
            if self.amount.data == 5:
                reached.set()
                await asyncio.sleep(3600)
            return await super().forward(x)

    trainer = AggregatedUpdate(
        Waiting(), LLMOptimizer(llm=ScriptedModel(from_feedback)), llm=ScriptedModel(first_suggestion), observers=[]
    )
    async with asyncio.TaskGroup() as group:
        task = group.create_task(trainer.atrain(exact, additions(5), batch_size=1))
        await reached.wait()
        task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.result.parameters["amount"] == 5  # type: ignore[attr-defined]
    assert trainer.restore("last")["amount"] == 5
