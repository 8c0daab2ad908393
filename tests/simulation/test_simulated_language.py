"""The English that the simulated model understands."""

from __future__ import annotations

import pytest

from aggregator.simulation.language import Rule, bare_text, mentions, read_default, read_line, read_rules, telling_words


@pytest.mark.parametrize(
    "line",
    ["refund, invoice -> billing", "- refund, invoice => billing.", "  'refund', \"invoice\" → billing"],
)
def test_rule_lines(line: str) -> None:
    """A rule may have any arrow, a bullet, quotes and a full stop."""
    assert read_line(line) == Rule(("refund", "invoice"), "billing")


@pytest.mark.parametrize("line", ["", "Be kind.", "-> billing", "refund, invoice"])
def test_prose_is_not_a_rule(line: str) -> None:
    """A line without words before an arrow is not a rule."""
    assert read_line(line) is None


def test_sentences_are_rules() -> None:
    """A sentence about the words of a text is a rule; several words are joined by commas, or, and."""
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
    """The default is the answer for texts that match no rule."""
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
def test_whole_words_match_literally(text: str, phrase: str, found: bool) -> None:
    """A word matches as a whole, with its case and punctuation."""
    assert mentions(text, phrase) is found


def test_telling_words_exclude_common_known_words_and_numbers() -> None:
    """Courtesy, common words, numbers and words of current rules are not informative."""
    assert telling_words("Hello, please send my INVOICE of 2024 again, and a refund!", known=["refund"]) == ["invoice"]


def test_bare_text_keeps_inner_hyphens() -> None:
    """Punctuation is removed only at the ends of words."""
    assert bare_text("(Sign-in) FAILED!") == "sign-in failed"
