"""The console logger and the progress bar."""

from __future__ import annotations

import io

import pytest

from aggregator.llm.ledger import count
from aggregator.observing.console import ConsoleLogger
from aggregator.observing.progress import ProgressBar
from aggregator.records import Decision, StepReport, Usage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def spend(calls: int) -> None:
    """What the client does for each call."""
    for _ in range(calls):
        count("agent", Usage())


def report(step: int, *, test_score: float | None = None) -> StepReport:
    return StepReport(
        epoch=step // 2,
        step=step,
        sample_ids=(0,),
        scores=(0.5,),
        score=0.5,
        decision=Decision(accepted=True),
        test_score=test_score,
    )


def test_piped_progress_is_one_plain_line_per_step() -> None:
    """Where nobody can see a bar redraw itself there is one line a step: epoch, step, score and calls so far."""
    stream = io.StringIO()
    with ProgressBar(3, stream=stream) as bar:
        for step in range(3):
            spend(4)
            bar(report(step, test_score=0.75 if step == 2 else None))
    assert stream.getvalue().splitlines() == [
        "train step 1/3  epoch 1  score 0.5  calls 4",
        "train step 2/3  epoch 1  score 0.5  calls 8",
        "train step 3/3  epoch 2  score 0.5  test 0.75  calls 12",
    ]


def test_terminal_progress_is_one_bar() -> None:
    """In a terminal the bar redraws itself and ends complete."""
    stream = Terminal()
    with ProgressBar(2, stream=stream, name="demo") as bar:
        for step in range(2):
            spend(4)
            bar(report(step))
    last = stream.getvalue().rstrip("\n").split("\r")[-1]
    assert last.startswith("demo: 100%")
    assert "2/2" in last
    assert "epoch 1  score 0.5  calls 8" in last


def test_console_logger_has_traces_shape() -> None:
    """`log(name, data, step, color=...)` writes a line; floats are brief and None is a dash."""
    stream = io.StringIO()
    logger = ConsoleLogger(stream)
    logger.log("Average train score", 1 / 3, 4, color="green")
    logger.log("Average test score", None, 4)
    assert stream.getvalue() == "[step 4] Average train score: 0.3333\n[step 4] Average test score: -\n"


@pytest.mark.parametrize(("no_color", "painted"), [("", True), ("1", False)])
def test_colors_only_where_they_show(monkeypatch: pytest.MonkeyPatch, no_color: str, painted: bool) -> None:
    """A terminal gets colors, unless NO_COLOR is set; an unknown color paints nothing."""
    monkeypatch.setenv("NO_COLOR", no_color)
    stream = Terminal()
    logger = ConsoleLogger(stream)
    logger.log("score", 1, 0, color="green")
    assert ("\x1b[32m" in stream.getvalue()) is painted
    logger.log("score", 1, 0, color="mauve")
    assert stream.getvalue().splitlines()[-1] == "[step 0] score: 1"
