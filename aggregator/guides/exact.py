"""Exact match: the output is what the data set says it should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aggregator.text import shorten, show_call

SHOWN = 500
"""How many characters of an output the feedback quotes."""


class ExactMatch:
    """Scores 1 where the output equals `info`, else 0; the feedback names what was expected.

    `normalise` is applied to both sides first, as in `ExactMatch(str.casefold)`. `key` picks the expected value out of
    an `info` that holds more, as in `key="answer"`. Text is compared without the whitespace around it.

    >>> ExactMatch(str.casefold)("2 + 2?", "Four", "four")
    (1.0, 'Correct.')
    """

    instant = True
    min_score = 0.0
    max_score = 1.0

    def __init__(self, normalise: Callable[[Any], Any] | None = None, *, key: str | None = None) -> None:
        self.normalise = normalise
        self.key = key

    def __repr__(self) -> str:
        return show_call("ExactMatch", *filter(None, [self.normalise]), key=self.key)

    def __call__(self, x: Any, output: Any, info: Any) -> tuple[float, str]:
        """Compare one output."""
        expected = info if self.key is None else info[self.key]
        if self._plain(output) == self._plain(expected):
            return 1.0, "Correct."
        return 0.0, f"Incorrect. Expected {shorten(expected, SHOWN)}, got {shorten(output, SHOWN)}."

    def _plain(self, value: Any) -> Any:
        text = value.strip() if isinstance(value, str) else value
        return text if self.normalise is None else self.normalise(text)


exact_match = ExactMatch()
"""The guide that compares output and `info` as they are."""
