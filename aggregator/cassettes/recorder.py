"""`with cassette(path):` - every LLM exchange inside is recorded to the file or played from it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack
from contextvars import Token
from functools import partial
from types import TracebackType

from aggregator import portal
from aggregator.cassettes.credentials import redaction_by
from aggregator.cassettes.current import enter, leave
from aggregator.cassettes.hooks import BeforeRequest, BeforeResponse
from aggregator.cassettes.hosts import ignored_by
from aggregator.cassettes.keys import parse_ignore
from aggregator.cassettes.matching import MatchOn
from aggregator.cassettes.opening import Mode, open_tape
from aggregator.cassettes.rules import DEFAULT_RULES, Adopts, LineageRule, TapeRules
from aggregator.cassettes.saving import LayoutChoice
from aggregator.cassettes.tape import Tape
from aggregator.cassettes.timing import Faults, Latency
from aggregator.errors import CassetteError, ConfigError


class cassette(AbstractContextManager[Tape], AbstractAsyncContextManager[Tape]):  # noqa: N801 - a word at its use
    """Record every LLM exchange inside to `path`, or play it from there; for `with` and `async with` alike.

    `mode` is vcrpy's: "none" plays only, "once" records a cassette that is not there and plays one that is
    (a recording that was killed goes on), "new_episodes" plays what is there and records the rest, "all"
    records everything anew. It defaults to "none" where the environment has CI, else to "once".
    `lineage="strict"` wants the lineage that was recorded, "prefer" falls back to the request alone.
    `clients` names other HTTP clients to serve ("all", or a list, see `aggregator.cassettes.clients`); `latency` is
    "off", "recorded" or a factor; `faults` go wrong on purpose; `ignore` are JSON paths of the body that do not count.
    `match_on` is a key function (request -> bytes), or vcrpy's names of parts and matchers; `allow_playback_repeats`
    plays the last answer again. `ignore_hosts` are left to the network beside the default ones (`hosts.IGNORED_HOSTS`;
    None leaves none), and `ignore_localhost` leaves this machine. `before_record_request` and `before_record_response`
    are vcrpy's hooks. `adopts` says whose calls without a cassette of their own are this one's, see `TapeRules`.
    `redact` are names of fields, and patterns, that are secret beyond the rules; `keep` those that are not;
    `keep_headers` are written beside the usual headers. `code` permits recorded suggestions to run code in this
    process (True, "ask", or the sha256 of each source), which only operations with `sandbox=None` need. `layout` is how
    the file is written at close. New files are for their owner only; `private=False` leaves them to the umask, for a
    cassette to be shared. Without `warn` findings are in `tape.report` alone. `rules` are these options, and those for
    code that opens tapes for others, in one value that replaces the options here.

    Raises when left: CassetteMissError, also one that the code inside has caught, SecretLeakError, CassetteError.
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
        """Finish the file; raise what was hidden, unless it is already on its way out."""
        tape, token, self._tape, self._token = self._tape, self._token, None, None
        if tape is None or token is None:
            return
        leave(tape, token)
        self._stack.close()
        if error is not None and not isinstance(error, Exception):  # Ctrl-C, cancelled: the next run goes on
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
    """Say whether an error, one it came from, or one of its group is of this kind."""
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
