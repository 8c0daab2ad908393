"""What a person reads when the demo has ended."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import Any, TextIO

from aggregator.demo.run import Outcome
from aggregator.observing.console import painted
from aggregator.records import StepReport, TrainingResult
from aggregator.text import readable

_BAR = 30
_WIDTH, _NARROWEST = 110, 30
_AS_IT_IS: Any = {"replace_whitespace": False, "break_on_hyphens": False}
_COLORS = {"+": "green", "-": "red"}


def summary(outcome: Outcome, out: Path, stream: TextIO) -> str:
    """Return the readable summary of a run, in color where the stream shows colors."""
    result = outcome.result
    parts = [
        f"Answers came from {outcome.source}.",
        _scores(result, _block(stream)),
        *(_change(name, result, stream) for name in result.parameters),
        _usage(outcome),
        f"Written: {out / 'result.json'}, {out / 'events.jsonl'}",
        _improvement(result),
    ]
    return "\n\n".join(parts) + "\n"


def _improvement(result: TrainingResult) -> str:
    first, last = result.evaluations[0], result.evaluations[-1]
    return (
        f"Test score: {readable(first.score)} before training, {readable(last.score)} after, "
        f"on {len(last.scores)} tickets that were not trained on."
    )


def _block(stream: TextIO) -> str:
    """Return what bars are made of: a block, or a sign where the stream cannot show one."""
    try:
        "█".encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return "#"
    return "█"


def _width(stream: TextIO) -> int:
    """Return how long a line may be: as wide as the terminal, where it is one."""
    return min(_WIDTH, max(get_terminal_size().columns, _NARROWEST)) if stream.isatty() else _WIDTH


def _scores(result: TrainingResult, block: str) -> str:
    """Lay out the score of each minibatch and, where it was evaluated, of the test set."""
    tests = {evaluation.step: evaluation.score for evaluation in result.evaluations}
    lines = [f"step  epoch  {'minibatch score':<{_BAR + 7}}test score", _row("start", "", "", tests.get(0))]
    lines += [
        _row(f"{report.step + 1:>5}", f"{report.epoch + 1:>5}", _bar(report.score, block), tests.get(report.step + 1))
        + _remarks(report)
        for report in result.history
    ]
    return "\n".join(lines)


def _bar(score: float | None, block: str) -> str:
    return "" if score is None else f"{score:.2f} " + block * round(score * (_BAR - 5))


def _row(step: str, epoch: str, bar: str, test: float | None) -> str:
    return f"{step:<5} {epoch:<5}  {bar:<{_BAR + 7}}{'' if test is None else f'{test:.3f}'}".rstrip()


def _remarks(report: StepReport) -> str:
    """Describe what went wrong in a step."""
    if not report.update or report.decision.accepted:
        return ""
    return f"  (not applied: {report.decision.reason})"


def _change(name: str, result: TrainingResult, stream: TextIO) -> str:
    before, after = result.initial_parameters[name], result.parameters[name]
    if before == after:
        return f"{name}: unchanged, {before!r}"
    diff = _diff(str(before), str(after), _width(stream))
    lines = [painted(line, _COLORS.get(line[2:3]), stream) for line in diff]
    return "\n".join([f"{name}:", *lines])


def _diff(before: str, after: str, width: int) -> Iterator[str]:
    lines = unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=99)
    for line in lines:
        if not line.startswith(("---", "+++", "@@")):
            yield fill(line[1:], width, initial_indent=f"  {line[0]} ", subsequent_indent="      ", **_AS_IT_IS)


def _usage(outcome: Outcome) -> str:
    usage: dict[str, Any] = dict(outcome.result.usage)
    width = max(len(role) for role in [*usage, "total"])
    rows = [f"{'role':<{width}}  calls  tokens in  tokens out"]
    calls = read = written = 0
    for role, spent in usage.items():
        rows.append(
            f"{role:<{width}}  {spent.calls:>5}  {spent.input_tokens or 0:>9,}  {spent.output_tokens or 0:>10,}"
        )
        calls, read, written = (
            calls + spent.calls,
            read + (spent.input_tokens or 0),
            written + (spent.output_tokens or 0),
        )
    rows.append(f"{'total':<{width}}  {calls:>5}  {read:>9,}  {written:>10,}   in {outcome.seconds:.1f} seconds")
    return "\n".join(rows)
