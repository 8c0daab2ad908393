"""The cassette of one test: opened around it, the network refused while it replays, dropped unless it passes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from aggregator.cassettes.exchanges import exchange_id
from aggregator.cassettes.hosts import IGNORED_HOSTS, host_of, ignored_by
from aggregator.cassettes.opening import Mode
from aggregator.cassettes.recorder import cassette
from aggregator.cassettes.tape import Tape
from aggregator.errors import CassetteError, CassetteWarning
from aggregator.testing.network import refuse_connections

Unplayed = Literal["ignore", "report", "error"]
SHOWN = 5
WIDER = "it comes before the test's cassette is open, from a fixture of wider scope than a function"
WIDER_REMEDY = "ask the model in a fixture of function scope, or allow the host (allowed_hosts=...)"


def refuse_early(path: Path, allowed_hosts: Iterable[str], met: list[CassetteError]) -> AbstractContextManager[None]:
    """Refuse the network to fixtures that are set up before the cassette of the first test that uses them."""
    return refuse_connections(f"{path} is to be replayed, and {WIDER}", allowed_hosts, remedy=WIDER_REMEDY, met=met)


class Taping:
    """A context manager around one test. `tape` is open inside; the plugin sets `passed` when the test passes."""

    tape: Tape

    def __init__(
        self,
        path: Path,
        *,
        mode: Mode,
        options: Mapping[str, Any],
        unplayed: Unplayed = "report",
        allowed_hosts: Iterable[str] = (),
        refusals: list[CassetteError],
    ) -> None:
        self.path = path
        self.passed = False
        self._refusals = refusals
        # threads and loops that were started before have no context of this test
        self._cassette = cassette(path, mode, adopts="everything", **options)
        self._unplayed = unplayed
        ignored = ignored_by(options.get("ignore_hosts") or (), localhost=bool(options.get("ignore_localhost")))
        own = [host_of(f"//{entry}") for entry in ignored if entry not in IGNORED_HOSTS]
        self._allowed_hosts = (*allowed_hosts, *own)
        self._stack = ExitStack()
        self._found = 0

    def __enter__(self) -> Self:
        """Open the cassette; a tape that only plays refuses the network."""
        self.tape = self._stack.enter_context(self._cassette)
        self._found = len(self.tape.unplayed())
        if not self.tape.records:
            self._stack.enter_context(
                refuse_connections(
                    f"{self.path} is being replayed",
                    self._allowed_hosts,
                    met=self._refusals,
                    unreported=self.tape.left_out,
                )
            )
        return self

    def settle(self) -> None:
        """Raise what the test's code hid, and with unplayed='error' what it did not play, while the test can fail."""
        self._raise_hidden()
        left = self.tape.unplayed()
        if left and self._unplayed == "error":
            listing = "\n".join(f"  {exchange_id(row)}" for row in left[:SHOWN])
            more = f"\n  and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            raise CassetteError(
                f"Expected every exchange of {self.path} to be played, got {len(left)} left over:\n{listing}{more}\n"
                "record the test again (--cassette-mode=all), or allow it: unplayed='report'"
            )

    def _raise_hidden(self) -> None:
        self.tape.flush()
        self.tape.raise_remembered()
        for refusal in self._refusals:
            raise CassetteError(f"{refusal}") from refusal

    def unreported(self, report: str) -> str:
        """Return misses and blocked connections that the failure report does not already mention."""
        hidden = [
            error for error in (*self.tape.misses, *self._refusals) if f"{error}".partition("\n")[0] not in report
        ]
        missing = [f"{type(error).__name__}: {error}" for error in hidden]
        more = [f"and {len(missing) - SHOWN} more"] if len(missing) > SHOWN else []
        return "\n\n".join(missing[:SHOWN] + more)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file of a test that passed, including its fixtures' calls at teardown; discard any other's."""
        try:
            if self.passed and error is None:
                self._raise_hidden()
        except CassetteError:
            self.passed = False
            raise
        finally:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* were not played", CassetteWarning)  # the summary names them
                self._close(whole=self.passed and error is None)

    def _close(self, *, whole: bool) -> None:
        if whole:
            self._stack.close()
            return
        self.tape.discard()
        with suppress(CassetteError):  # the failed test has reported what happened
            self._stack.close()

    def account(self) -> dict[str, Any]:
        """Return as plain data what this test played, and whether unplayed exchanges are reported."""
        return account_of(self.path, self.tape) | {
            "rule": self._unplayed,
            "idle": self._unplayed != "ignore" and not self.tape.recorded and len(self.tape.unplayed()) == self._found,
        }


def account_of(path: Path, tape: Tape) -> dict[str, Any]:
    """Return what a test that passed left unplayed of its cassette."""
    return {"path": str(path), "unplayed": [exchange_id(row) for row in tape.unplayed()], "complete": True}
