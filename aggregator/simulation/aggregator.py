"""The simulated model as an aggregator: it weighs confidence, support and agreement.

A block weighs its confidence times the number of examples behind it. Of two sides that exclude one another the heavier
wins, and of equals the current value. What merely adds (a word to a rule, a line, an item of a list) needs half the
current value's confidence. Texts are merged line by line, lines of rules word by word, lists item by item, numbers by
weighted median, and everything else (code, flags, objects) by majority.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from aggregator.simulation.language import Rule, layout

ADDITION = 0.5
"""The share of the current value's confidence that a mere addition needs."""

_SLACK = 1e-9  # sums of weights that are equal on paper may differ in their last bits


class Block(Struct, frozen=True):
    """One side's values and what they weigh."""

    weight: float
    values: dict[str, Any]


class Ballot(Struct, frozen=True):
    """The current value of one component, its weight, and the suggested values with theirs."""

    current: Any
    weight: float
    votes: list[tuple[Any, float]]


def aggregate(current: Block, suggested: Sequence[Block]) -> dict[str, Any]:
    """Return the components whose value should change, with their new values."""
    update = {}
    for name, value in current.values.items():
        votes = [(block.values[name], block.weight) for block in suggested if name in block.values]
        if votes:
            merged = merge(Ballot(value, current.weight, votes))
            if merged != value:
                update[name] = merged
    return update


def choose(current: Block, suggested: Sequence[Block]) -> int:
    """Return the number of the block that comes nearest to what they would be merged to, 0 for the current values."""
    merged = aggregate(current, suggested)
    if not merged:
        return 0
    agreeing = [sum(block.values.get(name) == value for name, value in merged.items()) for block in suggested]
    return 1 + max(range(len(suggested)), key=lambda i: (agreeing[i], suggested[i].weight, -i))


def merge(ballot: Ballot) -> Any:
    """Merge one component by what kind of value it holds."""
    current = ballot.current
    if isinstance(current, bool):
        return majority(ballot)
    if isinstance(current, int | float):
        return weighted_median(_only(ballot, int | float))
    if isinstance(current, list):
        return merged_items(_only(ballot, list))
    if isinstance(current, str) and not is_code(current):
        return merged_text(_only(ballot, str))
    return majority(ballot)


def is_code(text: str) -> bool:
    r"""Whether a text is the source of a function.

    >>> is_code("def f(x):\n    return x"), is_code("define the terms")
    (True, False)
    """
    lines = [line for line in text.strip().splitlines() if not line.startswith("@")]
    return bool(lines) and lines[0].startswith(("def ", "async def ")) and "(" in lines[0]


def majority(ballot: Ballot) -> Any:
    """Return the value with the most weight behind it; of equals the current one."""
    weights: dict[str, float] = {}
    values: dict[str, Any] = {}
    for value, weight in [(ballot.current, ballot.weight), *ballot.votes]:
        key = value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True)
        values.setdefault(key, value)
        weights[key] = weights.get(key, 0.0) + weight
    return values[max(weights, key=lambda key: round(weights[key], 9))]


def weighted_median(ballot: Ballot) -> int | float:
    """Return the value with half of the weight on either side; between two of them the one nearer to the current.

    >>> weighted_median(Ballot(8, 0.5, [(13, 0.5), (13, 0.5), (400, 0.5)]))
    13
    """
    sides = sorted([(ballot.current, ballot.weight), *ballot.votes])
    half = math.fsum(weight for _, weight in sides) / 2
    candidates: list[int | float] = []
    below = 0.0
    for value, weight in sides:
        if below <= half + _SLACK and below + weight >= half - _SLACK:
            candidates.append(value)
        below += weight
    return min(candidates, key=lambda value: abs(value - ballot.current))


def merged_items(ballot: Ballot) -> list[Any]:
    """Merge lists item by item, in the order of first appearance."""
    decode = json.loads
    return [decode(key) for key in _elected(ballot, lambda items: [json.dumps(item, sort_keys=True) for item in items])]


def merged_text(ballot: Ballot) -> str:
    """Merge texts: plain lines line by line, lines of rules word by word."""
    plain = _elected(ballot, lambda text: [line for line in layout(text) if isinstance(line, str)])
    rules = _elected_rules(ballot)
    lines: list[str] = []
    for line in layout(ballot.current):
        if isinstance(line, Rule):
            if line.answer in rules:
                lines.append(str(Rule(tuple(rules.pop(line.answer)), line.answer)))
        elif line in plain:
            lines.append(line)
    known = set(lines)
    lines += [line for line in plain if line not in known]
    return "\n".join(lines + [str(Rule(tuple(words), answer)) for answer, words in rules.items()])


def _elected(ballot: Ballot, parts: Callable[[Any], list[str]]) -> list[str]:
    """Elect the parts of which several values consist: kept, added, or dropped."""
    held = parts(ballot.current)
    added: dict[str, float] = {}
    dropped: dict[str, float] = {}
    for value, weight in ballot.votes:
        offered = parts(value)
        for part in dict.fromkeys(offered):
            if part not in held:
                added[part] = added.get(part, 0.0) + weight
        for part in set(held) - set(offered):
            dropped[part] = dropped.get(part, 0.0) + weight
    kept = [part for part in held if dropped.get(part, 0.0) <= ballot.weight + _SLACK]
    return kept + [part for part, weight in added.items() if weight >= ADDITION * ballot.weight - _SLACK]


def _elected_rules(ballot: Ballot) -> dict[str, list[str]]:
    """Return answer -> its words: each word goes where the most weight wants it, or nowhere."""
    held = _word_answers(ballot.current)
    wishes: dict[str, dict[str, float]] = {word: {answer: ballot.weight} for word, answer in held.items()}
    for value, weight in ballot.votes:
        offered = _word_answers(value)
        for word in dict.fromkeys([*offered, *held]):
            answer = offered.get(word, "")
            if answer != held.get(word):
                sides = wishes.setdefault(word, {})
                sides[answer] = sides.get(answer, 0.0) + weight
    rules: dict[str, list[str]] = {}
    for word, sides in wishes.items():
        answer = _winner(sides, held.get(word), ballot.weight)
        if answer:
            rules.setdefault(answer, []).append(word)
    return rules


def _winner(sides: dict[str, float], held: str | None, current: float) -> str:
    """Return the answer that a word goes to, "" for none: equals keep what is held and cancel what is new."""
    first, *others = sorted(sides, key=lambda answer: -sides[answer])
    tied = bool(others) and sides[others[0]] >= sides[first] - _SLACK
    if held is not None:
        return held if tied else first
    return "" if tied or sides[first] < ADDITION * current - _SLACK else first


def _word_answers(text: str) -> dict[str, str]:
    rules = [line for line in layout(text) if isinstance(line, Rule)]
    return {word: rule.answer for rule in rules for word in rule.words}


def _only(ballot: Ballot, kinds: Any) -> Ballot:
    """Leave out votes of a type that the component cannot take."""
    votes = [(value, weight) for value, weight in ballot.votes if isinstance(value, kinds)]
    return Ballot(ballot.current, ballot.weight, [vote for vote in votes if not isinstance(vote[0], bool)])
