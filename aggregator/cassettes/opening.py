"""Which file is read and which is written, in each record mode, and how a recording is finished.

The files of one cassette `name.yaml`: beside it, while something is recorded, `name.yaml.lock`, and
`name.yaml.part` (new episodes) or `name.yaml.new` (mode "all") where a finished cassette already stands,
so that it is never touched before its successor is whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from msgspec import Struct

from aggregator.cassettes.credentials import Redaction
from aggregator.cassettes.exchanges import NOTHING, Recording, Row
from aggregator.cassettes.journal import Journal
from aggregator.cassettes.reading import read
from aggregator.cassettes.rules import DEFAULT_RULES, Adopts, LineageRule, TapeRules
from aggregator.cassettes.saving import FileLock, LayoutChoice, followed, save
from aggregator.cassettes.tape import Tape
from aggregator.errors import ConfigError
from aggregator.files import beside, make_folder

UNWRITTEN = frozenset({".gz", ".har"})
"""Endings of files that are read and never written."""

Mode = Literal["none", "once", "new_episodes", "all"]


def default_mode(environment: Mapping[str, str] = os.environ) -> Mode:
    """Return "none" where CI is set and not empty, else "once".

    >>> default_mode({"CI": "true"}), default_mode({})
    ('none', 'once')
    """
    return "none" if environment.get("CI") else "once"


class _Plan(Struct, frozen=True, kw_only=True):
    """What an open cassette plays, which finished exchanges stay in the file, and where new ones are written."""

    played: tuple[Row, ...]
    findings: tuple[str, ...]
    stays: tuple[Row, ...] = ()
    journal: Path | None = None
    kept: int = 0
    is_anew: bool = False  # nothing of before stays


def open_tape(
    path: str | os.PathLike[str],
    mode: Mode | None = None,
    *,
    rules: TapeRules = DEFAULT_RULES,
    layout: LayoutChoice = "auto",
    private: bool = True,
    now: Callable[[], float] = time.time,
    warn: bool = True,
) -> Tape:
    """Open a cassette without making it the current one; `close` the tape to finish the file.

    Without `warn` what is found stands in the tape's report alone.
    """
    path, mode = followed(Path(path)), mode or default_mode()
    _check(mode, get_args(Mode), "mode")
    _check(rules.lineage, get_args(LineageRule), "lineage")
    _check(rules.adopts, get_args(Adopts), "adopts")
    _check(layout, get_args(LayoutChoice), "layout")
    if path.is_dir():
        raise ConfigError(f"Expected the file of a cassette, got the folder {str(path)!r}; name a file in it")
    plan = _replay(path, mode, rules.redaction)
    if plan is None and not private:
        with suppress(OSError):  # the lock raises what is wrong with the folder, and would make a private one
            make_folder(path.parent, private=False)
    lock = FileLock(path) if plan is None else None
    try:
        plan = plan or _recording(path, mode, rules.redaction)
        if lock is not None and plan.journal is None:  # finished meanwhile, by whoever had the lock
            lock.release()
            lock = None
        journal = Journal(plan.journal, keep=plan.kept, private=private) if plan.journal is not None else None
        tape = Tape(
            plan.played,
            name=str(path),
            sink=journal,
            rules=rules,
            now=now,
            on_close=partial(_finish, path=path, plan=plan, journal=journal, lock=lock, layout=layout, private=private),
        )
        for finding in plan.findings:
            tape.tell(finding, warn=warn)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return tape


def _check(value: str, known: Sequence[str], name: str) -> None:
    if value not in known:
        raise ConfigError(f"Expected {name} to be one of {', '.join(known)}, got {value!r}")


def _replay(path: Path, mode: Mode, redaction: Redaction) -> _Plan | None:
    """Return the plan of a cassette that only plays; None for one that records."""
    if mode in ("new_episodes", "all"):
        return None
    there = read(path, policy=redaction)
    if mode == "once" and (there is None or there.state == "open"):
        return None
    return _Plan(played=(), findings=()) if there is None else _playing(path, there)


def _playing(path: Path, there: Recording) -> _Plan:
    """Return the plan of a finished cassette that only plays; unfinished ones beside it are told."""
    left = tuple(
        f"{beside}: an unfinished recording; {remedy}, or delete it"
        for beside, remedy in (
            (part_of(path), 'record with mode="new_episodes" to take it up'),
            (successor_of(path), 'record with mode="all" to begin it anew'),
        )
        if beside.exists()
    )
    return _Plan(played=there.rows, findings=there.findings + left)


def _recording(path: Path, mode: Mode, redaction: Redaction) -> _Plan:
    """Return the plan of a cassette that records, its lock held; without a journal where there is nothing to."""
    if path.suffix in UNWRITTEN:
        raise ConfigError(
            f"Expected a cassette to record into whose name ends in .yaml, got {str(path)!r}; convert it first: "
            f"aggregator cassette convert {path} {path.with_suffix('').with_suffix('.yaml')}"
        )
    if mode == "all":
        return _Plan(played=(), findings=(), journal=successor_of(path) if path.exists() else path, is_anew=True)
    there = read(path, policy=redaction) or NOTHING
    if there.state == "open":  # new, or its recording was killed: go on where it ended
        return _Plan(played=there.rows, findings=there.findings, journal=path, kept=there.kept)
    if mode == "once":
        return _playing(path, there)
    begun = read(part_of(path)) or NOTHING
    return _Plan(
        played=there.rows + begun.rows,
        findings=there.findings + begun.findings,
        stays=there.rows,
        journal=part_of(path),
        kept=begun.kept,
    )


def part_of(path: Path) -> Path:
    """Return where new episodes of a finished cassette are written until they join it."""
    return beside(path, ".part")


def successor_of(path: Path) -> Path:
    """Return where mode "all" writes until it replaces the cassette."""
    return beside(path, ".new")


def _finish(
    tape: Tape,
    *,
    path: Path,
    plan: _Plan,
    journal: Journal | None,
    lock: FileLock | None,
    layout: LayoutChoice,
    private: bool,
) -> None:
    """Bring the recorded journal into its final form, in place of what stood there."""
    try:
        if journal is None:
            return
        journal.close()
        if tape.ending == "discard":
            journal.undo()
        elif tape.ending == "finish" and (written := read(journal.path)) is not None:
            save(path, plan.stays + written.rows, layout, private=private)
            if journal.path != path:
                journal.path.unlink()
            if plan.is_anew:
                part_of(path).unlink(missing_ok=True)
    finally:
        if lock is not None:
            lock.release()
