"""Numbers within a tolerance."""

from __future__ import annotations

import math
import re
from typing import Any

from aggregator.errors import ConfigError, GuideError
from aggregator.guides.exact import SHOWN
from aggregator.text import shorten, show_call

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?:[eE][-+]?\d+)?")


class NumericMatch:
    """Scores 1 where the output is a number within the tolerance of `info`, else 0.

    Tolerances are those of `math.isclose`. An output of text must be one number, thousands separated by commas or not;
    `last=True` takes the last number in it, as is usual for worked solutions. `key` picks the expected number out of an
    `info` that holds more.

    >>> NumericMatch(abs_tol=0.01)("pi?", "3.14", 3.14159)
    (1.0, 'Correct.')
    >>> NumericMatch(last=True)("6 * 7?", "6 times 7 is 42.", 42)[0]
    1.0
    """

    instant = True
    min_score = 0.0
    max_score = 1.0

    def __init__(
        self, *, rel_tol: float = 1e-9, abs_tol: float = 0.0, last: bool = False, key: str | None = None
    ) -> None:
        if not (rel_tol >= 0 and abs_tol >= 0):
            raise ConfigError(f"Expected tolerances of at least 0, got rel_tol={rel_tol!r}, abs_tol={abs_tol!r}")
        self.rel_tol = rel_tol
        self.abs_tol = abs_tol
        self.last = last
        self.key = key

    def __repr__(self) -> str:
        return show_call("NumericMatch", rel_tol=self.rel_tol, abs_tol=self.abs_tol, last=self.last, key=self.key)

    def __call__(self, x: Any, output: Any, info: Any) -> tuple[float, str]:
        """Compare one output; raises GuideError where `info` is no number, as that is no fault of the agent."""
        wanted = info if self.key is None else info[self.key]
        expected = _number(wanted, last=False)
        if expected is None:
            raise GuideError(f"Expected a finite number to compare with, got {wanted!r}")
        got = _number(output, last=self.last)
        if got is None:
            return 0.0, f"Incorrect. Expected the number {wanted}, got no number: {shorten(output, SHOWN)}."
        if math.isclose(got, expected, rel_tol=self.rel_tol, abs_tol=self.abs_tol):
            return 1.0, "Correct."
        return 0.0, f"Incorrect. Expected {wanted}, got {got:g}."


def _number(value: Any, *, last: bool) -> float | None:
    """Read a finite number, or return None."""
    if isinstance(value, str):
        found = _NUMBER.findall(value) if last else [value.strip()] if _NUMBER.fullmatch(value.strip()) else []
        numbers = [text for text in found if text]
        value = numbers[-1].replace(",", "") if numbers else None
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
