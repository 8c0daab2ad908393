"""The cassette of one test: opened around it, the network refused while it replays, dropped when it fails."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from aggregator.cassettes.inspection import exchange_id
from aggregator.cassettes.opening import Mode
from aggregator.cassettes.recorder import cassette
from aggregator.cassettes.tape import LineageRule, Tape
from aggregator.cassettes.timing import Latency
from aggregator.errors import CassetteError, CassetteWarning
from aggregator.testing.network import refused

Unplayed = Literal["ignore", "report", "error"]
SHOWN = 5


class Taping:
    """A context manager around one test; `tape` is open inside, `failed` is set by whoever sees the test fail."""

    tape: Tape

    def __init__(
        self,
        path: Path,
        *,
        mode: Mode | None = None,
        clients: str | Iterable[str] = (),
        lineage: LineageRule = "strict",
        latency: Latency = "off",
        unplayed: Unplayed = "report",
        allowed_hosts: Iterable[str] = (),
    ) -> None:
        self.path = path
        self.failed = False
        self._cassette = cassette(
            path,
            mode,
            clients=clients if isinstance(clients, str) else tuple(clients),
            lineage=lineage,
            latency=latency,
        )
        self._unplayed = unplayed
        self._allowed_hosts = tuple(allowed_hosts)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Open the cassette; a tape that only plays refuses the network."""
        self.tape = self._stack.enter_context(self._cassette)
        if not self.tape.records:
            self._stack.enter_context(refused(f"{self.path} is being replayed", self._allowed_hosts))
        return self

    def settle(self) -> None:
        """Finish the recording while the test can still fail; raises what it hid, and for leftovers where asked to."""
        left = self.tape.unplayed()
        if left and self._unplayed == "error":
            listing = "\n".join(f"  {exchange_id(row)}" for row in left[:SHOWN])
            more = f"\n  and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            raise CassetteError(
                f"expected every exchange of {self.path} to be played, got {len(left)} left over:\n{listing}{more}\n"
                "record the test anew (--cassette-mode=all), or allow it: unplayed='report'"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* were not played", CassetteWarning)  # the summary names them
            self.tape.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what the test has not settled; the recording of a failed one is dropped."""
        if self.failed or error is not None:
            self.tape.discard()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* were not played", CassetteWarning)
            try:
                self._stack.close()
            except CassetteError:
                if not self.failed:  # a failed test has told what happened
                    raise

    def account(self) -> dict[str, Any]:
        """Return what this test played, as plain data for the cache and the summary."""
        return {
            "path": str(self.path),
            "unplayed": [exchange_id(row) for row in self.tape.unplayed()],
            "report": self._unplayed == "report" and not self.failed,
        }
