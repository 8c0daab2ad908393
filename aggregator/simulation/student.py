"""The simulated model as a student: it follows the instructions it is given, literally, and nothing else.

It reads rules and a default from the system text, counts for each answer how many of its words the user text contains
(whole words, case and punctuation as written), and gives the answer with the most; of equals the one stated first.
Without a match it gives the default that the instructions name, or says that it does not know.
"""

from __future__ import annotations

import json
import re

from aggregator.simulation.language import answers, mentions, read_default, read_rules

UNKNOWN = "I do not know."

_JSON_KEY = re.compile(r"\bJSON\b[^{]*\{\s*\"(?P<key>\w+)\"")
_CAPITALS = re.compile(r"\bin (?:capitals|capital letters|upper case)\b", re.IGNORECASE)


def answer_as_student(system: str, user: str) -> str:
    """Answer the user text by the rules of the system text, in the form it asks for.

    >>> answer_as_student("refund, invoice -> billing", "where is my refund")
    'billing'
    """
    return _shape(system, follow(system, user))


def follow(system: str, user: str) -> str:
    """Return the answer that the rules lead to, before any form is given to it."""
    rules = read_rules(system)
    words = {answer: {w for rule in rules if rule.answer == answer for w in rule.words} for answer in answers(rules)}
    counts = {answer: sum(mentions(user, word) for word in words[answer]) for answer in words}
    best = max(counts, key=counts.__getitem__, default="")
    if counts.get(best):
        return best
    return read_default(system) or UNKNOWN


def _shape(system: str, answer: str) -> str:
    """Give an answer the form that the instructions ask for: as it is, in capitals, or as a JSON object."""
    if _CAPITALS.search(system):
        answer = answer.upper()
    found = _JSON_KEY.search(system)
    return json.dumps({found["key"]: answer}) if found else answer
