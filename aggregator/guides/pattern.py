"""Regular expressions and keywords: what the output must, or must not, contain."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aggregator.errors import ConfigError, GuideError
from aggregator.guides.exact import SHOWN
from aggregator.text import shorten, show_call

Analyzer = Callable[[Any, Any, Any], str | None]
"""(x, output, info) -> a hint, or None or "" for no hint."""


class RegexMatch:
    r"""Scores 1 where the pattern is found in the output, else 0.

    Without a pattern of its own it takes each sample's `info`. `whole=True` wants the whole output to match.

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
    """Gives the hint of each keyword that the output contains, as for a compiler's messages.

    `hints` maps keyword to hint, or names a JSON file that does. The score is the share of keywords and analyzers that
    had nothing to say. `required=True` turns it around: the hint is given where the keyword is missing. `analyzers` are
    functions (x, output, info) -> hint or None, for what a keyword cannot say.

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
        self.hints = _checked_hints(hints)
        self.required = required
        self.ignore_case = ignore_case
        self.analyzers = tuple(analyzers)
        if not self.hints and not self.analyzers:
            raise ConfigError("Expected at least one keyword or analyzer, got none; every output would score the same")

    def __repr__(self) -> str:
        return show_call("KeywordHints", self.hints, required=self.required, ignore_case=self.ignore_case)

    def __call__(self, x: Any, output: Any, info: Any) -> tuple[float, str]:
        """Look through one output."""
        text = self._plain(str(output))
        found = [hint for word, hint in self.hints.items() if (self._plain(word) in text) != self.required]
        found += [hint for analyzer in self.analyzers if (hint := analyzer(x, output, info))]
        checks = len(self.hints) + len(self.analyzers)
        return (checks - len(found)) / checks, "\n".join(found) or "Correct."

    def _plain(self, text: str) -> str:
        return text.casefold() if self.ignore_case else text


def _checked_hints(hints: Mapping[str, str] | str | Path) -> dict[str, str]:
    if isinstance(hints, str | Path):
        try:
            found = json.loads(Path(hints).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"Expected a JSON file of keyword -> hint, got {str(hints)!r}: {error}") from None
    else:
        found = dict(hints)
    if not isinstance(found, dict) or not all(isinstance(hint, str) and word for word, hint in found.items()):
        raise ConfigError(f"Expected an object of keyword -> hint, both text, got {found!r}")
    return found
