"""A progress bar over the steps of a run."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

from aggregator.llm.ledger import total
from aggregator.observing.observer import Observer
from aggregator.records import Evaluation, RunInfo, StepReport, TrainingResult
from aggregator.text import readable

_FORMAT = "{desc}: {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]"
"""The time comes last: what does not fit into a narrow terminal is cut off there."""


class ProgressBar(Observer):
    """Shows epoch, step, score and calls, one tick per step. The calls include those of evaluations.

    In a terminal or a notebook it is one line that redraws itself, elsewhere one plain line per step. `stream` is
    standard error by default, `name` the word in front.
    """

    def __init__(self, *, stream: TextIO | None = None, name: str = "train") -> None:
        self._stream = stream or sys.stderr
        self._name = name
        self._steps = 0
        self._done = 0
        self._calls = 0
        self._bar: tqdm[Any] | None = None

    def started(self, info: RunInfo, /) -> None:
        """Draw the empty bar. That of a resumed run begins at the steps that were done before."""
        self.close()
        self._steps, self._done = info.steps, info.finished_steps
        self._calls = total(info.usage.values()).calls
        if redraws(self._stream):
            self._bar = tqdm(
                total=self._steps,
                initial=self._done,
                desc=self._name,
                file=self._stream,
                bar_format=_FORMAT,
                dynamic_ncols=True,
            )

    def evaluation(self, evaluation: Evaluation, /) -> None:
        """Count its calls."""
        self._calls += total(evaluation.usage.values()).calls

    def step(self, report: StepReport, /) -> None:
        """Tick."""
        self._done += 1
        self._calls += total(report.usage.values()).calls
        test = "" if report.test_score is None else f"  test {readable(report.test_score)}"
        facts = f"epoch {report.epoch + 1}  score {readable(report.score)}{test}  calls {self._calls}"
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update()
            return
        steps = f"/{self._steps}" if self._steps else ""
        self._stream.write(f"{self._name} step {self._done}{steps}  {facts}\n")
        self._stream.flush()

    def finished(self, result: TrainingResult, /) -> None:
        """End the bar's line."""
        self.close()

    def failed(self, error: BaseException, /) -> None:
        """End the bar's line, so that what is printed next begins on one of its own."""
        self.close()

    def close(self) -> None:
        """End the bar's line, if there is one."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()


def redraws(stream: TextIO | None) -> bool:
    """Return True if a line on this stream can be redrawn: in a terminal, or as the output of a notebook's cell."""
    return stream is not None and (stream.isatty() or type(stream).__module__.partition(".")[0] == "ipykernel")
