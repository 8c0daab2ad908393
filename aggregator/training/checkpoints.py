"""A run on disk: checkpoint, result, lock and journal. Files are written atomically and carry a version."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from aggregator import portal
from aggregator.agents.parameters import ParameterNode
from aggregator.cassettes.lineage import WATCH, current_tape
from aggregator.cassettes.recorder import cassette
from aggregator.cassettes.rules import TapeRules
from aggregator.errors import CassetteError, CassetteLockedError, ConfigError, TrainingError, TrainingWarning
from aggregator.executors.work import failures_left
from aggregator.files import FileLock, write_atomically
from aggregator.llm.budget import Budget, Spending, spending
from aggregator.llm.ledger import collecting
from aggregator.llm.observed import part_here
from aggregator.records import NO_USAGE, Candidate, Evaluation, Failure, Kept, StepReport, TrainingResult, Usage, Values
from aggregator.text import canonical_json

VERSION = 1
RESULT_VERSION = 1
"""The version of result.json; a file without one predates versions and is read as this one."""
JOURNAL = "journal.yaml"
CHECKPOINT = "checkpoint.json"
RESULT = "result.json"
PARAMETERS = "parameters.json"
CANDIDATES = "candidates"
"""The name under which a run's memory holds its search's pool."""

COMPARED = "compared by revision"
AGENT_CODE = "agent code"
OTHER_REVISION = (
    "another revision of aggregated-update wrote this checkpoint, and it compared the code of parts in another way: "
    "resume with that revision, or start in a new run_dir"
)

NO_TRANSCRIPT = (
    "no transcript: nothing that the agent did in the first step was seen, so that the optimizer knows its inputs, "
    "outputs and feedback only; call models through LLM or observe your client's, or put @bundle on its operations"
)
"""The warning of a run in which no call of the agent is observed."""


# ---- the state of a run


class Score(Struct, frozen=True, array_like=True):
    """What a run remembers of a rollout."""

    score: float | None
    scores: dict[str, float] = {}
    failure: Failure | None = None


class Known(Struct, frozen=True):
    """The scores of one set of values, by instance; `step` is the last step that requested one."""

    step: int
    scores: dict[str, Score]


Memory = dict[str, Known]
"""The scores that a run remembers, by the values' digest."""


class Streak(Struct, frozen=True, kw_only=True):
    """The recent results of a run's rollouts with its current values, in the order of the samples.

    `succeeded` says that one instance has been run and judged; `length` counts the latest rollouts that failed in the
    same way, `key`, under the same values.
    """

    succeeded: bool = False
    key: tuple[str, ...] = ()
    length: int = 0


class RunState(Struct, frozen=True, kw_only=True, rename={"memory": "notes"}):
    """What a run must remember between two steps. `steps` counts the finished ones.

    `memory` is what gates remember, and the pool of a search under CANDIDATES; `scores` is what evaluations found out.
    `skipped` are the ids of the training samples that are left out. `broken_off` says that calls failed until the run
    ended: a resumed run makes them again; `unseen`, that the transcripts of the first step were empty. `stopped` is the
    reason of the stop that ended the run, `stops` the hash of its `stop=`, and `seconds` the run's duration if a stop
    needs it.
    """

    initial: Values
    values: Values
    steps: int = 0
    history: tuple[StepReport, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    best: Values | None = None
    best_step: int | None = None
    validations: tuple[Evaluation, ...] = ()
    memory: dict[str, Any] = {}
    scores: Memory = {}
    streak: Streak = Streak()
    skipped: tuple[int, ...] = ()
    broken_off: bool = False
    unseen: bool = False
    stopped: str = ""
    stops: str = ""
    seconds: float = 0.0


class _Versioned(Struct, frozen=True):
    """The version of a file, read first: the other fields depend on it."""

    version: int = 1


class Checkpoint(Struct, frozen=True, kw_only=True):
    """The file: the state, and the fingerprint of its run."""

    version: int
    fingerprint: dict[str, str]
    state: RunState


# ---- writing and reading


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file as a whole.

    A crash leaves the old one or the new one; raises TrainingError if it cannot be written.
    """
    try:
        write_atomically(path, data, sole_writer=True)
    except OSError as error:
        raise TrainingError(
            f"Expected to write {path}, got {error}; free some space or make the folder writable. "
            "A run continues from its last checkpoint with resume=True"
        ) from error


def save(run_dir: Path, state: RunState, fingerprint: Mapping[str, str]) -> None:
    """Write the checkpoint."""
    checkpoint = Checkpoint(version=VERSION, fingerprint=dict(fingerprint), state=state)
    write_whole(run_dir / CHECKPOINT, msgspec.json.encode(checkpoint, enc_hook=repr))


def load(run_dir: Path, fingerprint: Mapping[str, str]) -> RunState | None:
    """Read the checkpoint of an interrupted run; None without one.

    Raises TrainingError if it cannot be read, or belongs to a different run; the error names the difference.
    """
    path = run_dir / CHECKPOINT
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Versioned).version
        checkpoint = msgspec.json.decode(data, type=Checkpoint) if version == VERSION else None
    except (msgspec.MsgspecError, OSError) as error:
        raise TrainingError(
            f"Expected a checkpoint of version {VERSION} in {path}, got one that cannot be read: {error}; "
            "start in a new run_dir, or delete this one"
        ) from error
    if checkpoint is None:
        raise TrainingError(
            f"Expected a checkpoint of version {VERSION} in {path}, got version {version}; "
            "resume with the release of aggregated-update that wrote it, or start in a new run_dir"
        )
    before = checkpoint.fingerprint
    is_earlier = "guide" not in before  # an earlier revision wrote fewer fields, under other names
    known = [name for name in fingerprint if name in before] if is_earlier else list({**fingerprint, **before})
    changed = [name for name in known if not _continues(name, before.get(name), fingerprint.get(name))]
    if changed:
        is_comparable = is_earlier or before.get(COMPARED) == fingerprint.get(COMPARED)
        remedy = "give the same as then, or start in a new run_dir" if is_comparable else OTHER_REVISION
        raise TrainingError(
            f"Expected what the run in {run_dir} was started with, got other values of {', '.join(changed)}; {remedy}"
        )
    if before.get(AGENT_CODE, fingerprint.get(AGENT_CODE)) != fingerprint.get(AGENT_CODE):
        warnings.warn(
            f"the agent's code is not that with which the run in {run_dir} was started: its first "
            f"{checkpoint.state.steps} steps and their scores are those of the earlier code; if it changes the agent's "
            "answers, start in a new run_dir",
            TrainingWarning,
            stacklevel=2,
        )
    return checkpoint.state


def _continues(name: str, before: str | None, now: str | None) -> bool:
    """Return True if a run can continue with these settings: the same, more epochs, or mended code of the agent."""
    if name in (COMPARED, AGENT_CODE):
        return True
    if name == "num_epochs" and before is not None and now is not None and before.isdecimal() and now.isdecimal():
        return int(now) >= int(before)
    return now == before


# ---- results


def result_of(state: RunState, parameters: Values, kept: Kept) -> TrainingResult:
    """Make the result of a run's current state; `parameters` are the last values."""
    from aggregator.llm.ledger import total_by_role

    reports: Sequence[StepReport | Evaluation] = [*state.history, *state.evaluations, *state.validations]
    best = parameters if state.best is None else state.best
    usage = total_by_role([report.usage for report in reports])
    failures = tuple([failure for report in reports for failure in report.failures])
    return TrainingResult(
        parameters=best if kept == "best" else parameters,
        best_parameters=best,
        initial_parameters=state.initial,
        history=state.history,
        evaluations=state.evaluations,
        failures=failures,
        warnings=(*([NO_TRANSCRIPT] if state.unseen else []), *failures_left(failures), *_warnings(usage)),
        usage=usage,
        candidates=candidates_in(state.memory),
        skipped_samples=state.skipped,
        validations=state.validations,
        kept=kept,
        last_parameters=parameters,
        best_step=state.best_step,
        stopped=state.stopped,
    )


def candidates_in(memory: Mapping[str, Any]) -> list[Candidate]:
    """Return the pool of a search, the current candidate first."""
    return msgspec.convert(memory.get(CANDIDATES, []), list[Candidate])


def _warnings(usage: Mapping[str, Usage]) -> Iterator[str]:
    """Yield warnings about a result."""
    unknown = {role: spent.calls for role, spent in usage.items() if spent.calls and spent.cost is None}
    if unknown:
        calls = ", ".join(f"{role} {count}" for role, count in unknown.items())
        yield (
            f"the cost of these calls is unknown: {calls}; give LLM(..., prices={{...}}), or install "
            "aggregated-update[prices]"
        )


def save_result(result: TrainingResult, path: str | Path) -> None:
    """Write a result as JSON with the version of the format: the same run gives the same bytes."""
    versioned = {"version": RESULT_VERSION, **asdict(result)}
    data = msgspec.json.format(canonical_json(versioned, repr), indent=2)
    write_whole(Path(path), data + b"\n")


def load_result(path: str | Path) -> TrainingResult:
    """Read a result; raises TrainingError if the file is not one, or was written by a later release."""
    try:
        data = Path(path).read_bytes()
        version = msgspec.json.decode(data, type=_Versioned).version
        result = msgspec.json.decode(data, type=TrainingResult) if version <= RESULT_VERSION else None
    except (msgspec.MsgspecError, OSError) as error:
        raise TrainingError(f"Expected a training result in {path}, got a file that cannot be read: {error}") from error
    if result is None:
        raise TrainingError(
            f"Expected a training result of version {RESULT_VERSION} at most in {path}, got version {version}; "
            "upgrade aggregated-update"
        )
    return result


# ---- run folders


@contextmanager
def claim(run_dir: Path | None, parameters: Sequence[ParameterNode[Any]]) -> Iterator[None]:
    """Keep other runs away from the parameters, which would change during both, and other processes from the run_dir.

    Raises ConfigError if another run trains a parameter, CassetteLockedError if one uses the run_dir, TrainingError if
    it cannot be written to.
    """
    for one in parameters:
        if one.in_run == id(one):  # a copy has the number of its original
            raise ConfigError(
                f"Expected an agent that no other run is training, got one whose parameter {one.name!r} is in a run; "
                "give each run an agent of its own, or wait for the first"
            )
    lock = None if run_dir is None else _lock(run_dir)
    try:
        for one in parameters:
            one.in_run = id(one)
        yield
    finally:
        for one in parameters:
            one.in_run = 0
        if lock is not None:
            lock.release()


def _lock(run_dir: Path) -> FileLock:
    try:
        return FileLock(run_dir / CHECKPOINT)
    except CassetteLockedError as error:
        raise CassetteLockedError(f"Expected no other run in {run_dir}, got one: {error}") from None
    except CassetteError as error:
        raise TrainingError(
            f"Expected to keep the run in {run_dir}, got {error.__cause__}; make the folder writable, "
            "or choose another run_dir"
        ) from error


@contextmanager
def open_journal(run_dir: Path | None, state: RunState) -> Iterator[None]:
    """Open the run's own journal, unless the caller has a cassette open.

    Paid answers are on disk before they are used.
    """
    if run_dir is None or current_tape() is not None:
        yield
        return
    path = run_dir / JOURNAL
    rules = TapeRules(
        adopts="nothing",  # other threads of the process do not belong to the run
        expects_all=False,  # steps before the last checkpoint are not played again
        code=True,  # it plays only what this run wrote
        plays_failures=not state.broken_off,  # the cause of a failed run may have been fixed
    )
    with cassette(
        path, mode="new_episodes", layout="journal", warn=False, rules=rules
    ):  # an incomplete tape is expected
        yield


@contextmanager
def count_in(budget: Budget | None, run_dir: Path | None, state: RunState, *, resumed: bool) -> Iterator[None]:
    """Count every call of the run, from any client and thread, and what it had spent at its checkpoint.

    Exchanges of an interrupted step, which are replayed, count in full, unless this budget has counted them before.
    Without a budget an outer one continues to count.
    """
    run = None if run_dir is None else str(run_dir.resolve())
    if budget is not None and run is not None:
        reports: Sequence[StepReport | Evaluation] = [*state.history, *state.evaluations, *state.validations]
        budget.carry(run, _spending(usage for report in reports for usage in report.usage.values()), resumed=resumed)
    with portal.carrying():
        if budget is None:
            yield
            return
        with spending(budget), collecting() as ledger:
            try:
                yield
            finally:
                if run is not None:
                    budget.remember(run, _spending(ledger.totals().values()))


def _spending(usages: Iterable[Usage]) -> Spending:
    usage = sum(usages, NO_USAGE)
    return Spending(usd=usage.cost or 0.0, tokens=usage.total_tokens or 0, calls=usage.calls)


@contextmanager
def raise_misses() -> Iterator[None]:
    """Raise the cassette's miss that user code has hidden: what follows it was not recorded.

    The same holds for calls that were refused to an SDK, such as one beyond the budget.
    """
    tape = current_tape()
    known = len(tape.misses) if tape is not None else 0
    yield
    if WATCH.get() is not None and (part := part_here()) is not None:
        part.check()
    if tape is not None and len(tape.misses) > known:
        raise tape.misses[known]
