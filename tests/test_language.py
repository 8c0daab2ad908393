"""The language rule: plain technical English, held by a short list of words that read like a translation."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from aggregator import errors
from aggregator.errors import AggregatorError

ROOT = Path(__file__).parents[1]

BANNED = {
    r"whoever|nobody": "name the caller, the user or the process",
    r"whichever": "any, or in any order",
    r"anew": "again, or re-record, rewrite, recompute",
    r"in force": "current",
    r"how-many-eth": "ordinal",
    r"(?:says?|tells?) whether": "Return True if ...",
    r"where there is none": "without one",
    r"cannot be meant": "invalid",
    r"cannot cross": "cannot be sent",
    r"beside": "with, next to, or in addition to",
    r"stands? (?:in|for|out|under)": "is in, or means",
    r"(?:hand|hands|handed) (?:in|out|over)": "submit, yield or pass",
    r"goes on": "continues",
    r"tried again": "retried",
    r"under way": "in flight, or running",
    r"at hand": "current, or available",
    r"dearer|dearest": "more expensive, or highest",
    r"taken as (?:it is|they are)": "accepted unchanged",
}
"""A pattern of words -> what to write in their place. Word borders are added."""

RECORDED = {
    "aggregator/demo/run.py",
    "aggregator/simulation/optimizer.py",
    "aggregator/training/prompts.py",
    "aggregator/training/replies.py",
}
"""Files whose texts reach models: a change would make recorded cassettes miss."""

OURS = {name for name, thing in vars(errors).items() if isinstance(thing, type) and issubclass(thing, AggregatorError)}
OURS -= {"SuggestionError"}

TEXTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "aggregator/**/*.py", "benchmarks/**/*.*", "examples/**/*.py", "tests/**/*.py")
    for path in ROOT.glob(pattern)
    if path.suffix in {".md", ".py"} and path.name != Path(__file__).name and "fixtures" not in path.parts
)


@cache
def prose(path: Path) -> str:
    """Return a document, or the comments, strings and test names of a program, each on its own line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    lines = text.splitlines()
    found = [""] * (len(lines) + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in {tokenize.COMMENT, tokenize.STRING} or token.string.startswith("test_"):
            for offset, line in enumerate(token.string.splitlines()):
                found[token.start[0] - 1 + offset] += f" {line.replace('_', ' ')}"
    return "\n".join(found)


def matches(words: str) -> Iterator[str]:
    """Yield each place where the words are used."""
    pattern = re.compile(rf"\b(?:{words})\b".replace(" ", r"\s+"), re.IGNORECASE)
    for path in TEXTS:
        name = path.relative_to(ROOT).as_posix()
        if name not in RECORDED:
            for match in pattern.finditer(prose(path)):
                yield f"{name}:{prose(path).count(chr(10), 0, match.start()) + 1}: {match.group()}"


@pytest.mark.parametrize("words", BANNED)
def test_texts_use_plain_words(words: str) -> None:
    """Docs, docstrings, comments, errors and test names use the words that an engineer would search for."""
    assert list(matches(words)) == [], BANNED[words]


def test_errors_begin_with_what_was_expected() -> None:
    """Expected, got, where, remedy: every error with a text of its own states first what was expected.

    ValueError, TypeError and the like end up after "got" in such an error; SuggestionErrors too.
    """
    package = ROOT / "aggregator"
    wrong = [
        f"{path.relative_to(package)}:{call.lineno}: {message}"
        for path in sorted(package.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in OURS and call.args
        if (message := beginning(call.args[0])) and not message.startswith("Expected")
    ]
    assert wrong == []


def beginning(node: ast.expr) -> str:
    """Return the constant beginning of a text, "" if it begins with a value."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) else node
    return str(first.value) if isinstance(first, ast.Constant) else ""


def test_names_of_tests_and_strings_are_read(tmp_path: Path) -> None:
    """The check above reads comments, strings and names of tests, and no other names."""
    program = tmp_path / "program.py"
    program.write_text('beside = 1  # a comment\n\n\ndef test_a_name() -> str:\n    return "a string"\n')
    assert prose(program).split() == ["#", "a", "comment", "test", "a", "name", '"a', 'string"']
