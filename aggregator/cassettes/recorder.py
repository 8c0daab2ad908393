"""`with cassette(path):` records every LLM exchange inside to the file, or plays it from there.

The files of one cassette `name.yaml`, while it is being recorded: `name.yaml.lock`, and `name.yaml.part` (new episodes)
or `name.yaml.new` (mode "all") if a finished cassette exists, which is replaced only once its replacement is complete.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, suppress
from contextvars import Token
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from msgspec import Struct

from aggregator import portal
from aggregator.cassettes.credentials import Redaction, redaction_by
from aggregator.cassettes.exchanges import NOTHING, Recording, Row
from aggregator.cassettes.journal import Journal
from aggregator.cassettes.lineage import enter, leave
from aggregator.cassettes.matching import BeforeRequest, BeforeResponse, MatchOn, parse_ignore
from aggregator.cassettes.rules import DEFAULT_RULES, Adopts, Faults, Latency, LineageRule, TapeRules, ignored_by
from aggregator.cassettes.storage import LayoutChoice, followed, read, save
from aggregator.cassettes.tape import Tape
from aggregator.errors import CassetteError, ConfigError
from aggregator.files import FileLock, make_folder, sibling_path
from aggregator.text import show_call

# Which file is read and which is written

UNWRITTEN = frozenset({".gz", ".har"})
"""Suffixes of files that are read and never written."""

Mode = Literal["none", "once", "new_episodes", "all"]


def default_mode(environment: Mapping[str, str] = os.environ) -> Mode:
    """Return "none" if CI is set and not empty, else "once".

    >>> default_mode({"CI": "true"}), default_mode({})
    ('none', 'once')
    """
    return "none" if environment.get("CI") else "once"


class _Plan(Struct, frozen=True, kw_only=True):
    """The exchanges that an open cassette plays, those that stay in the file, and where new ones are written."""

    played: tuple[Row, ...]
    findings: tuple[str, ...]
    stays: tuple[Row, ...] = ()
    journal: Path | None = None
    kept: int = 0
    is_anew: bool = False  # no previous exchange is kept


def _path_of(path: str | os.PathLike[str]) -> Path:
    """Return the path, or its link's target; raises OSError, RuntimeError or ValueError if it can have no file."""
    found = followed(Path(path))
    with suppress(FileNotFoundError, NotADirectoryError):  # not recorded yet
        found.lstat()
    return found


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
    """Open a cassette without making it the current one; close the tape to finish the file.

    Without `warn` findings are in the tape's report only.
    """
    try:
        path = _path_of(path)
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a null character
        raise ConfigError(f"Expected the path of a cassette, got {str(path)[:200]!r}: {error}") from error
    mode = mode or default_mode()
    _check(mode, get_args(Mode), "mode")
    _check(rules.lineage, get_args(LineageRule), "lineage")
    _check(rules.adopts, get_args(Adopts), "adopts")
    _check(layout, get_args(LayoutChoice), "layout")
    if path.is_dir():
        raise ConfigError(f"Expected the file of a cassette, got the folder {str(path)!r}; name a file in it")
    if path.exists() and not path.is_file():
        raise ConfigError(f"Expected the file of a cassette, got the device or pipe {str(path)!r}; name a file")
    plan = _replay(path, mode, rules.redaction)
    if plan is None and not private:
        with suppress(OSError):  # the lock raises the folder's error, and would create a private one
            make_folder(path.parent, private=False)
    lock = FileLock(path) if plan is None else None
    try:
        plan = plan or _recording(path, mode, rules.redaction)
        if lock is not None and plan.journal is None:  # finished meanwhile, by the last holder of the lock
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
            tape.note(finding, warn=warn)
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
    """Return the plan of a finished cassette that only plays; unfinished ones next to it are reported."""
    left = tuple(
        f"{part}: an unfinished recording; {remedy}, or delete it"
        for part, remedy in (
            (part_of(path), 'record with mode="new_episodes" to take it up'),
            (successor_of(path), 'record with mode="all" to start over'),
        )
        if part.exists()
    )
    return _Plan(played=there.rows, findings=there.findings + left)


def _recording(path: Path, mode: Mode, redaction: Redaction) -> _Plan:
    """Return the plan of a cassette that records, with its lock held; without a journal if nothing is recorded."""
    if path.suffix in UNWRITTEN:
        raise ConfigError(
            f"Expected a cassette to record into whose name ends in .yaml, got {str(path)!r}; convert it first: "
            f"aggregator cassette convert {path} {path.with_suffix('').with_suffix('.yaml')}"
        )
    if mode == "all":
        return _Plan(played=(), findings=(), journal=successor_of(path) if path.exists() else path, is_anew=True)
    there = read(path, policy=redaction) or NOTHING
    if there.state == "open":  # new, or its recording was killed: continue it
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
    """Return where new episodes of a finished cassette are written until they are merged."""
    return sibling_path(path, ".part")


def successor_of(path: Path) -> Path:
    """Return where mode "all" writes until it replaces the cassette."""
    return sibling_path(path, ".new")


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
    """Bring the recorded journal into its final form, and replace the cassette."""
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


class cassette(AbstractContextManager[Tape], AbstractAsyncContextManager[Tape]):  # noqa: N801 - a word at its use
    """Record every LLM exchange inside to `path`, or play it from there; for `with` and `async with` alike.

    `mode` is vcrpy's: "none" plays only, "once" records a missing cassette and plays an existing one (a killed
    recording is continued), "new_episodes" plays what is recorded and records the rest, "all" re-records everything. It
    defaults to "none" if the environment has CI, else to "once". `lineage="strict"` requires the recorded lineage,
    "prefer" falls back to the request alone. `clients` names other HTTP clients to record ("all", or a list, see
    `aggregator.cassettes.clients`); `latency` is "off", "recorded" or a factor; `faults` injects failures; `ignore` are
    JSON paths of the body that are not compared. `match_on` is a key function (request -> bytes), or vcrpy's names of
    parts and matchers; `allow_playback_repeats` plays the last answer again. `ignore_hosts` are not intercepted, like
    the default ones (`rules.IGNORED_HOSTS`; None for none), and with `ignore_localhost` this machine.
    `before_record_request` and `before_record_response` are vcrpy's hooks. `adopts` defines which calls without a
    cassette belong to this one, see `TapeRules`. `redact` are names of fields, and patterns, that are secret in
    addition to the rules; `keep` those that are not; `keep_headers` are written in addition to the usual headers.
    `code` permits recorded suggestions to run code in this process (True, "ask", or the sha256 of each source), which
    only operations with `sandbox=None` need. `layout` is the layout of the finished file. New files are for their owner
    only; with `private=False` the umask decides, for a cassette to be shared. Without `warn` findings are in
    `tape.report` only. `rules` are these options, and further ones, in one value that replaces the options here.

    Raises on exit: CassetteMissError, also one that the code inside has caught, SecretLeakError, CassetteError.

    >>> from tempfile import TemporaryDirectory
    >>> from aggregator import LLM
    >>> from aggregator.testing import FakeTransport
    >>> llm = LLM("openai/gpt-4o-mini", api_key="none", transport=FakeTransport("Hello."))
    >>> with TemporaryDirectory() as folder:
    ...     with cassette(f"{folder}/a.yaml", "once"):
    ...         recorded = llm("Say hello.")
    ...     with cassette(f"{folder}/a.yaml", "none"):
    ...         llm("Say hello.").replayed
    True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mode: Mode | None = None,
        *,
        lineage: LineageRule = "strict",
        clients: str | Sequence[str] = (),
        latency: Latency = "off",
        faults: Faults | None = None,
        ignore: Sequence[str] = (),
        match_on: MatchOn = None,
        allow_playback_repeats: bool = False,
        ignore_hosts: str | Sequence[str] | None = (),
        ignore_localhost: bool = False,
        before_record_request: BeforeRequest | None = None,
        before_record_response: BeforeResponse | None = None,
        redact: Sequence[str | re.Pattern[str]] = (),
        keep: Sequence[str | re.Pattern[str]] = (),
        keep_headers: Sequence[str] = (),
        code: bool | str | Collection[str] = False,
        layout: LayoutChoice = "auto",
        private: bool = True,
        adopts: Adopts = "threads",
        now: Callable[[], float] = time.time,
        warn: bool = True,
        rules: TapeRules | None = None,
    ) -> None:
        given = TapeRules(
            lineage=lineage,
            clients=clients,
            latency=latency,
            faults=faults,
            ignore=parse_ignore(ignore),
            match_on=match_on if match_on is None or callable(match_on) else tuple(match_on),
            allow_playback_repeats=allow_playback_repeats,
            ignore_hosts=ignored_by(ignore_hosts, localhost=ignore_localhost),
            before_request=before_record_request,
            before_response=before_record_response,
            redaction=redaction_by(redact, keep, keep_headers),
            code=code,
            adopts=adopts,
        )
        if rules is not None and given != DEFAULT_RULES:
            raise ConfigError(f"Expected the options of a cassette or rules=, got both; put them into {rules!r}")
        self._rules = given if rules is None else rules
        self._open: Callable[[], Tape] = partial(
            open_tape, path, mode, rules=self._rules, layout=layout, private=private, now=now, warn=warn
        )
        self._warn = warn
        self._stack = ExitStack()
        self._tape: Tape | None = None
        self._token: Token[Tape | None] | None = None
        self._shown = show_call("cassette", os.fspath(path), mode=mode)

    def __repr__(self) -> str:
        return self._shown

    def __enter__(self) -> Tape:
        """Open the tape and make it the current one of this context."""
        if self._tape is not None:
            raise CassetteError(f"Expected a cassette that is not open, got one in use ({self._tape.name})")
        tape = self._open()
        try:
            self._stack.enter_context(portal.carrying())
            if self._rules.clients:
                from aggregator.cassettes.patches import patched

                self._stack.enter_context(patched())
        except BaseException:
            self._stack.close()
            tape.close()
            raise
        self._tape, self._token = tape, enter(tape)
        return tape

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file; raise a hidden error, unless it is already being raised."""
        tape, token, self._tape, self._token = self._tape, self._token, None, None
        if tape is None or token is None:
            return
        leave(tape, token)
        self._stack.close()
        if error is not None and not isinstance(error, Exception):  # Ctrl-C, cancelled: the next run continues
            tape.interrupt()
        try:
            tape.close(warn=self._warn and error is None)
        except CassetteError as remembered:
            if error is None or (isinstance(error, Exception) and not _tells(error, type(remembered))):
                raise

    async def __aenter__(self) -> Tape:
        """Open the tape and make it the current one of this task."""
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file."""
        self.__exit__(kind, error, trace)


def _tells(error: BaseException | None, kind: type[CassetteError]) -> bool:
    """Return True if an error, one of its causes, or one of its group is of this type."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, kind):
            return True
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]
    return False
