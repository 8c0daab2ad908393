"""Ending a run before its last step (`stop=`), and an instance before its answer (`instance_timeout=`).

Both may depend on the clock. A decision of the clock is a mark on the open tape, so that a replay or a resumed run
decides the same on a slower or faster machine.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable
from urllib.parse import quote

import msgspec
from msgspec import Struct

from aggregator.cassettes.lineage import current_lineage, current_tape
from aggregator.checks import accepts, check_finite, check_positive
from aggregator.errors import ConfigError
from aggregator.llm.budget import NOTHING, budgets_of, spent_by
from aggregator.llm.ledger import count
from aggregator.records import Evaluation, HTTPReply, HTTPRequest, Rollout, StepReport, Usage
from aggregator.text import shorten, show_call
from aggregator.training.evaluation import is_lost, lowest_of

_TOLERANCE = 1e-9
_CLOCK = "https://clock.invalid"
"""The address of marks on a tape: `.invalid` is reserved, so no request is ever sent there."""


class Reached(Struct, frozen=True, kw_only=True):
    """The facts for a stop: the reports of the finished steps, the validations, and the seconds of the run so far.

    `validations` begins with the one before training. `seconds` includes those before the run was interrupted.
    """

    history: Sequence[StepReport] = ()
    validations: Sequence[Evaluation] = ()
    seconds: float = 0.0

    def measured(self) -> list[float | None]:
        """Return the scores for a stop: of the validation set, else of the minibatches; never of the test set.

        A lost instance counts as the lowest score, at most 0, so that a few judged instances do not reach a target.
        """
        series: Sequence[Evaluation | StepReport] = self.validations or self.history
        return [_cautious(one) for one in series]


def _cautious(measured: Evaluation | StepReport) -> float | None:
    if measured.score is None:
        return None
    ids = measured.sample_ids if isinstance(measured, StepReport) else range(len(measured.scores))
    lost = {one.sample_id for one in measured.failures if is_lost(one) and one.stage != "proposal"}
    missing = sum(score is None and i in lost for i, score in zip(ids, measured.scores, strict=True))
    every = len(measured.scores)
    return (
        (measured.score * (every - missing) + lowest_of(measured.scores) * missing) / max(every, 1)
        if missing
        else measured.score
    )


@runtime_checkable
class Stop(Protocol):
    """Decides whether a run ends: asked before the first step and after each one."""

    def reason(self, reached: Reached, /) -> str:
        """Return the reason why the run ends, "" if it continues."""
        ...


class Target(Struct, frozen=True):
    """`target(score)`."""

    score: float

    def __repr__(self) -> str:
        return show_call("target", self.score)

    def reason(self, reached: Reached) -> str:
        """Return the reason why the run ends."""
        scores = reached.measured()
        if not scores or scores[-1] is None or scores[-1] < self.score - _TOLERANCE:
            return ""
        return f"{self!r} was reached with a score of {scores[-1]:.4g}"


class Patience(Struct, frozen=True):
    """`patience(measurements, min_delta=...)`."""

    measurements: int
    min_delta: float = 0.0

    def __repr__(self) -> str:
        return show_call("patience", self.measurements, **({"min_delta": self.min_delta} if self.min_delta else {}))

    def reason(self, reached: Reached) -> str:
        """Return the reason why the run ends."""
        best, since = None, 0
        for score in reached.measured():
            if score is not None and (best is None or score > best + self.min_delta):
                best, since = score, 0
            elif best is not None:
                since += 1
        if best is None or since < self.measurements:
            return ""
        return f"{self!r}: the score of {best:.4g} was not exceeded in {since} measurements"


class Seconds(Struct, frozen=True):
    """`seconds(most)`."""

    most: float

    def __repr__(self) -> str:
        return show_call("seconds", self.most)

    def reason(self, reached: Reached) -> str:
        """Return the reason why the run ends, without the measured time, which would differ in each run."""
        return f"{self!r} had passed" if reached.seconds >= self.most else ""


def target(score: float) -> Target:
    """Stop once a score is reached: of the validation set, else of a step's minibatch before its update.

    >>> target(0.9).reason(Reached(validations=[Evaluation(step=0, score=0.95, scores=())]))
    'target(0.9) was reached with a score of 0.95'
    """
    check_finite("score of target", score)
    return Target(float(score))


def patience(measurements: int, *, min_delta: float = 0.0) -> Patience:
    """Stop after this number of consecutive measurements without a better score.

    Measurements are those of the validation set, including the one before training, else the minibatch scores. A score
    is better if it exceeds the best by more than `min_delta`.

    >>> scores = [Evaluation(step=i, score=score, scores=()) for i, score in enumerate([0.5, 0.6, 0.6, 0.4])]
    >>> patience(2).reason(Reached(validations=scores)), patience(3).reason(Reached(validations=scores))
    ('patience(2): the score of 0.6 was not exceeded in 2 measurements', '')
    """
    check_positive("measurements of patience", measurements)
    check_finite("min_delta", min_delta, least=0.0)
    return Patience(measurements, float(min_delta))


def seconds(most: float) -> Seconds:
    """Stop once the run has taken this number of seconds, after the current step. A resumed run continues to count.

    >>> seconds(600).reason(Reached(seconds=600.5))
    'seconds(600) had passed'
    """
    check_finite("seconds", most, least=0.0)
    return Seconds(most)


AnyStop = Stop | Callable[[Sequence[StepReport]], Any]
"""One entry of `stop=`: one of the stops above, an object with `reason(reached)`, or a callable of the history."""


def check_stops(given: Any) -> tuple[Any, ...]:
    """Return the entries of `stop=` in order, () for None; raises ConfigError for anything that cannot stop a run."""
    entries = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    if any(isinstance(entry, list | tuple) for entry in entries):
        entries = [inner for entry in entries for inner in check_stops(entry)]
    for entry in entries:
        is_stop = isinstance(entry, Stop) and not isinstance(entry, type)
        if any(entry is factory for factory in (target, patience, seconds)):
            raise ConfigError(f"Expected stop={entry.__name__}(...), got the function itself; call it")
        if not is_stop and (not callable(entry) or isinstance(entry, type) or not accepts(entry, ())):
            raise ConfigError(
                f"Expected stop= with target(0.95), patience(3), seconds(600), a callable of the history, or a list of "
                f"these, got {shorten(entry)}"
            )
    return tuple(entries)


def needs_clock(stops: Iterable[Any]) -> bool:
    """Return True if the same history may give another decision: a stop by time, or a user's own."""
    return not all(isinstance(stop, Target | Patience) for stop in stops)


async def first_reason(stops: Iterable[Any], reached: Reached, ask: Callable[..., Any]) -> str:
    """Return the reason of the first stop that ends the run, or "".

    `await ask(function, history)` calls a user's function, once there is a history. Raises the function's exception,
    with a note that names it.
    """
    for stop in stops:
        if isinstance(stop, Stop):
            reason = stop.reason(reached)
        elif not reached.history:
            continue
        else:
            name = getattr(stop, "__name__", type(stop).__name__)
            try:
                verdict = await ask(stop, reached.history)
            except Exception as error:
                error.add_note(f"raised by stop={name}, which ends the run")
                raise
            reason = verdict if isinstance(verdict, str) else f"{name} returned True" if verdict else ""
        if reason:
            return reason
    return ""


class Clock:
    """The seconds of a run, including those before an interruption."""

    def __init__(self, before: float = 0.0) -> None:
        self.set(before)

    def set(self, elapsed: float) -> None:
        """Continue from this number of seconds, as in a replay."""
        self._began = time.monotonic() - elapsed

    def seconds(self) -> float:
        """Return the seconds so far."""
        return time.monotonic() - self._began


class Mark:
    """A decision of the clock at one place of a run, kept on the open tape.

    The place is the current lineage. `recorded` is the recorded decision, or None. `is_live` is False while a tape only
    plays: the clock is not used then.
    """

    def __init__(self, kind: str) -> None:
        self._tape = tape = current_tape()
        self.is_live = tape is None or tape.records
        self.recorded: bytes | None = None
        if tape is None:
            return
        place = f"{_CLOCK}/{kind}/{quote(current_lineage())}"
        headers = {"content-type": "application/json"}
        self._slot = tape.issue(HTTPRequest(url=place, body=b"{}", headers=headers))
        reply = tape.recall(self._slot)
        if reply is not None:
            self.recorded = reply.body
        elif not tape.records:
            tape.withdraw(self._slot)

    async def keep(self, decided: Struct) -> None:
        """Record the decision, unless it was replayed or no tape records."""
        if self._tape is not None and self._tape.records and self.recorded is None:
            headers = {"content-type": "application/json"}
            reply = HTTPReply(status=200, reason="OK", body=msgspec.json.encode(decided), headers=headers)
            await self._tape.arecord(self._slot, reply)


class Decided(Struct, frozen=True, kw_only=True):
    """The mark of one decision of the stops: the clock's time, and why the run ended, "" if it continued."""

    seconds: float
    reason: str = ""


async def decide(stops: Sequence[Any], name: str, reached: Reached, clock: Clock, ask: Callable[..., Any]) -> str:
    """Return the reason why a run ends here, or "": as recorded for stops of this name, else as the stops decide."""
    if not needs_clock(stops):
        return await first_reason(stops, reached, ask)
    mark = Mark(f"stop/{name}")
    if mark.recorded is not None:
        decided = msgspec.json.decode(mark.recorded, type=Decided)
        clock.set(decided.seconds)
        return decided.reason
    elapsed = clock.seconds()
    reason = await first_reason(stops, msgspec.structs.replace(reached, seconds=elapsed), ask)
    await mark.keep(Decided(seconds=round(elapsed, 3), reason=reason))
    return reason


class TimedOut(Struct, frozen=True, kw_only=True):
    """The mark of one instance with `instance_timeout=`, and of its rollout if that was cut off.

    `stage` is the one that took too long, "agent" or "guide", or "" if the instance ended in time. Its calls count as
    `usage`, by role.
    """

    stage: str = ""
    seconds: float = 0.0
    transcript: str = ""
    scores: Mapping[str, float] = {}
    usage: tuple[tuple[str, Usage], ...] = ()

    @classmethod
    def of(cls, rollout: Rollout, stage: str, limit: float | None, usage: Iterable[tuple[str, Usage]]) -> TimedOut:
        """Return the mark of a rollout; calls of an agent that ended in time are made again, and not in it."""
        if not stage or limit is None:
            return cls()
        made = [(role, used) for role, used in usage if stage == "agent" or role == "guide"]
        return cls(
            stage=stage,
            seconds=limit,
            transcript=rollout.transcript,
            scores=rollout.scores,
            usage=tuple(sorted(made, key=msgspec.json.encode)),
        )

    def count(self) -> None:
        """Count the instance's calls in ledger and budgets, because it is not run again."""
        tape = current_tape()
        if tape is not None:
            tape.pass_over(current_lineage() + ("/guide" if self.stage == "guide" else ""))
        for role, usage in self.usage:
            count(role, usage)
            for budget in budgets_of(None):
                budget.settle(NOTHING, spent_by(usage, NOTHING))


def interrupt_of(error: BaseException) -> KeyboardInterrupt | None:
    """Return the interrupt that ended this task, with the error's result; None for any other error.

    On Ctrl-C `asyncio.run` cancels its main task and then raises its own KeyboardInterrupt, which would lose the
    partial result. The task raises this one instead.
    """
    handler: Any = signal.getsignal(signal.SIGINT)
    runner = getattr(getattr(handler, "func", None), "__self__", None)
    if not isinstance(error, asyncio.CancelledError) or not getattr(runner, "_interrupt_count", 0):
        return None
    if handler.keywords.get("main_task") is not asyncio.current_task():
        return None
    interrupt = KeyboardInterrupt()
    vars(interrupt).update(vars(error))
    return interrupt
