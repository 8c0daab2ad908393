"""A progress bar over the steps of a run."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from aggregator.llm.ledger import Ledger, collecting
from aggregator.records import StepReport
from aggregator.text import readable


class ProgressBar:
    """Shows epoch, step, score and calls, one tick per step; a context manager around the run.

    The calls are all that were made inside, those of evaluations too.

    In a terminal it is one line that redraws itself; elsewhere one plain line per step, so that a log stays readable.
    """

    def __init__(self, steps: int | None = None, *, stream: TextIO | None = None, name: str = "train") -> None:
        self._stream = stream or sys.stderr
        self._steps = steps
        self._name = name
        self._ledger = Ledger()
        self._stack = ExitStack()
        self._done = 0
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        self._ledger = self._stack.enter_context(collecting())
        if self._stream.isatty():
            self._bar = tqdm(
                total=self._steps, desc=self._name, file=self._stream, unit="step", dynamic_ncols=True, leave=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def __call__(self, report: StepReport) -> None:
        """Take one step's report."""
        self._done += 1
        calls = sum(usage.calls for usage in self._ledger.totals().values())
        if self._bar is None:
            total = "" if self._steps is None else f"/{self._steps}"
            self._stream.write(f"{self._name} step {self._done}{total}  {facts(report, calls)}\n")
            self._stream.flush()
            return
        self._bar.set_postfix_str(facts(report, calls), refresh=False)
        self._bar.update()


def facts(report: StepReport, calls: int) -> str:
    """Return what the bar says beside its ticks."""
    test = "" if report.test_score is None else f"  test {readable(report.test_score)}"
    return f"epoch {report.epoch + 1}  score {readable(report.score)}{test}  calls {calls}"
