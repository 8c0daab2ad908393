"""The simulated model as an optimizer and as an aggregator.

The optimizer reads one example's feedback and proposes a change that would have made it right.

In this order, as far as the parameters allow:

- the text that the agent's model saw was cut short: a larger number for the parameter about length;
- a rule would have matched without case or punctuation: code that removes them;
- no rule covers the text: its most telling words become words of a rule for the expected answer, and misleading words
  are removed from other rules;
- the expected answer is missing from a list of answers: it is added;
- feedback that asks for more or less of something: a larger or smaller number.

At a given rate it errs, as models do: an uninformative word, another answer, far too large a number, code that does not
parse.

The aggregator weighs confidence, support and agreement. A block's weight is its confidence times its number of
examples. Of two conflicting sides the heavier wins, or the current value if they are equal. A mere addition (a word to
a rule, a line, an item of a list) needs half the current value's confidence. Texts are merged line by line, lines of
rules word by word, lists item by item, numbers by weighted median, and everything else (code, flags, objects) by
majority.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from aggregator.checks import is_number
from aggregator.simulation.language import (
    COURTESY,
    Rule,
    answers,
    bare,
    bare_text,
    layout,
    mentions,
    read_default,
    read_rules,
    telling_words,
)

# ---- the aggregator: confidence, support and agreement

ADDITION = 0.5
"""The share of the current value's confidence that a mere addition needs."""

_SLACK = 1e-9  # sums of weights that are equal on paper may differ in their last bits


class Block(Struct, frozen=True):
    """One side's values and their weight."""

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
    """Return the number of the block closest to the merged values, 0 for the current values."""
    merged = aggregate(current, suggested)
    if not merged:
        return 0
    agreeing = [sum(block.values.get(name) == value for name, value in merged.items()) for block in suggested]
    return 1 + max(range(len(suggested)), key=lambda i: (agreeing[i], suggested[i].weight, -i))


def merge(ballot: Ballot) -> Any:
    """Merge one component by the type of its value."""
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
    r"""Return True if a text is the source of a function.

    >>> is_code("def f(x):\n    return x"), is_code("define the terms")
    (True, False)
    """
    lines = [line for line in text.strip().splitlines() if not line.startswith("@")]
    return bool(lines) and lines[0].startswith(("def ", "async def ")) and "(" in lines[0]


def majority(ballot: Ballot) -> Any:
    """Return the value with the most weight, or the current one if they are equal."""
    weights: dict[str, float] = {}
    values: dict[str, Any] = {}
    for value, weight in [(ballot.current, ballot.weight), *ballot.votes]:
        key = value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True)
        values.setdefault(key, value)
        weights[key] = weights.get(key, 0.0) + weight
    return values[max(weights, key=lambda key: round(weights[key], 9))]


def weighted_median(ballot: Ballot) -> int | float:
    """Return the value with half of the weight on either side; of two such values the one closer to the current.

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
    """Elect the parts of several values: kept, added, or dropped."""
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
    """Return answer -> its words: each word goes to the answer with the most weight, or is dropped."""
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
    """Return the answer that a word belongs to, or "": equal weights keep a current word and drop a new one."""
    first, *others = sorted(sides, key=lambda answer: -sides[answer])
    tied = bool(others) and sides[others[0]] >= sides[first] - _SLACK
    if held is not None:
        return held if tied else first
    return "" if tied or sides[first] < ADDITION * current - _SLACK else first


def _word_answers(text: str) -> dict[str, str]:
    rules = [line for line in layout(text) if isinstance(line, Rule)]
    return {word: rule.answer for rule in rules for word in rule.words}


def _only(ballot: Ballot, kinds: Any) -> Ballot:
    """Leave out votes of a type that the component does not accept."""
    votes = [(value, weight) for value, weight in ballot.votes if isinstance(value, kinds)]
    return Ballot(ballot.current, ballot.weight, [vote for vote in votes if not isinstance(vote[0], bool)])


NEW_WORDS = 3
"""The maximum number of words of one text that a proposal makes rules of."""

GROWTH = 1.7
"""The factor by which a limit grows that cut the text."""

LOWER = "{0} = {0}.lower()"
TRIM = '{0} = " ".join(word.strip(".,;:!?()\'") for word in {0}.split())'
"""Statements that remove case, and punctuation at the ends of words."""

LONGER = re.compile(r"words|length|long|excerpt|limit|character|token|window|context|size", re.IGNORECASE)
RULES = re.compile(r"instruct|rule|guid|prompt|polic", re.IGNORECASE)
_WANTED = r"(?:expected|correct answer (?:is|was)|should (?:be|have been|say))\s*:?\s*"
_EXPECTED = (
    re.compile(_WANTED + r"['\"`](.+?)['\"`]", re.IGNORECASE),
    re.compile(_WANTED + r"([\w-]+)", re.IGNORECASE),
)
_RIGHT = re.compile(r"^\s*(?:correct|right|exactly|well done|ok)\b", re.IGNORECASE)
_MORE = re.compile(r"\b(?:too (?:low|small|few|short)|more|higher|increase|larger)\b", re.IGNORECASE)
_LESS = re.compile(r"\b(?:too (?:high|large|many|big|long)|fewer|lower|decrease|smaller)\b", re.IGNORECASE)
_BOUNDS = re.compile(r"(?P<end>\"minimum\":|\"maximum\":|>=|<=)\s*(?P<value>-?[\d.]+)")


# ---- the optimizer: changes for one example's feedback


class Parameter(Struct, frozen=True):
    """One parameter as the prompt describes it."""

    name: str
    value: Any
    about: str = ""
    minimum: float = float("-inf")
    maximum: float = float("inf")


class Case(Struct, frozen=True):
    """The prompt's facts about one example; `seen` is the text that the agent's model saw."""

    parameters: dict[str, Parameter]
    seen: str = ""
    cut: bool = False
    output: str = ""
    score: float | None = None
    feedback: str = ""


Proposed = dict[str, tuple[Any, str]]
"""Component -> (new value, reason)."""


def propose(case: Case, draw: random.Random, *, wrong_rate: float) -> Proposed:
    """Return the changes, none if the feedback says that the output is right."""
    if (case.score is not None and case.score >= 1) or _RIGHT.match(case.feedback):
        return {}
    wrong = draw.random() < wrong_rate
    proposed = _sound(case)
    return _erring(case, proposed, draw) if wrong else proposed


def expected_answer(feedback: str) -> str | None:
    """Return the expected answer in a feedback.

    >>> expected_answer('Expected "billing", got "sales".')
    'billing'
    """
    return next((found[1].strip() for pattern in _EXPECTED if (found := pattern.search(feedback))), None)


def bounds(kind: str) -> tuple[float, float]:
    """Read the minimum and maximum from a parameter's type as worded in the prompt.

    >>> bounds('{"type":"integer","minimum":5,"maximum":80}')
    (5.0, 80.0)
    >>> bounds("int, >= 5, <= 80")
    (5.0, 80.0)
    """
    found = {match["end"].strip('":'): float(match["value"]) for match in _BOUNDS.finditer(kind)}
    smallest = found.get("minimum", found.get(">=", float("-inf")))
    return smallest, found.get("maximum", found.get("<=", float("inf")))


def _sound(case: Case) -> Proposed:
    expected = expected_answer(case.feedback)
    if expected is None:
        return _scaled(case)
    proposed = _listed(case, expected)
    if case.cut and (longer := _longer(case)):
        return proposed | longer
    if (cleaned := _cleaned(case, expected)) and _code(case):
        return proposed | cleaned
    return proposed | _ruled(case, expected)


def _of(case: Case, kind: Callable[[Any], bool], about: re.Pattern[str] | None = None) -> Parameter | None:
    """Return the first parameter of a kind, preferring one with a matching name or description."""
    fitting = [parameter for parameter in case.parameters.values() if kind(parameter.value)]
    if about is None:
        return fitting[0] if fitting else None
    spoken = [p for p in fitting if about.search(f"{p.name} {p.about}")]
    return spoken[0] if spoken else None


def _code(case: Case) -> Parameter | None:
    return _of(case, lambda value: isinstance(value, str) and is_code(value))


def _text(case: Case) -> Parameter | None:
    def plain(value: Any) -> bool:
        return isinstance(value, str) and not is_code(value)

    def states_rules(value: Any) -> bool:
        return plain(value) and bool(read_rules(value) or read_default(value))

    return _of(case, plain, RULES) or _of(case, states_rules) or _of(case, plain)


def _longer(case: Case) -> Proposed:
    number = _of(case, is_number, LONGER)
    if number is None:
        return {}
    value = min(number.value * GROWTH + 1, number.maximum)
    new = int(value) if isinstance(number.value, int) else value
    why = f"The model was shown a text that breaks off after {len(case.seen.split())} words."
    return {} if new == number.value else {number.name: (new, why)}


def _scaled(case: Case) -> Proposed:
    """Follow feedback that only asks for more or less: of the number that it names, or of the first one."""
    spoken = set(bare_text(case.feedback).split())
    numbers = [parameter for parameter in case.parameters.values() if is_number(parameter.value)]
    named = [number for number in numbers if spoken & set(re.split(r"[\W_]+", number.name.lower()))]
    number = next(iter(named or numbers), None)
    factor = 1.5 if _MORE.search(case.feedback) else 0.5 if _LESS.search(case.feedback) else 1
    if number is None or factor == 1:
        return {}
    value = max(number.minimum, min(number.maximum, number.value * factor))
    new = round(value) if isinstance(number.value, int) else value
    return {} if new == number.value else {number.name: (new, "The feedback asks for it.")}


def _listed(case: Case, expected: str) -> Proposed:
    """Add the expected answer to a list of answers that lacks it."""

    def holds_answers(value: Any) -> bool:
        return isinstance(value, list) and case.output in value and expected not in value

    answers_list = _of(case, holds_answers)
    if answers_list is None:
        return {}
    return {answers_list.name: ([*answers_list.value, expected], f"{expected!r} is an answer too.")}


def _cleaned(case: Case, expected: str) -> Proposed:
    """Add code that removes case and punctuation, if only they keep a rule from matching."""
    text = _text(case)
    own = [rule for rule in read_rules(text.value) if rule.answer == expected] if text else []
    words = [word for rule in own for word in rule.words if not mentions(case.seen, word)]
    hidden = [word for word in words if mentions(bare_text(case.seen), word)]
    code = _code(case)
    if not hidden or code is None:
        return {}
    source = _inserted(_inserted(code.value, LOWER), TRIM)
    why = f"{hidden[0]!r} stands in the text, but for case or punctuation; the rule does not match it."
    return {} if source == code.value else {code.name: (source, why)}


def _inserted(source: str, statement: str) -> str:
    r"""Insert a statement about the function's last argument before its last return.

    >>> print(_inserted("def f(x):\n    return x", "{0} = {0}.lower()"))
    def f(x):
        x = x.lower()
        return x
    """
    signature = re.search(r"def \w+\((?P<arguments>[^)]*)\)", source)
    names = re.findall(r"(\w+)\s*(?::[^,]+)?(?:,|$)", signature["arguments"]) if signature else []
    lines = source.rstrip().split("\n")
    at = max((i for i, line in enumerate(lines) if line.lstrip().startswith("return")), default=len(lines))
    if not names or at == len(lines):
        return source
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    added = indent + statement.format(names[-1])
    return source if added in lines else "\n".join([*lines[:at], added, *lines[at:]])


def _ruled(case: Case, expected: str) -> Proposed:
    """Add the text's most specific words that no rule covers yet to the rule for the expected answer."""
    text = _text(case)
    if text is None:
        return {}
    rules = read_rules(text.value)
    known = [bare(word) for rule in rules for word in rule.words]
    misled = [word for rule in rules if rule.answer != expected for word in rule.words if mentions(case.seen, word)]
    words = telling_words(case.seen, known)[:NEW_WORDS] or misled
    if not words:
        return {}
    listing = ", ".join(words)
    new = with_rule(without(text.value, misled), words, expected)
    return {text.name: (new, f"A text with {listing} is one for {expected}.")}


def without(text: str, words: list[str]) -> str:
    """Remove words from the rules of a text, and rules without words.

    >>> without("refund, please -> billing", ["please"])
    'refund -> billing'
    """
    lines = [
        Rule(tuple(word for word in line.words if word not in words), line.answer) if isinstance(line, Rule) else line
        for line in layout(text)
    ]
    return "\n".join(str(line) for line in lines if not isinstance(line, Rule) or line.words)


def with_rule(text: str, words: list[str], answer: str) -> str:
    r"""Add words to the rule of an answer, or a new line if it has no rule.

    >>> with_rule("Be kind.\nrefund -> billing", ["invoice"], "billing")
    'Be kind.\nrefund, invoice -> billing'
    """
    lines = layout(text)
    for i, line in enumerate(lines):
        if isinstance(line, Rule) and line.answer == answer:
            new = tuple(word for word in words if word not in line.words)
            lines[i] = Rule((*line.words, *new), answer)
            return "\n".join(map(str, lines))
    return "\n".join(map(str, [*lines, Rule(tuple(words), answer)]))


def _erring(case: Case, proposed: Proposed, draw: random.Random) -> Proposed:
    """Make a proposal wrong in one of the possible ways."""
    expected = expected_answer(case.feedback) or case.output
    text = _text(case)
    wrong: list[Proposed] = []
    for name, (value, why) in proposed.items():
        if is_number(value):
            wrong.append({name: (value * 20, why)})
        elif isinstance(value, str) and is_code(value):
            wrong.append({name: (value.replace("):", ")", 1).replace("->", "-", 1), why)})
    if text is not None:
        noise = draw.choice(COURTESY)
        wrong.append({text.name: (with_rule(text.value, [noise], expected), f"{noise!r} looks telling.")})
        others = [answer for answer in [*answers(read_rules(text.value)), case.output] if answer != expected]
        words = telling_words(case.seen)[:NEW_WORDS]
        if others and words:
            other = draw.choice(others)
            wrong.append({text.name: (with_rule(text.value, words, other), f"It sounds like {other}.")})
    return draw.choice(wrong) if wrong else proposed
