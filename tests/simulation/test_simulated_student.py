"""The simulated model as a student: it follows its instructions, and nothing else."""

from __future__ import annotations

import pytest

from aggregator.simulation.language import UNKNOWN, answer_as_student

RULES = "refund, invoice -> billing\nparcel, late parcel -> shipping\nIf no rule applies, answer sales."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("my invoice is wrong", "billing"),
        ("my parcel is here", "shipping"),
        ("my Invoice, is wrong", "sales"),
        ("refund my late parcel", "shipping"),
        ("refund my parcel", "billing"),
        ("hello", "sales"),
    ],
)
def test_it_follows_the_rules_literally(text: str, answer: str) -> None:
    """The answer with the most matching words wins, or the first of equal ones; without a match the default."""
    assert answer_as_student(RULES, text) == answer


def test_without_a_rule_it_does_not_know() -> None:
    """Without a rule and a default it answers that it does not know, however plain the text is."""
    assert answer_as_student("Route the ticket to the right team.", "Refund my invoice!") == UNKNOWN


@pytest.mark.parametrize(
    ("form", "answer"),
    [("Answer in capitals.", "BILLING"), ('Answer as JSON: {"team": ...}.', '{"team": "billing"}'), ("", "billing")],
)
def test_it_answers_in_the_requested_form(form: str, answer: str) -> None:
    """The form is that of the instructions."""
    assert answer_as_student(f"{RULES}\n{form}", "an invoice") == answer
