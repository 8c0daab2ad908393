"""Records in a notebook: complete, escaped, without scripts, and bounded."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.records import Decision, Evaluation, Failure, Proposal, StepReport, TrainingResult, Usage
from aggregator.views import FAILURES_SHOWN, LETTERS_SHOWN, STEPS_SHOWN, Html, compared, tag

HOSTILE = "<script>alert(\"1\")</script><img src=x onerror='alert(2)'>&amp;</td></table></details>"
FAILURE = Failure(stage="agent", error=HOSTILE, message=HOSTILE, sample_id=3, epoch=0, step=1)
USAGE = {"agent": Usage(input_tokens=1200, output_tokens=34, cost=0.5, calls=7), HOSTILE: Usage(calls=2)}


def report(step: int = 0, **facts: Any) -> StepReport:
    given = {"sample_ids": (4, 9), "scores": (0.25, None), "score": 0.25, "decision": Decision(accepted=True), **facts}
    return StepReport(epoch=0, step=step, **given)


def result(steps: int = 2, **facts: Any) -> TrainingResult:
    given: dict[str, Any] = {
        "parameters": {"rule": "answer sales or billing", "k": 7},
        "best_parameters": {},
        "initial_parameters": {"rule": "answer sales", "k": 7},
        "history": [report(step, test_score=0.5) for step in range(steps)],
        "evaluations": [Evaluation(step=0, score=0.25, scores=()), Evaluation(step=steps, score=0.75, scores=())],
        **facts,
    }
    return TrainingResult(**given)


class Reader(HTMLParser):
    """Collects a document's tags, attributes and text, and checks that tags are closed."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(document)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def shown(record: Any) -> Reader:
    """Return the HTML that a notebook shows, parsed."""
    return Reader(record._repr_html_())


HOSTILE_RECORDS = [
    Proposal(values={HOSTILE: HOSTILE}, feedback=HOSTILE, reasoning=HOSTILE, error=HOSTILE, failures=(FAILURE,)),
    report(
        decision=Decision(accepted=False, reason=HOSTILE),
        update={HOSTILE: [HOSTILE]},
        reasoning=HOSTILE,
        failures=(FAILURE,),
        usage=USAGE,
    ),
    result(
        parameters={HOSTILE: HOSTILE},
        initial_parameters={HOSTILE: "was " + HOSTILE},
        failures=(FAILURE,),
        warnings=(HOSTILE,),
        usage=USAGE,
        history=[report(update={HOSTILE: 1}, decision=Decision(accepted=False, reason=HOSTILE))],
    ),
]


@pytest.mark.requirement("Trace: HTML of the step in notebooks")
@pytest.mark.parametrize("record", HOSTILE_RECORDS, ids=lambda record: type(record).__name__)
def test_everything_is_escaped(record: Any) -> None:
    """Text of a model, an agent or a guide opens no tag, closes none, and runs nothing."""
    read = shown(record)
    assert {"script", "img"} & set(read.tags) == set()
    assert {name for name in read.names if name.startswith("on")} == set()
    assert HOSTILE in read.text


def test_a_proposal_shows_its_values_and_reasons() -> None:
    """Values, score, sample, feedback, reasoning, error."""
    text = shown(
        Proposal(
            values={"k": 7, "words": ["a"]},
            score=0.25,
            feedback="too few",
            reasoning="more help",
            error="no rule",
            sample_ids=(3, 8),
            support=2,
        )
    ).text
    assert text.startswith("Proposal · 2 changes · score 0.25 · of sample 3, 8 · support 2")
    for word in ("7", '"a"', "too few", "more help", "no rule"):
        assert word in text


@pytest.mark.requirement("Trace: HTML of the step in notebooks")
@pytest.mark.parametrize(("accepted", "word"), [(True, "accepted"), (False, "refused")])
def test_a_step_shows_the_verdict_and_its_reason(accepted: bool, word: str) -> None:
    """It also shows scores per instance, the update, failures and cost."""
    decision = Decision(accepted=accepted, reason="mean score 0.5 -> 0.25")
    text = shown(
        report(3, decision=decision, update={"k": 9}, test_score=0.75, failures=(FAILURE,), usage=USAGE, proposals=1)
    ).text
    assert text.startswith("Step 3 · epoch 0 · score 0.25 · test 0.75 · 1 proposal · 9 calls, 1,234 tokens, $0.5")
    assert f"{word}: mean score 0.5 -> 0.25" in text
    assert "samplescore40.259-" in text
    assert "1 failure" in text


def test_a_result_shows_scores_and_parameters_over_the_run() -> None:
    """First and last scores, a chart of both, each parameter before and after, the steps."""
    document = result()._repr_html_()
    read = Reader(document)
    assert read.text.startswith("TrainingResult · 2 steps · test 0.25 → 0.75 · train 0.25 → 0.25")
    assert read.tags.count("polyline") == 2
    assert re.findall(r"<ins[^>]*>(.*?)</ins>", document) == [" or billing"]
    assert "<del" not in document
    assert "accepted" in read.text


@pytest.mark.parametrize("history", [0, 1])
def test_a_run_with_few_steps_is_shown_too(history: int) -> None:
    """There is no chart with fewer than two points, no table without a row, and no error."""
    read = shown(result(history, evaluations=()))
    assert "svg" not in read.tags
    assert ("1 step" if history else "0 steps") in read.text


def test_long_runs_and_texts_are_shortened_with_a_note() -> None:
    """The latest steps, the first failures, the beginning of a text; the chart has a bounded number of points."""
    many = result(5_000, failures=[FAILURE] * 300, parameters={"rule": "x" * 100_000, "k": "y " * 50_000})
    document = many._repr_html_()
    text = Reader(document).text
    assert f"the latest {STEPS_SHOWN}; {5_000 - STEPS_SHOWN} before" in text
    assert f"300 failures, the first {FAILURES_SHOWN} of them" in text
    assert f"[... {100_000 - LETTERS_SHOWN} more characters]" in text
    assert len(document) < 300_000


def test_values_that_json_cannot_hold_are_shown_by_their_repr() -> None:
    """A parameter that is not trained may hold anything."""
    assert "slice(1, 2, None)" in shown(Proposal(values={"part": slice(1, 2)})).text


@given(st.text(), st.text())
def test_a_comparison_holds_both_texts(before: str, after: str) -> None:
    """Without the insertions it is the old text, without the deletions the new one."""
    document = compared(before, after)
    assert plain(re.sub(r"<ins.*?</ins>", "", document, flags=re.DOTALL)) == plain(tag("i", before))
    assert plain(re.sub(r"<del.*?</del>", "", document, flags=re.DOTALL)) == plain(tag("i", after))


def plain(document: str) -> str:
    return re.sub(r"<[^>]*>", "", document)


def test_a_comparison_of_long_texts_is_fast() -> None:
    """Both are shown, one after the other, if there are too many words to pair."""
    before, after = "a b " * 5_000, "b c " * 5_000
    assert plain(compared(before, after)) == f"{before}\n\n{after}"


def test_only_markup_is_not_escaped() -> None:
    """A str is escaped whatever it holds, and so are attributes."""
    assert tag("i", "<b>", Html("<b></b>"), title='"<') == '<i title="&quot;&lt;">&lt;b&gt;<b></b></i>'


def test_printing_a_result_gave_one_line_of_20000_characters() -> None:
    """It is a summary: steps, scores, changes, refusals, cost, failures."""
    refused = report(2, decision=Decision(accepted=False, reason="mean score 0.5 -> 0.25"), update={"k": 9})
    reached = result(history=[report(0, update={"rule": "x"}), report(1, score=0.75), refused])
    shown = result(
        history=reached.history,
        usage={"agent": Usage(input_tokens=1200, output_tokens=34, cost=0.5, calls=7)},
        failures=[Failure(stage="agent", error="KeyError", message="'x'", sample_id=3)],
        warnings=["the cost of 2 calls is unknown"],
    )
    assert str(shown).splitlines() == [
        "TrainingResult: 3 steps, 2 updates applied",
        "test score 0.25 -> 0.75",
        "train score 0.25 -> 0.25",
        "changed: rule",
        "unchanged: k",
        "refused: 1 update, the last: mean score 0.5 -> 0.25",
        "7 calls, 1,234 tokens, $0.5",
        "1 failure, the first: agent, sample 3: KeyError: 'x'",
        "warning: the cost of 2 calls is unknown",
    ]
    assert repr(shown) == "<TrainingResult: 3 steps, 2 applied, test score 0.25 -> 0.75, 7 calls, 1,234 tokens, $0.5>"
    assert repr(refused) == "<StepReport: step 2, score 0.25, not updated: mean score 0.5 -> 0.25>"
    assert repr(reached.history[0]) == "<StepReport: step 0, score 0.25, updated rule>"


def test_printing_a_result_needs_ascii_only() -> None:
    """It works in a terminal with LC_ALL=C, too."""
    assert str(result()).isascii()
    assert str(TrainingResult(parameters={}, best_parameters={}, initial_parameters={})).splitlines() == [
        "TrainingResult: 0 steps, 0 updates applied",
        "no parameter changed",
    ]


def test_a_warning_keeps_its_lines_and_the_kept_values_are_named() -> None:
    """The traceback in a warning was one long line, and a page did not state which values a run ended with."""
    run = result(
        evaluations=(),
        validations=(Evaluation(step=0, score=0.0, scores=()), Evaluation(step=1, score=1.0, scores=())),
        kept="best",
        best_step=1,
        warnings=("the agent failed\nTraceback:\n  agent.py:3",),
    )
    assert "white-space:pre-wrap" in run._repr_html_().partition("the agent failed")[0].rpartition("<div")[2]
    text = shown(run).text
    assert "validation 0 → 1 · kept the best values, after 1 step" in text
    assert "validation and train score after each step, 0 to 1" in text
