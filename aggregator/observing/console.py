"""For terminals and notebooks: named values as lines, and a progress bar over the steps of a run."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from tqdm import tqdm

from aggregator.llm.ledger import total
from aggregator.observing.observer import LoggingObserver, Observer
from aggregator.records import Evaluation, RunInfo, StepReport, TrainingResult
from aggregator.text import readable

_COLORS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36, "white": 37}


class ConsoleLogger(LoggingObserver):
    """Writes `[step 3] name: value` to a stream, standard output by default.

    It is an observer and has Trace's `log`, so `observers=[ConsoleLogger()]` and `logger=ConsoleLogger()` both work.
    `color` paints a line if the stream shows colors.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        """Write one named value of one step; `color` is red, green, yellow, blue, magenta, cyan or white."""
        stream = self._stream or sys.stdout
        line = f"[step {step}] {name}: {readable(data)}"
        stream.write(painted(line, kwargs.get("color"), stream) + "\n")


def painted(text: str, color: str | None, stream: TextIO) -> str:
    """Return the text in a color if the stream shows colors, else as it is."""
    code = _COLORS.get(color or "")
    return f"\x1b[{code}m{text}\x1b[0m" if code and shows_colors(stream) else text


def shows_colors(stream: TextIO) -> bool:
    """Return True for a terminal that is not dumb. FORCE_COLOR and NO_COLOR (no-color.org) decide first."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


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

    validation = evaluation

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
        """End the bar's line, so that the next output begins on a new line."""
        self.close()

    def close(self) -> None:
        """End the bar's line, if there is one."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()


def redraws(stream: TextIO | None) -> bool:
    """Return True if a line on this stream can be redrawn: in a terminal, or as the output of a notebook's cell."""
    return stream is not None and (stream.isatty() or type(stream).__module__.partition(".")[0] == "ipykernel")
