"""Guides that compare: exact output, numbers within a tolerance, regular expressions and keywords."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aggregator.errors import ConfigError, GuideError
from aggregator.text import list_names, shorten, show_call

SHOWN = 500
"""The number of characters of an output that the feedback quotes."""


def _is_record(value: Any) -> bool:
    """Return True for a DSPy Example or Prediction."""
    return hasattr(type(value), "toDict") and hasattr(type(value), "keys")


class ExactMatch:
    """Scores 1 if the output equals `info`, else 0; the feedback names the expected value.

    `normalise` is applied to both sides first, as in `ExactMatch(str.casefold)`. `key` selects the expected value from
    an `info` with several, as in `key="answer"`, and the output from a DSPy prediction. Text is compared without
    surrounding whitespace.

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
        if self.key is None and (_is_record(info) or (isinstance(info, Mapping) and not isinstance(output, Mapping))):
            raise GuideError(
                f"Expected the right output as info, got a row with the columns "
                f"{list_names(list(map(str, info.keys())))}; name the column, as in ExactMatch(key='answer')"
            )
        if _is_record(output):
            if self.key is None or self.key not in output:
                raise GuideError(
                    f"Expected an output to compare, got a prediction of {list_names(list(output.keys()))}; name the "
                    "field, as in ExactMatch(key='answer') for Examples, or trainable(program, output='answer')"
                )
            output = output[self.key]
        expected = info if self.key is None else info[self.key]
        if self._plain(output) == self._plain(expected):
            return 1.0, "Correct."
        return 0.0, f"Incorrect. Expected {shorten(expected, SHOWN)}, got {shorten(output, SHOWN)}."

    def _plain(self, value: Any) -> Any:
        text = value.strip() if isinstance(value, str) else value
        return text if self.normalise is None else self.normalise(text)


exact_match = ExactMatch()
"""The guide that compares output and `info` unchanged."""


_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?:[eE][-+]?\d+)?")


class NumericMatch:
    """Scores 1 if the output is a number within the tolerance of `info`, else 0.

    Tolerances are those of `math.isclose`. An output of text must be one number, with or without commas between
    thousands; `last=True` uses the last number in it, as is usual for worked solutions. `key` selects the expected
    number from an `info` with several.

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
        """Compare one output; raises GuideError if `info` is not a number, which is not the agent's fault."""
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


Analyzer = Callable[[Any, Any, Any], str | None]
"""(x, output, info) -> a hint, or None or "" for no hint."""


class RegexMatch:
    r"""Scores 1 if the pattern is found in the output, else 0.

    Without a pattern it uses each sample's `info`. With `whole=True` the whole output must match.

    >>> RegexMatch(r"\b(billing|other)\b")("x", "It is billing.", None)
    (1.0, 'Correct.')
    """

    min_score = 0.0
    max_score = 1.0

    def __init__(self, pattern: str | re.Pattern[str] | None = None, *, whole: bool = False) -> None:
        self.pattern = None if pattern is None else _compiled(pattern, ConfigError)
        self.whole = whole

    def __repr__(self) -> str:
        return show_call("RegexMatch", *([self.pattern.pattern] if self.pattern else []), whole=self.whole)

    def __call__(self, x: Any, output: Any, info: Any) -> tuple[float, str]:
        """Search one output."""
        pattern = self.pattern or _compiled(info, GuideError)
        found = pattern.fullmatch(str(output)) if self.whole else pattern.search(str(output))
        if found:
            return 1.0, "Correct."
        part = "all of it" if self.whole else "a part"
        return 0.0, f"Incorrect. Expected {part} to match {pattern.pattern!r}, got {shorten(output, SHOWN)}."


def _compiled(pattern: Any, error: type[ConfigError | GuideError]) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as reason:
        raise error(f"Expected a regular expression, got {pattern!r}: {reason}") from None


class KeywordHints:
    """Gives the hint of each keyword in the output, for example in a compiler's messages.

    `hints` maps keyword to hint, or names a JSON file with such a mapping. The score is the share of keywords and
    analyzers without a hint. With `required=True` the hint is given if the keyword is missing. `analyzers` are
    functions (x, output, info) -> hint or None.

    >>> KeywordHints({"OutOfMemory": "Use a smaller batch."})("x", "error: OutOfMemory", None)
    (0.0, 'Use a smaller batch.')
    """

    min_score = 0.0
    max_score = 1.0

    def __init__(
        self,
        hints: Mapping[str, str] | str | Path,
        *,
        required: bool = False,
        ignore_case: bool = False,
        analyzers: Sequence[Analyzer] = (),
    ) -> None:
        if isinstance(hints, str | Path):
            try:
                found = json.loads(Path(hints).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"Expected a JSON file of keyword -> hint, got {str(hints)!r}: {error}") from None
        else:
            found = dict(hints)
        if not isinstance(found, dict) or not all(isinstance(hint, str) and word for word, hint in found.items()):
            raise ConfigError(f"Expected an object of keyword -> hint, both text, got {found!r}")
        self.hints: dict[str, str] = found
        self.required = required
        self.ignore_case = ignore_case
        self.analyzers = tuple(analyzers)
        if not self.hints and not self.analyzers:
            raise ConfigError("Expected at least one keyword or analyzer, got none; every output would score the same")

    def __repr__(self) -> str:
        return show_call("KeywordHints", self.hints, required=self.required, ignore_case=self.ignore_case)

    def __call__(self, x: Any, output: Any, info: Any) -> tuple[float, str]:
        """Search one output."""
        text = self._plain(str(output))
        found = [hint for word, hint in self.hints.items() if (self._plain(word) in text) != self.required]
        found += [hint for analyzer in self.analyzers if (hint := analyzer(x, output, info))]
        checks = len(self.hints) + len(self.analyzers)
        return (checks - len(found)) / checks, "\n".join(found) or "Correct."

    def _plain(self, text: str) -> str:
        return text.casefold() if self.ignore_case else text
