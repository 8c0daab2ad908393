"""What the simulated model understands of English."""

from __future__ import annotations

import pytest

from aggregator.simulation.language import Rule, bare_text, mentions, read_default, read_line, read_rules, telling_words


@pytest.mark.parametrize(
    "line",
    ["refund, invoice -> billing", "- refund, invoice => billing.", "  'refund', \"invoice\" → billing"],
)
def test_rule_lines(line: str) -> None:
    """A rule may use any arrow, a bullet, quotes and a full stop."""
    assert read_line(line) == Rule(("refund", "invoice"), "billing")


@pytest.mark.parametrize("line", ["", "Be kind.", "-> billing", "refund, invoice"])
def test_prose_is_no_rule(line: str) -> None:
    """A line without words in front of an arrow states no rule."""
    assert read_line(line) is None


def test_sentence_rules() -> None:
    """A sentence about what a text mentions is a rule, several words joined by commas, or, and."""
    text = (
        "Tickets that mention 'refund', 'fee' or 'bill' go to billing. A text containing \"box\" belongs to shipping."
    )
    assert read_rules(text) == [Rule(("refund", "fee", "bill"), "billing"), Rule(("box",), "shipping")]


@pytest.mark.parametrize(
    ("text", "default"),
    [
        ("If no rule applies, answer sales.", "sales"),
        ("Otherwise say 'none'", "none"),
        ("When in doubt, choose account", "account"),
        ("Be kind.", None),
    ],
)
def test_default(text: str, default: str | None) -> None:
    """The default is the answer that the text names for what no rule covers."""
    assert read_default(text) == default


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("a refund now", "refund", True),
        ("a Refund now", "refund", False),
        ("a refund, now", "refund", False),
        ("refunded", "refund", False),
        ("in two  words", "two words", True),
    ],
)
def test_mentions_whole_words_as_written(text: str, phrase: str, found: bool) -> None:
    """A word matches as a whole, with the case and punctuation it is written with."""
    assert mentions(text, phrase) is found


def test_telling_words_leave_out_what_is_common_known_or_a_number() -> None:
    """Courtesy, common words, numbers and words of present rules tell nothing new."""
    assert telling_words("Hello, please send my INVOICE of 2024 again, and a refund!", known=["refund"]) == ["invoice"]


def test_bare_text_keeps_inner_hyphens() -> None:
    """Only the ends of words lose punctuation."""
    assert bare_text("(Sign-in) FAILED!") == "sign-in failed"
