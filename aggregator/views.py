"""Records as HTML for notebooks and as text, for `_repr_html_`, `print(result)` and `repr(report)`.

Records are read by their structure, so this file is below `records`. Long runs and long texts are shortened, and
everything is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from re import split
from typing import TYPE_CHECKING, Any

import msgspec

from aggregator.text import SHOWN, canonical_json, clip, cut, readable

if TYPE_CHECKING:
    from aggregator.records import Decision, Failure, Proposal, StepReport, TrainingResult, Usage, Values

GOOD, BAD, QUIET = "#2a9d56", "#e0524a", "#8a8f98"
"""Readable on white and on black."""

_LINE = "1px solid rgba(138,143,152,.35)"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;text-align:left"
_CELL = f"padding:3px 10px 3px 0;text-align:left;vertical-align:top;border-bottom:{_LINE}"
_MOST_WORDS = 1_500
"""Above it a comparison word by word would take too long."""


# ---- markup


class Html(str):
    """Markup, which is not escaped again."""

    __slots__ = ()


def tag(name: str, *content: str, style: str = "", **attributes: str) -> Html:
    """Return an element; content that is not Html is escaped.

    >>> tag("b", "1 < 2", tag("i", "&"))
    '<b>1 &lt; 2<i>&amp;</i></b>'
    """
    given = {"style": style, **attributes} if style else attributes
    facts = "".join(f' {key.replace("_", "-")}="{escape(value)}"' for key, value in given.items())
    return Html(f"<{name}{facts}>{joined(content)}</{name}>")


def joined(parts: Iterable[str]) -> Html:
    """Return concatenated parts; those that are not Html are escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def page(*parts: str) -> Html:
    """Return parts as one block, in the notebook's own font and colour."""
    return tag("div", *parts, style="line-height:1.5;max-width:72em")


def heading(*facts: str) -> Html:
    """Return a line of facts, the first one in bold."""
    first, *rest = [fact for fact in facts if fact]
    return tag("div", tag("b", first), *(joined((" · ", fact)) for fact in rest))


def text(value: str) -> Html:
    """Return text in its own lines."""
    return tag("span", value, style=_TEXT)


def coloured(value: str, colour: str) -> Html:
    """Return a few words in a colour."""
    return tag("span", value, style=f"color:{colour}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Return a table of plain lines."""
    top = tag("tr", *(tag("th", name, style=f"{_CELL};font-weight:600;color:{QUIET}") for name in head))
    body = [tag("tr", *(tag("td", cell, style=_CELL) for cell in row), style="background:none") for row in rows]
    shown = [tag("thead", top)] if any(head) else []
    return tag("table", *shown, tag("tbody", *body), style="border-collapse:collapse;margin:6px 0;font-size:inherit")


def folded(title: str, *content: str, opened: bool = False) -> Html:
    """Return content that is shown on a click."""
    summary = tag("summary", title, style=f"cursor:pointer;color:{QUIET}")
    return tag("details", summary, *content, **({"open": ""} if opened else {}))


def compared(before: str, after: str) -> Html:
    """Return the new text, with deletions and insertions marked.

    >>> [compared("a b", after).count("<del") for after in ("a b", "a c", "a b c")]
    [0, 1, 0]
    """
    old, new = split(r"(\s+)", before), split(r"(\s+)", after)
    if len(old) + len(new) > _MOST_WORDS:
        return joined((_struck(before), "\n\n", _put_in(after)))
    parts: list[str] = []
    for what, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if what == "equal":
            parts.append("".join(new[k:m]))
        else:
            parts += [_struck("".join(old[i:j])), _put_in("".join(new[k:m]))]
    return tag("span", *(part for part in parts if part), style=_TEXT)


def _struck(words: str) -> Html:
    return tag("del", words, style=f"color:{BAD};margin-right:.25em;{_TEXT}") if words else Html()


def _put_in(words: str) -> Html:
    return tag("ins", words, style=f"color:{GOOD};text-decoration:none;font-weight:600;{_TEXT}") if words else Html()


STEPS_SHOWN = 100
"""The number of latest steps in a result's table."""

FAILURES_SHOWN = 100
"""The number of failures that are listed."""

LETTERS_SHOWN = 20_000
"""The number of characters of one value that are shown."""

_POINTS = 300
_WIDTH, _HEIGHT = 480, 90


# ---- as HTML


def proposal_html(proposal: Proposal) -> Html:
    """Show a proposal's values and reasons."""
    return page(
        heading(
            "Proposal",
            _counted(len(proposal.values), "change"),
            _scored("score", proposal.score),
            f"of sample {', '.join(map(str, proposal.sample_ids))}" if proposal.sample_ids else "",
            f"support {proposal.support}" if proposal.support > 1 else "",
        ),
        coloured(proposal.error, BAD) if proposal.error else "",
        _values(proposal.values),
        _facts(("feedback", proposal.feedback), ("reasoning", proposal.reasoning)),
        _failures(proposal.failures),
    )


def step_html(report: StepReport) -> Html:
    """Show a step: scores, the update, the verdict."""
    scores = [(str(i), readable(score)) for i, score in zip(report.sample_ids, report.scores, strict=False)]
    return page(
        heading(
            f"Step {report.step}",
            f"epoch {report.epoch}",
            _scored("score", report.score),
            _scored("test", report.test_score),
            _counted(report.proposals, "proposal"),
            _spent(report.usage),
        ),
        _verdict(report.decision),
        _values(report.update),
        _facts(("reasoning", report.reasoning)),
        _failures(report.failures),
        folded("scores per instance", table(("sample", "score"), scores)) if scores else "",
        _usage(report.usage),
    )


def result_html(result: TrainingResult) -> Html:
    """Show a result: scores over the steps, the parameters before and after, failures and cost."""
    test, train = result.test_scores, result.train_scores
    return page(
        heading(
            "TrainingResult",
            _counted(len(result.history), "step"),
            _course("test", test),
            _course("train", train),
            _course("validation", [evaluation.score for evaluation in result.validations]),
            f"kept {_kept(result)}" if result.validations else "",
            f"stopped: {result.stopped}" if result.stopped else "",
            _counted(len(result.failures), "failure") if result.failures else "",
            _spent(result.usage),
        ),
        _chart(result),
        _changes(result.initial_parameters, result.parameters),
        *(tag("div", warning, style=f"color:{BAD};{_TEXT}") for warning in result.warnings),
        folded(_counted(len(result.history), "step"), _steps(result.history)) if result.history else "",
        _failures(result.failures),
        _usage(result.usage),
    )


# ---- as text


def result_line(result: TrainingResult) -> str:
    """Return a result in one line."""
    applied = sum(report.decision.accepted for report in result.history)
    course = (_course("test score", result.test_scores) or _course("train score", result.train_scores)).replace(
        "→", "->"
    )
    facts = (f"{_counted(len(result.history), 'step')}, {applied} applied", course, _spent(result.usage))
    return ", ".join(fact for fact in facts if fact)


def result_text(result: TrainingResult) -> str:
    """Return a result in a few lines: scores, changed parameters, usage, and failures."""
    changed = [name for name, value in result.parameters.items() if value != result.initial_parameters.get(name)]
    kept = [name for name in result.parameters if name not in changed]
    refused = [report for report in result.history if report.update and not report.decision.accepted]
    scores = {"test score": result.test_scores, "train score": result.train_scores}
    validated = [evaluation.score for evaluation in result.validations]
    steps = _counted(len(result.history), "step")
    updates = _counted(sum(report.decision.accepted for report in result.history), "update")
    lines = [
        f"TrainingResult: {steps}, {updates} applied",
        f"stopped: {result.stopped}" if result.stopped else "",
        *(_course(name, values, "->") for name, values in scores.items()),
        _course("validation score (used for selection)", validated, "->"),
        f"kept: {_kept(result)}" if result.validations else "",
        f"changed: {', '.join(changed)}" if changed else "no parameter changed",
        f"unchanged: {', '.join(kept)}" if kept else "",
        f"refused: {_counted(len(refused), 'update')}, the last: {refused[-1].decision.reason}" if refused else "",
        _spent(result.usage),
    ]
    if result.failures:
        first = result.failures[0]
        where = first.stage if first.sample_id is None else f"{first.stage}, sample {first.sample_id}"
        count = _counted(len(result.failures), "failure")
        lines.append(f"{count}, the first: {where}: {first.error}: {clip(first.message, SHOWN)}")
    lines += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join(line for line in lines if line)


def step_line(report: StepReport) -> str:
    """Return a step in one line."""
    verdict = "updated" if report.decision.accepted else f"not updated: {report.decision.reason}"
    facts = (
        f"step {report.step}",
        _scored("score", report.score),
        _scored("test score", report.test_score),
        _scored("validation score", report.validation_score),
        f"{verdict} {', '.join(report.update)}".strip() if report.decision.accepted else verdict,
        _counted(len(report.failures), "failure") if report.failures else "",
    )
    return ", ".join(fact for fact in facts if fact)


# ---- parts of a page


def _steps(history: Sequence[StepReport]) -> Html:
    latest = history[-STEPS_SHOWN:]
    rows = [
        (
            str(report.step),
            str(report.epoch),
            readable(report.score),
            readable(report.test_score),
            _verdict(report.decision),
            ", ".join(report.update),
            str(len(report.failures) or ""),
        )
        for report in latest
    ]
    left_out = len(history) - len(latest)
    before = tag("div", f"the latest {len(latest)}; {left_out} before", style=f"color:{QUIET}") if left_out else ""
    return joined((before, table(("step", "epoch", "score", "test", "verdict", "parameters", "failures"), rows)))


def _changes(before: Values, after: Values) -> Html:
    """Show every parameter before and after."""
    rows = [
        (tag("code", name), _in_font(name, value, compared(_written(before.get(name)), _written(value))))
        for name, value in after.items()
    ]
    return table(("parameter", "value"), rows) if rows else Html()


def _values(values: Values) -> Html:
    rows = [(tag("code", name), _in_font(name, value, text(_written(value)))) for name, value in values.items()]
    return table(("parameter", "new value"), rows) if rows else Html()


def _in_font(name: str, value: Any, shown: Html) -> Html:
    """Return prose unchanged; source code and JSON in a font that keeps their columns."""
    prose = isinstance(value, str) and not name.endswith("__code")
    return shown if prose else tag("div", shown, style="font-family:monospace")


def _verdict(decision: Decision) -> Html:
    word = coloured("accepted", GOOD) if decision.accepted else coloured("refused", BAD)
    return tag("span", word, f": {decision.reason}" if decision.reason else "")


def _facts(*facts: tuple[str, str]) -> Html:
    """Show texts under their names, folded if they are long."""
    return joined(
        folded(name, text(cut(value, LETTERS_SHOWN)), opened=len(value) <= 300) for name, value in facts if value
    )


def _failures(failures: Sequence[Failure]) -> Html:
    if not failures:
        return Html()
    rows = [
        (readable(failure.step), readable(failure.sample_id), failure.stage, f"{failure.error}: {failure.message}")
        for failure in failures[:FAILURES_SHOWN]
    ]
    count = _counted(len(failures), "failure")
    title = count if len(rows) == len(failures) else f"{count}, the first {len(rows)} of them"
    return folded(title, table(("step", "sample", "stage", "error"), rows))


def _usage(usage: Mapping[str, Usage]) -> Html:
    rows = [
        (role, str(spent.calls), _number(spent.input_tokens), _number(spent.output_tokens), _cost(spent.cost))
        for role, spent in usage.items()
    ]
    return folded("usage", table(("role", "calls", "input", "output", "cost"), rows)) if rows else Html()


def _chart(result: TrainingResult) -> Html:
    """Draw scores over the steps: those of the test set, else of the validation set, and thin those of training."""
    last = max((report.step + 1 for report in result.history), default=0)
    measured = "test" if result.evaluations else "validation"
    tested = [(evaluation.step, evaluation.score) for evaluation in result.evaluations or result.validations]
    trained = [(report.step, report.score) for report in result.history]
    known = [score for _, score in (*tested, *trained) if score is not None]
    if len(known) < 2 or not last:
        return Html()
    low, high = min(0.0, *known), max(1.0, *known)
    lines = [_line(trained, last, low, high, QUIET, "1"), _line(tested, last, low, high, GOOD, "2")]
    names = [coloured(measured, GOOD), " and "] if tested else []
    legend = tag("div", *names, coloured("train", QUIET), f" score after each step, {low:g} to {high:g}")
    axes = tag("path", d=f"M0.5 0V{_HEIGHT - 0.5}H{_WIDTH}", fill="none", stroke=QUIET, stroke_width="1")
    box = f"-3 -3 {_WIDTH + 6} {_HEIGHT + 6}"
    drawing = tag("svg", axes, *lines, width=str(_WIDTH + 6), height=str(_HEIGHT + 6), viewBox=box)
    return tag("div", drawing, legend, style="margin:6px 0")


def _line(
    points: Sequence[tuple[int, float | None]], last: int, low: float, high: float, colour: str, width: str
) -> Html:
    known = [(step, score) for step, score in points if score is not None]
    size = -(-len(known) // _POINTS) or 1
    groups = [known[i : i + size] for i in range(0, len(known), size)]
    means = [[sum(values) / len(values) for values in zip(*group, strict=True)] for group in groups]
    places = [f"{_WIDTH * step / last:.1f},{_HEIGHT * (high - score) / (high - low):.1f}" for step, score in means]
    return tag("polyline", points=" ".join(places), fill="none", stroke=colour, stroke_width=width)


def _written(value: Any) -> str:
    """Return a value as text: a string unchanged, anything else as indented JSON."""
    if not isinstance(value, str):
        value = msgspec.json.format(canonical_json(value, repr), indent=2).decode()
    return cut(value, LETTERS_SHOWN)


def _kept(result: TrainingResult) -> str:
    """Return which values a run ended with, by the number of steps that made them."""
    if result.kept != "best":
        return f"the {result.kept} values"
    return f"the best values, after {_counted(result.best_step, 'step')}" if result.best_step else "the initial values"


def _course(name: str, scores: Sequence[float | None], arrow: str = "→") -> str:
    known = [score for score in scores if score is not None]
    return f"{name} {readable(known[0])} {arrow} {readable(known[-1])}" if known else ""


def _scored(name: str, score: float | None) -> str:
    return "" if score is None else f"{name} {readable(score)}"


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _spent(usage: Mapping[str, Usage]) -> str:
    if not usage:
        return ""
    first, *others = usage.values()
    spent = sum(others, first)
    cost = "" if spent.cost is None else f", {_cost(spent.cost)}"
    return f"{_counted(spent.calls, 'call')}, {spent.total_tokens:,} tokens{cost}"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _cost(value: float | None) -> str:
    return "-" if value is None else f"${value:.4g}"
