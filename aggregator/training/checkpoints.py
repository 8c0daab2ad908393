"""A run on disk: atomic, versioned JSON of where it stands, and what it must match to go on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.errors import TrainingError
from aggregator.executors.blame import failures_left
from aggregator.files import write_atomically
from aggregator.records import Candidate, Evaluation, Failure, Kept, StepReport, TrainingResult, Usage, Values
from aggregator.text import canonical_json, show
from aggregator.training.identity import content_of

VERSION = 1
JOURNAL = "journal.yaml"
CHECKPOINT = "checkpoint.json"
RESULT = "result.json"
PARAMETERS = "parameters.json"
CANDIDATES = "candidates"
"""The name under which the memory of a run holds the pool of its search."""

NO_TRANSCRIPT = (
    "no transcript: nothing that the agent did in the first step was seen, so that the optimizer knows its inputs, "
    "outputs and feedback only; call models through LLM or observe your client's, or put @bundle on its operations"
)
"""The warning of a run whose agent does nothing that is observed."""

_WHOLE = 2**62


class Score(Struct, frozen=True, array_like=True):
    """What is remembered of a rollout."""

    score: float | None
    scores: dict[str, float] = {}
    failure: Failure | None = None


class Known(Struct, frozen=True):
    """The scores of one set of values, by instance; `step` is the last step that asked for one."""

    step: int
    scores: dict[str, Score]


Memory = dict[str, Known]
"""The scores that a run remembers, by the digest of the values."""


class Streak(Struct, frozen=True, kw_only=True):
    """What the rollouts of a run under its current values have come to, in the order of the samples.

    `succeeded` says that one instance has been run and judged; `length` counts the latest rollouts that failed in the
    same way, `key`, under the same values.
    """

    succeeded: bool = False
    key: tuple[str, ...] = ()
    length: int = 0


class RunState(Struct, frozen=True, kw_only=True, rename={"memory": "notes"}):
    """All that a run must remember between two steps. `steps` counts the finished ones.

    `memory` is what gates remember, and the pool of a search under CANDIDATES; `scores` is what evaluations found out.
    `skipped` are the ids of the training samples that are left out. `broken_off` says that calls failed until the run
    ended: a resumed run makes them again; `unseen`, that the transcripts of the first step were empty.
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


class _Versioned(Struct, frozen=True):
    """The version of a checkpoint, read first: the other fields depend on it."""

    version: int


class Checkpoint(Struct, frozen=True, kw_only=True):
    """The file: the state, and the fingerprint of the run that it belongs to."""

    version: int
    fingerprint: dict[str, str]
    state: RunState


def digest(value: Any) -> str:
    """Return a short hash of a value's canonical JSON.

    Of what JSON cannot carry it hashes arrays, frames and images byte for byte, other objects by their attributes, and
    the rest as it is shown, without addresses.

    >>> digest({"a": object(), "b": 1}) == digest({"b": 1, "a": object()})
    True
    """
    try:
        text = canonical_json(value, _show_whole)
    except (TypeError, ValueError, RecursionError):  # keys of other kinds, lone surrogates, a list that holds itself
        text = show(value, _WHOLE).encode(errors="backslashreplace")
    return hashlib.sha256(text).hexdigest()[:16]


def _show_whole(value: Any) -> Any:
    content = content_of(value)
    if content is not None:
        return content
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict) and held and not callable(value):
        return [type(value).__qualname__, held]
    return show(value, _WHOLE)


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file as a whole: a crash leaves the old one or the new one; raises TrainingError where it cannot."""
    try:
        write_atomically(path, data, sole_writer=True)
    except OSError as error:
        raise TrainingError(
            f"expected to write {path}, got {error}; free some space or make the folder writable. "
            "A run goes on from its last checkpoint with resume=True"
        ) from error


def save(run_dir: Path, state: RunState, fingerprint: Mapping[str, str]) -> None:
    """Write the checkpoint."""
    checkpoint = Checkpoint(version=VERSION, fingerprint=dict(fingerprint), state=state)
    write_whole(run_dir / CHECKPOINT, msgspec.json.encode(checkpoint, enc_hook=repr))


def load(run_dir: Path, fingerprint: Mapping[str, str]) -> RunState | None:
    """Read the checkpoint of an interrupted run; None where there is none yet.

    Raises TrainingError where it cannot be read, or names what differs from this run.
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
            f"expected a checkpoint of version {VERSION} in {path}, got one that cannot be read: {error}; "
            "start in a new run_dir, or delete this one"
        ) from error
    if checkpoint is None:
        raise TrainingError(
            f"expected a checkpoint of version {VERSION} in {path}, got version {version}; "
            "resume with the release of aggregated-update that wrote it, or start in a new run_dir"
        )
    before = checkpoint.fingerprint
    is_earlier = "guide" not in before  # an earlier revision wrote less
    known = [name for name in fingerprint if name in before or not is_earlier]
    changed = [name for name in known if not _continues(name, before.get(name), fingerprint[name])]
    if changed:
        raise TrainingError(
            f"cannot resume {run_dir}: {', '.join(changed)} changed since it was started; "
            "give the same as then, or start in a new run_dir"
        )
    return checkpoint.state


def _continues(name: str, before: str | None, now: str) -> bool:
    """Return True if a run can go on with this: the same, or more epochs."""
    if name == "num_epochs" and before is not None and before.isdecimal() and now.isdecimal():
        return int(now) >= int(before)
    return now == before


def result_of(state: RunState, parameters: Values, kept: Kept) -> TrainingResult:
    """Make the result of where a run stands; `parameters` are the last values."""
    from aggregator.llm.ledger import total_by_role

    reports: Sequence[StepReport | Evaluation] = [*state.history, *state.evaluations, *state.validations]
    best = parameters if state.best is None else state.best
    usage = total_by_role(report.usage for report in reports)
    failures = tuple(failure for report in reports for failure in report.failures)
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
    )


def candidates_in(memory: Mapping[str, Any]) -> list[Candidate]:
    """Return the pool of a search, the current candidate first."""
    return msgspec.convert(memory.get(CANDIDATES, []), list[Candidate])


def _warnings(usage: Mapping[str, Usage]) -> Iterator[str]:
    """Yield what is worth a look in a result."""
    unknown = {role: spent.calls for role, spent in usage.items() if spent.calls and spent.cost is None}
    if unknown:
        calls = ", ".join(f"{role} {count}" for role, count in unknown.items())
        yield (
            f"the cost of these calls is unknown: {calls}; give LLM(..., prices={{...}}), or install "
            "aggregated-update[prices]"
        )


def save_result(result: TrainingResult, path: str | Path) -> None:
    """Write a result as JSON: the same run gives the same bytes."""
    data = msgspec.json.format(canonical_json(result, repr), indent=2)
    write_whole(Path(path), data + b"\n")


def load_result(path: str | Path) -> TrainingResult:
    """Read a result; raises TrainingError where the file is not one."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=TrainingResult)
    except (msgspec.MsgspecError, OSError) as error:
        raise TrainingError(f"expected a training result in {path}, got a file that cannot be read: {error}") from error
