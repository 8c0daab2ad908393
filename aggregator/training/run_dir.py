"""What surrounds a run: the lock of its folder, its journal, its budget, and the misses of the cassette it plays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from aggregator import portal
from aggregator.cassettes.lineage import current_tape
from aggregator.cassettes.recorder import cassette
from aggregator.cassettes.rules import TapeRules
from aggregator.cassettes.storage import FileLock
from aggregator.errors import CassetteError, CassetteLockedError, TrainingError
from aggregator.llm.budget import Budget, Spending, spending
from aggregator.records import NO_USAGE, Evaluation, StepReport
from aggregator.training import checkpoints
from aggregator.training.plan import Plan


@contextmanager
def claim_run_dir(plan: Plan) -> Iterator[None]:
    """Keep other processes out of the run_dir.

    Raises CassetteLockedError if one is in it, TrainingError if nothing can be written there.
    """
    if plan.run_dir is None:
        yield
        return
    try:
        lock = FileLock(plan.run_dir / checkpoints.CHECKPOINT)
    except CassetteLockedError as error:
        raise CassetteLockedError(f"another run is in {plan.run_dir}: {error}") from None
    except CassetteError as error:
        raise TrainingError(
            f"expected to keep the run in {plan.run_dir}, got {error.__cause__}; make the folder writable, "
            "or choose another run_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def load_state(plan: Plan, marks: Any) -> checkpoints.RunState | None:
    """Return where an interrupted run stands; None for a new one."""
    if plan.run_dir is None or not plan.resume:
        return None
    return checkpoints.load(plan.run_dir, marks)


@contextmanager
def open_journal(plan: Plan, state: checkpoints.RunState) -> Iterator[None]:
    """The run's own journal, unless the caller has a cassette open: what was paid for is on disk before it is used."""
    if plan.run_dir is None or current_tape() is not None:
        yield
        return
    path = plan.run_dir / checkpoints.JOURNAL
    rules = TapeRules(
        adopts="nothing",  # other threads of the process have nothing to do with the run
        expects_all=False,  # steps behind the last checkpoint are not played again
        code=True,  # the run's own: it wrote what it plays
        plays_failures=not state.broken_off,  # what ended the run may have been mended
    )
    with cassette(path, mode="new_episodes", layout="journal", warn=False, rules=rules):  # a cut-off tape is expected
        yield


@contextmanager
def count_in(budget: Budget | None, plan: Plan, state: checkpoints.RunState) -> Iterator[None]:
    """Count every call of the run, whichever client and thread makes it, and what it had spent at its checkpoint.

    Exchanges of an interrupted step, which are replayed, count as they are. Without a budget an outer one goes on
    counting.
    """
    if budget is not None and plan.run_dir is not None:
        reports: Sequence[StepReport | Evaluation] = [*state.history, *state.evaluations, *state.validations]
        usage = sum((usage for report in reports for usage in report.usage.values()), NO_USAGE)
        spent = Spending(usd=usage.cost or 0.0, tokens=usage.total_tokens, calls=usage.calls)
        budget.carry(str(plan.run_dir.resolve()), spent)
    with portal.carrying():
        if budget is None:
            yield
            return
        with spending(budget):
            yield


@contextmanager
def raise_misses() -> Iterator[None]:
    """Raise the cassette's miss that code inside has hidden: nothing after it is what was recorded."""
    tape = current_tape()
    known = len(tape.misses) if tape is not None else 0
    yield
    if tape is not None and len(tape.misses) > known:
        raise tape.misses[known]
