"""Checks: each refuses one new value by what it is, before anything is run.

    keeps_placeholders   a template keeps its placeholders and gains none; a prompt is never emptied (on by default)
    max_edit(0.2)        one update changes at most a fifth of a text
    leak_guard()         no runs of words from the training data in a text

A refused value is asked for once more with the reason; if the second one is refused too, the update goes on without it.
A check of your own is a function `(before, after, parameter, step) -> reason or None`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from difflib import SequenceMatcher
from math import floor
from typing import Any

from aggregator.agents.code import CodeParameter
from aggregator.agents.parameters import ParameterNode
from aggregator.checks import is_finite
from aggregator.errors import ConfigError
from aggregator.text import list_names, placeholders, shorten
from aggregator.training.batches import Dataset, samples
from aggregator.training.parts import check_checks
from aggregator.training.step import Check, Step

EDITS_ALLOWED = 20
"""max_edit always allows this many changed tokens: a short prompt could not be improved otherwise."""

LEAK_WORDS = 5
"""How many words in a row count as copied (the n-gram length of gepa issue 261)."""

_TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w+")


def template_placeholders(value: Any, parameter: ParameterNode[Any]) -> list[str]:
    """Return the placeholders of a parameter's value; source code and values that are no text have none."""
    return placeholders(value) if isinstance(value, str) and not isinstance(parameter, CodeParameter) else []


def keeps_placeholders(before: Any, after: Any, parameter: ParameterNode[Any], step: Step) -> str | None:
    """Refuse a text that loses a placeholder, invents one, or is empty where the current one is not.

    Source code has no placeholders. A refused text is never repaired by guessing where the placeholder belongs.

    >>> keeps_placeholders("Q: {question}", "Answer briefly.", ParameterNode("Q: {question}"), Step())
    "Expected a text that keeps the placeholders '{question}', got one without '{question}'"
    """
    if not (isinstance(before, str) and isinstance(after, str)):
        return None
    if before.strip() and not after.strip():
        return "Expected a text, got an empty one"
    old, new = template_placeholders(before, parameter), template_placeholders(after, parameter)
    if lost := [name for name in old if name not in new]:
        return f"Expected a text that keeps the placeholders {list_names(old)}, got one without {list_names(lost)}"
    if invented := [name for name in new if name not in old]:
        known = f"no placeholders but {list_names(old)}" if old else "no placeholders"
        return f"Expected a text with {known}, got {list_names(invented)}, which nothing fills in"
    return None


def max_edit(share: float = 0.2) -> Check:
    r"""Return a check that bounds how much of a text one update changes.

    `share` in (0, 1] is the part of the current text's tokens (`\w+|[^\w\s]`) that may be replaced, removed or added;
    20 tokens are always allowed. The difference is that of difflib: a passage that moves counts as changed. Raises
    ConfigError for another share.

    >>> check, before = max_edit(0.2), "word " * 200
    >>> check(before, before + "more " * 40, ParameterNode(before), Step())
    >>> check(before, before + "more " * 41, ParameterNode(before), Step())
    'Expected a text that changes at most 40 of the 200 tokens, got one that changes 41'
    """
    if not is_finite(share) or not 0 < share <= 1:
        raise ConfigError(f"Expected max_edit(share) in (0, 1], got {share!r}; 0.2 lets an update change a fifth")

    def max_edit(before: Any, after: Any, parameter: ParameterNode[Any], step: Step) -> str | None:
        if not (isinstance(before, str) and isinstance(after, str)):
            return None
        old, new = _TOKEN.findall(before), _TOKEN.findall(after)
        allowed = max(EDITS_ALLOWED, floor(share * len(old)))
        changed = edited_tokens(old, new)
        if changed <= allowed:
            return None
        return (
            f"Expected a text that changes at most {allowed} of the {len(old)} tokens, got one that changes {changed}"
        )

    return max_edit


def edited_tokens(old: Sequence[str], new: Sequence[str]) -> int:
    """Return how many tokens differ: of a passage that is replaced the longer side counts.

    >>> edited_tokens(["a", "b", "c"], ["a", "x", "y", "c"])
    2
    """
    pieces = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return sum(max(end - start, stop - begin) for kind, start, end, begin, stop in pieces if kind != "equal")


def leak_guard(data: Dataset | None = None, *, words: int = LEAK_WORDS) -> Check:
    """Return a check that refuses texts with runs of words copied from training inputs or answers.

    `data` is what must not be copied, by default the training set of the run, or the samples of a step made alone.
    Runs of `words` words that the initial or the current value has are allowed, and parameters marked as
    demonstrations (`ParameterNode(..., demonstrations=True)`) are not looked at. All texts inside a value count, for
    lists and mappings too. Raises ConfigError unless `words` is an int of at least 2.

    >>> check = leak_guard([("Which river runs through the old town of Bern?", "Aare")])
    >>> check("Answer.", "The river runs through the old town.", ParameterNode("Answer."), Step())
    "Expected a text without runs of 5 words from the training data, got 'river runs through the old' and 1 more"
    """
    if type(words) is not int or words < 2:
        raise ConfigError(f"Expected leak_guard(words=...) to be an int of at least 2, got {words!r}")
    given = None if data is None else samples(data)
    known: list[Any] = [None, {}]  # the samples that were looked at last, and the runs in them

    def leak_guard(before: Any, after: Any, parameter: ParameterNode[Any], step: Step) -> str | None:
        if getattr(parameter, "demonstrations", False):
            return None
        source = given or step.training or step.samples
        if known[0] is not source:
            known[:] = source, _runs((part for one in source for part in (one.x, one.info)), words)
        seen: dict[tuple[str, ...], str] = known[1]
        allowed = _runs((before, step.initial.get(parameter.name)), words).keys()
        copied = [text for run, text in _runs((after,), words).items() if run in seen and run not in allowed]
        if not copied:
            return None
        return (
            f"Expected a text without runs of {words} words from the training data, got {shorten(copied[0], 120)}"
            f"{f' and {len(copied) - 1} more' if len(copied) > 1 else ''}"
        )

    return leak_guard


def all_checks(given: Sequence[Check] | None) -> tuple[Check, ...]:
    """Return the checks of a trainer: `keeps_placeholders` and those given; an empty list turns all of them off.

    Raises ConfigError for what is not a list of checks.
    """
    if given is None:
        return (keeps_placeholders,)
    check_checks(given)
    own = tuple(given)
    return own if not own or keeps_placeholders in own else (keeps_placeholders, *own)


def _runs(values: Iterable[Any], words: int) -> dict[tuple[str, ...], str]:
    """Return every run of so many words in the texts of some values: the words in lower case -> the text."""
    found: dict[tuple[str, ...], str] = {}
    for text in (text for value in values for text in _texts(value)):
        spans = list(_WORD.finditer(text))
        for i in range(len(spans) - words + 1):
            part = spans[i : i + words]
            found.setdefault(tuple(word[0].casefold() for word in part), text[part[0].start() : part[-1].end()])
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple | AbstractSet):
        for item in value:
            yield from _texts(item)
    else:
        names: Any = getattr(value, "__struct_fields__", getattr(value, "__dataclass_fields__", ()))
        for name in names:
            yield from _texts(getattr(value, name))
