"""A run on disk: atomic, versioned JSON of where it stands, and what it must match to go on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.errors import TrainingError
from aggregator.records import Evaluation, StepReport, TrainingResult, Values

VERSION = 1
JOURNAL = "journal.yaml"
CHECKPOINT = "checkpoint.json"
RESULT = "result.json"


class RunState(Struct, frozen=True, kw_only=True):
    """All that a run must remember between two steps. `steps` counts the finished ones."""

    initial: Values
    values: Values
    steps: int = 0
    history: tuple[StepReport, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    best: Values | None = None
    best_score: float | None = None
    warnings: tuple[str, ...] = ()


class Checkpoint(Struct, frozen=True, kw_only=True):
    """The file: the state, and the fingerprint of the run that it belongs to."""

    version: int
    fingerprint: dict[str, str]
    state: RunState


def digest(value: Any) -> str:
    """Return a short hash of a value's canonical JSON; what JSON does not know counts by its repr."""
    text = msgspec.json.encode(value, enc_hook=repr, order="deterministic")
    return hashlib.sha256(text).hexdigest()[:16]


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole: a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)  # noqa: PTH105 - Path.replace is the same call


def save(run_dir: Path, state: RunState, fingerprint: Mapping[str, str]) -> None:
    """Write the checkpoint."""
    checkpoint = Checkpoint(version=VERSION, fingerprint=dict(fingerprint), state=state)
    write_atomically(run_dir / CHECKPOINT, msgspec.json.encode(checkpoint, enc_hook=repr))


def load(run_dir: Path, fingerprint: Mapping[str, str]) -> RunState | None:
    """Read the checkpoint of an interrupted run; None where there is none yet.

    Raises TrainingError where it cannot be read, or names what differs from this run.
    """
    path = run_dir / CHECKPOINT
    if not path.exists():
        return None
    try:
        checkpoint = msgspec.json.decode(path.read_bytes(), type=Checkpoint)
    except (msgspec.MsgspecError, OSError) as error:
        raise TrainingError(
            f"expected a checkpoint of version {VERSION} in {path}, got one that cannot be read: {error}; "
            "start in a new run_dir, or delete this one"
        ) from error
    changed = [name for name, value in fingerprint.items() if checkpoint.fingerprint.get(name) != value]
    if changed:
        raise TrainingError(
            f"cannot resume {run_dir}: {', '.join(changed)} changed since it was started; "
            "give the same as then, or start in a new run_dir"
        )
    return checkpoint.state


def result_of(state: RunState, parameters: Values) -> TrainingResult:
    """Make the result of where a run stands."""
    from aggregator.llm.ledger import total_by_role

    reports: Sequence[StepReport | Evaluation] = [*state.history, *state.evaluations]
    return TrainingResult(
        parameters=parameters,
        best_parameters=parameters if state.best is None else state.best,
        initial_parameters=state.initial,
        history=state.history,
        evaluations=state.evaluations,
        failures=tuple(failure for report in reports for failure in report.failures),
        warnings=state.warnings,
        usage=total_by_role(report.usage for report in reports),
    )


def save_result(result: TrainingResult, path: str | Path) -> None:
    """Write a result as JSON: the same run gives the same bytes."""
    data = msgspec.json.format(msgspec.json.encode(result, enc_hook=repr), indent=2)
    write_atomically(Path(path), data + b"\n")


def load_result(path: str | Path) -> TrainingResult:
    """Read a result; raises TrainingError where the file is not one."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=TrainingResult)
    except (msgspec.MsgspecError, OSError) as error:
        raise TrainingError(f"expected a training result in {path}, got a file that cannot be read: {error}") from error
