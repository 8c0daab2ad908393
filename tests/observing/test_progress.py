"""The console logger and the progress bar."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from aggregator.observing.observer import ConsoleLogger, ProgressBar, redraws, shows_colors
from aggregator.records import Decision, Evaluation, FullStepReport, RunInfo, TrainingResult, Usage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def info(steps: int, **facts: Any) -> RunInfo:
    return RunInfo(
        trainer="AggregatedUpdate",
        agent="Router",
        optimizer="LLMOptimizer",
        guide="exact_match",
        parameters={},
        seed=0,
        steps=steps,
        num_epochs=1,
        batch_size=1,
        train_samples=steps,
        **facts,
    )


def report(step: int, *, test_score: float | None = None) -> FullStepReport:
    return FullStepReport(
        epoch=step // 2,
        step=step,
        sample_ids=(0,),
        scores=(0.5,),
        score=0.5,
        decision=Decision(accepted=True),
        test_score=test_score,
        usage={"agent": Usage(calls=3), "optimizer": Usage()},
    )


RESULT = TrainingResult(parameters={}, best_parameters={}, initial_parameters={})


def test_piped_progress_is_one_plain_line_per_step() -> None:
    """Without a terminal each step is one line: epoch, step, score and calls so far."""
    stream = io.StringIO()
    bar = ProgressBar(stream=stream)
    bar.started(info(3))
    for step in range(3):
        bar.step(report(step, test_score=0.75 if step == 2 else None))
    bar.finished(RESULT)
    assert stream.getvalue().splitlines() == [
        "train step 1/3  epoch 1  score 0.5  calls 4",
        "train step 2/3  epoch 1  score 0.5  calls 8",
        "train step 3/3  epoch 2  score 0.5  test 0.75  calls 12",
    ]


def test_calls_of_evaluations_and_of_finished_steps_are_counted() -> None:
    """A resumed run continues its numbers of steps and calls; the baseline counts too."""
    stream = io.StringIO()
    bar = ProgressBar(stream=stream)
    bar.started(info(3, finished_steps=1, usage={"agent": Usage(calls=10)}))
    bar.evaluation(Evaluation(step=1, score=0.5, scores=(0.5,), usage={"agent": Usage(calls=5)}))
    bar.step(report(1))
    assert stream.getvalue() == "train step 2/3  epoch 1  score 0.5  calls 19\n"


def ended(bar: ProgressBar) -> None:
    bar.finished(RESULT)


def broken(bar: ProgressBar) -> None:
    bar.failed(KeyboardInterrupt())


@pytest.mark.requirement("Trace: tqdm bars with description")
@pytest.mark.parametrize("end", [ended, broken])
def test_terminal_progress_is_one_bar(end: Callable[[ProgressBar], None]) -> None:
    """In a terminal the bar redraws itself, and its line ends with the run, even if the run fails."""
    stream = Terminal()
    bar = ProgressBar(stream=stream, name="demo")
    bar.started(info(2))
    for step in range(2):
        bar.step(report(step))
    end(bar)
    assert stream.getvalue().endswith("\n")
    last = stream.getvalue().rstrip("\n").split("\r")[-1]
    assert last.startswith("demo: 100%")
    assert "2/2" in last
    assert "epoch 1  score 0.5  calls 8" in last


def test_the_bar_of_80_columns_was_cut() -> None:
    """In a terminal of 80 columns the bar had three cells, and "calls 367" was cut off. Now both fit."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        bar = ProgressBar(stream=stream)
        bar.started(info(16))
        bar.evaluation(Evaluation(step=0, score=0.5, scores=(0.5,), usage={"agent": Usage(calls=303)}))
        for step in range(16):
            bar.step(report(step, test_score=0.875))
        bar.close()
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as screen, suppress(OSError):  # which is how a closed terminal is read
        while piece := screen.read(4096):
            shown += piece
    last = shown.decode().rstrip().split("\r")[-1]
    assert "|██████████| 16/16, epoch 8  score 0.5  test 0.875  calls 367" in last
    assert len(last) < 80


def test_a_notebook_cell_shows_the_bar() -> None:
    """Its output is not a terminal, and showed nothing until the end of the run."""
    cell = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    assert redraws(cell)
    assert redraws(Terminal())
    assert [redraws(stream) for stream in (None, io.StringIO())] == [False, False]


@pytest.mark.requirement("Trace: DefaultLogger.log(name, data, step, color)", "Trace: Console logger")
def test_the_console_logger_has_traces_interface() -> None:
    """`log(name, data, step, color=...)` writes a line; floats are short and None is a dash."""
    stream = io.StringIO()
    logger = ConsoleLogger(stream)
    logger.log("Average train score", 1 / 3, 4, color="green")
    logger.log("Average test score", None, 4)
    assert stream.getvalue() == "[step 4] Average train score: 0.3333\n[step 4] Average test score: -\n"


@pytest.mark.requirement("Trace: DefaultLogger.log(name, data, step, color)")
@pytest.mark.parametrize(("no_color", "painted"), [("", True), ("1", False)])
def test_colors_are_used_in_terminals_only(monkeypatch: pytest.MonkeyPatch, no_color: str, painted: bool) -> None:
    """A terminal gets colors, unless NO_COLOR is set; an unknown color has no effect."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    logger = ConsoleLogger(stream)
    logger.log("score", 1, 0, color="green")
    assert ("\x1b[32m" in stream.getvalue()) is painted
    logger.log("score", 1, 0, color="mauve")
    assert stream.getvalue().splitlines()[-1] == "[step 0] score: 1"


@pytest.mark.parametrize(
    ("variables", "stream", "shown"),
    [
        ({"TERM": "xterm"}, Terminal(), True),
        ({"TERM": "dumb"}, Terminal(), False),
        ({"TERM": "xterm"}, io.StringIO(), False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, io.StringIO(), True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, Terminal(), False),
    ],
)
def test_a_dumb_terminal_got_colors(
    variables: dict[str, str], stream: io.StringIO, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FORCE_COLOR enables colors without a terminal, NO_COLOR disables them everywhere."""
    for name in ("TERM", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert shows_colors(stream) is shown
