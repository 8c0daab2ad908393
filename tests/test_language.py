"""The language rule: plain technical English, held by a short list of words that read like a translation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BANNED = {
    r"whoever": "name the caller, the user or the process",
    r"anew": "again, or re-record, rewrite, recompute",
    r"in force": "current",
    r"how-many-eth": "ordinal",
    r"(?:says?|tells?) whether": "Return True if ...",
    r"where there is none": "without one",
    r"cannot be meant": "invalid",
}
"""A pattern of words -> what to write in their place. Word borders are added."""

TEXTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "aggregator/**/*.py", "benchmarks/**/*.*", "examples/**/*.py", "tests/**/*.py")
    for path in ROOT.glob(pattern)
    if path.suffix in {".md", ".py"} and path.name != Path(__file__).name and "fixtures" not in path.parts
)


@pytest.mark.parametrize("words", BANNED)
def test_texts_use_plain_words(words: str) -> None:
    """Docs, docstrings, comments, errors and test names use the words that an engineer would search for."""
    pattern = re.compile(rf"\b{words}\b".replace(" ", r"\s+"), re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for path in TEXTS
        for text in [path.read_text(encoding="utf-8")]
        for match in pattern.finditer(text)
    ]
    assert found == [], BANNED[words]
