"""Prompt templates: the placeholders of a text, and filling them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aggregator.errors import ConfigError
from aggregator.text import fill


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("Classify: {ticket}", {"ticket": "late"}, "Classify: late"),
        ("Classify: {{ticket}} or {{ ticket }}", {"ticket": "late"}, "Classify: late or late"),
        ("Classify: $ticket, ${ticket}, $$ticket", {"ticket": "late"}, "Classify: late, late, $$ticket"),
        ("{score:.2f} {name!r}", {"score": 0.5, "name": "a"}, "0.50 'a'"),
        ("{user.name} {items[0]}", {"user": SimpleNamespace(name="Ann"), "items": ["x"]}, "Ann x"),
        ('{"team": "{team}"} {}', {"team": "sales"}, '{"team": "sales"} {}'),
        ("{a}{b}", {"a": "{b}", "b": "$a"}, "{b}$a"),
        ("Classify: {ticket}", "late", "Classify: late"),
        ("Twice {ticket} and {ticket}", 3, "Twice 3 and 3"),
        ("no placeholder", "late", "no placeholder"),
        ("{ticket}", {"ticket": "late", "unused": 1}, "late"),
    ],
)
def test_a_template_is_filled_from_a_row(template: str, row: Any, text: str) -> None:
    """Named columns fill the placeholders of all three languages; other braces, and filled-in text, are literal."""
    assert fill(template, row) == text


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        ("{question} in {language}", {"question": "who?"}, "column 'language', which the template names"),
        ("{question} in {language}", "who?", "columns 'language', 'question', got str"),
    ],
)
def test_a_row_without_a_column(template: str, row: Any, message: str) -> None:
    """The error names the column and the remedy."""
    with pytest.raises(ConfigError, match=message):
        fill(template, row)
