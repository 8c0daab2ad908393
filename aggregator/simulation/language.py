"""The English that the simulated model understands: words, rules and defaults in plain text.

It reads three forms of rules:

    refund, invoice -> billing
    Tickets that mention 'refund' or 'invoice' go to billing.
    If no rule applies, answer sales.

All functions are pure; none uses an agent, a data set or an expected answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec import Struct

EDGES = ".,;:!?()[]{}<>'\"`*_/\\…-"
"""Punctuation that is removed from either end of a word."""

COURTESY = ("please", "kindly", "hello", "dear", "thanks", "thank", "regards", "hi")
"""Words unrelated to any subject; a wrong proposal makes rules of them."""

COMMON = frozenset(Path(__file__).with_name("common_words.txt").read_text(encoding="utf-8").split()) | set(COURTESY)
"""Words too common to distinguish one subject from another."""

_ARROW = re.compile(r"^\s*(?:[-*]\s+)?(?P<words>.+?)\s*(?:->|=>|→)\s*(?P<answer>.+?)\s*\.?\s*$")
_QUOTED = r"(?:'[^']+'|\"[^\"]+\")"
_SENTENCE = re.compile(
    rf"(?:mention|contain|include|say)(?:s|ing)?\s+(?:the words?\s+)?"
    rf"(?P<words>{_QUOTED}(?:\s*(?:,|or|and)\s*{_QUOTED})*)"
    r"\s*,?\s*(?:should\s+)?(?:goe?s?|belongs?|is sent|are sent)\s+to\s+(?:the\s+)?(?P<answer>[\w-]+)",
    re.IGNORECASE,
)
_DEFAULT = re.compile(
    r"(?:otherwise|in doubt|if unsure|if nothing fits|if no rules? (?:applies|apply|fits?|match|matches))"
    r"\s*,?\s*(?:answer|say|reply|send it to|choose)\s*:?\s*['\"]?(?P<answer>[\w-]+)",
    re.IGNORECASE,
)


class Rule(Struct, frozen=True):
    """If any of `words` is in the text, the answer is `answer`."""

    words: tuple[str, ...]
    answer: str

    def __str__(self) -> str:
        return f"{', '.join(self.words)} -> {self.answer}"


def read_line(line: str) -> Rule | None:
    """Read one line of the arrow form.

    >>> read_line("- refund, invoice -> billing")
    Rule(words=('refund', 'invoice'), answer='billing')
    """
    found = _ARROW.match(line)
    if found is None:
        return None
    words = tuple(word for part in found["words"].split(",") if (word := part.strip().strip("'\"")))
    return Rule(words, found["answer"].strip("'\"")) if words else None


def layout(text: str) -> list[str | Rule]:
    """Split a text into its lines; those of the arrow form become rules."""
    return [read_line(line) or line for line in text.split("\n")]


def read_rules(text: str) -> list[Rule]:
    """Return the rules in a text, in either form, in order.

    >>> read_rules("Tickets that mention 'x' or 'y' go to z.")
    [Rule(words=('x', 'y'), answer='z')]
    """
    rules: list[Rule] = []
    for line in layout(text):
        if isinstance(line, Rule):
            rules.append(line)
        else:
            rules += [
                Rule(tuple(quoted[1:-1] for quoted in re.findall(_QUOTED, found["words"])), found["answer"])
                for found in _SENTENCE.finditer(line)
            ]
    return rules


def read_default(text: str) -> str | None:
    """Return the answer that a text names for texts that match no rule.

    >>> read_default("If no rule applies, answer sales.")
    'sales'
    """
    found = _DEFAULT.search(text)
    return found["answer"] if found else None


def mentions(text: str, phrase: str) -> bool:
    """Return True if the text contains a word or phrase exactly: whole words, including case and punctuation.

    >>> mentions("a refund now", "refund"), mentions("a Refund, now", "refund")
    (True, False)
    """
    return f" {phrase} " in f" {' '.join(text.split())} "


def bare(word: str) -> str:
    """Return a word in lower case without punctuation at its ends.

    >>> bare("REFUND!")
    'refund'
    """
    return word.strip(EDGES).lower()


def bare_text(text: str) -> str:
    """Return the text's bare words, one space between them."""
    return " ".join(filter(None, map(bare, text.split())))


def telling_words(text: str, known: Iterable[str] = ()) -> list[str]:
    """Return the bare words that may show a text's subject, the most specific first: long ones, then late ones.

    >>> telling_words("Hello, please refund my invoice 20!")
    ['invoice', 'refund']
    """
    skip = COMMON | set(known)
    words = [word for word in bare_text(text).split() if len(word) > 2 and not any(c.isdigit() for c in word)]
    positions = {word: i for i, word in enumerate(words) if word not in skip}
    return sorted(positions, key=lambda word: (-len(word), -positions[word]))


def answers(rules: Sequence[Rule]) -> list[str]:
    """Return the answers of rules, each once, in order."""
    return list(dict.fromkeys(rule.answer for rule in rules))


UNKNOWN = "I do not know."

_JSON_KEY = re.compile(r"\bJSON\b[^{]*\{\s*\"(?P<key>\w+)\"")
_CAPITALS = re.compile(r"\bin (?:capitals|capital letters|upper case)\b", re.IGNORECASE)


def split_prompt(text: str) -> tuple[str, str]:
    r"""Split a single-message prompt into instruction and rules, and the question, its last other paragraph.

    >>> split_prompt("Name the team.\n\nWhere is my parcel?\nparcel -> shipping")
    ('Name the team.\nparcel -> shipping', 'Where is my parcel?')
    """
    lines = layout(text)
    rules = [str(line) for line in lines if isinstance(line, Rule)]
    plain = "\n".join(line for line in lines if isinstance(line, str)).rstrip()
    instruction, blank, question = plain.rpartition("\n\n")
    return ("\n".join([instruction, *rules]), question) if blank else ("", text)


def answer_as_student(system: str, user: str) -> str:
    """Answer the user text by the rules of the system text, in the form it asks for.

    >>> answer_as_student("refund, invoice -> billing", "where is my refund")
    'billing'
    """
    answer = follow(system, user)
    if _CAPITALS.search(system):
        answer = answer.upper()
    found = _JSON_KEY.search(system)
    return json.dumps({found["key"]: answer}) if found else answer


def follow(system: str, user: str) -> str:
    """Return the answer that the rules give, before it is formatted."""
    rules = read_rules(system)
    words = {answer: {w for rule in rules if rule.answer == answer for w in rule.words} for answer in answers(rules)}
    counts = {answer: sum(mentions(user, word) for word in words[answer]) for answer in words}
    best = max(counts, key=counts.__getitem__, default="")
    if counts.get(best):
        return best
    return read_default(system) or UNKNOWN
