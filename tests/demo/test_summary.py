"""The demo's summary shows what the result holds."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from aggregator.demo.run import Outcome, summary
from aggregator.records import Decision, Evaluation, StepReport, TrainingResult, Usage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def outcome(**parameters: object) -> Outcome:
    values = {"rules": "a\nb", "k": 3, **parameters}
    result = TrainingResult(
        parameters=values,
        best_parameters=values,
        initial_parameters={"rules": "a\nc", "k": 3},
        history=[
            StepReport(
                epoch=0,
                step=0,
                sample_ids=(0, 1),
                scores=(1.0, 0.0),
                score=0.5,
                decision=Decision(accepted=False, reason="it got worse"),
                update={"k": 4},
            )
        ],
        evaluations=[
            Evaluation(step=0, score=0.25, scores=(0.0,) * 4),
            Evaluation(step=1, score=0.5, scores=(1.0,) * 4),
        ],
        usage={
            "agent": Usage(input_tokens=1200, output_tokens=10, calls=6),
            "optimizer": Usage(input_tokens=None, output_tokens=None, calls=2),
        },
    )
    return Outcome(result=result, source="a recording", seconds=1.25)


def test_the_summary_shows_the_result() -> None:
    """Scores, the diff, unchanged parameters, calls, tokens and seconds are those of the result."""
    text = summary(outcome(), Path("out"), io.StringIO())
    assert "Answers came from a recording." in text
    assert "    1     1  0.50 █" in text
    assert "0.500  (not applied: it got worse)" in text
    assert "rules:\n    a\n  - c\n  + b\n" in text
    assert "k: unchanged, 3" in text
    assert "agent          6      1,200          10" in text
    assert "total          8      1,200          10   in 1.2 seconds" in text
    assert "Test score: 0.25 before training, 0.5 after, on 4 tickets" in text
    assert "\x1b" not in text


def test_a_changed_number_is_two_lines() -> None:
    """A short value is shown before and after."""
    assert "k:\n  - 3\n  + 5" in summary(outcome(k=5), Path("out"), io.StringIO())


def test_long_lines_are_wrapped_and_indented(tmp_path: Path) -> None:
    """A rule longer than a screen continues on the next line, indented below its beginning; code keeps its indent."""
    text = summary(outcome(rules=f"a\n    return {'word ' * 40}".rstrip()), tmp_path, io.StringIO())
    wrapped = [line for line in text.splitlines() if "word" in line]
    assert wrapped[0].startswith("  +     return word")
    assert wrapped[1].startswith("      word")
    assert max(map(len, wrapped)) <= 110
    assert not any(line.endswith(" ") for line in wrapped)


def test_lines_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a narrow terminal we wrap a long rule, so that the terminal does not cut it."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    text = summary(outcome(rules="word " * 40), Path("out"), Terminal())
    assert max(len(line) for line in text.splitlines() if "word" in line) <= 40


def test_bars_need_no_unicode() -> None:
    """Without block characters in the output's encoding, bars are ASCII."""
    text = summary(outcome(), Path("out"), io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert "0.50 ############ " in text
    assert text.isascii()


@pytest.mark.parametrize(("no_color", "painted"), [("", True), ("1", False)])
def test_the_diff_has_colors_in_terminals(monkeypatch: pytest.MonkeyPatch, no_color: str, painted: bool) -> None:
    """Added lines are green and removed ones red, in a terminal, without NO_COLOR."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    text = summary(outcome(), Path("out"), Terminal())
    assert ("\x1b[31m  - c\x1b[0m" in text and "\x1b[32m  + b\x1b[0m" in text) is painted
