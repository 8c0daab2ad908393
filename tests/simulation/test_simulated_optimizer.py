"""The simulated model as an optimizer: it proposes changes that would have made the answer right."""

from __future__ import annotations

import ast
import random
from typing import Any

import pytest
from msgspec.structs import replace

from aggregator.simulation.language import answer_as_student
from aggregator.simulation.optimizer import Case, Parameter, is_code, propose

CODE = "def clean(self, ticket: str) -> str:\n    return ticket"
TEXT = "Route the ticket.\nrefund -> billing\nparcel -> shipping"


def case(seen: str, feedback: str = 'Expected "billing", got "sales".', **facts: Any) -> Case:
    parameters = [
        Parameter("instruction", TEXT),
        Parameter("excerpt_words", 8, "How many words the model sees.", 5, 80),
        Parameter("clean__code", CODE),
    ]
    given = {"output": "sales", "score": 0.0, **facts}
    return Case({parameter.name: parameter for parameter in parameters}, seen=seen, feedback=feedback, **given)


def sound(given: Case) -> dict[str, Any]:
    return {name: value for name, (value, _) in propose(given, random.Random(0), wrong_rate=0.0).items()}


@pytest.mark.parametrize("given", [case("x", "Correct."), case("x", score=1.0)])
def test_right_answers_need_no_change(given: Case) -> None:
    """Feedback that says right, or a full score, gets no proposal, at any error rate."""
    assert propose(given, random.Random(0), wrong_rate=1.0) == {}


def test_new_words_become_a_rule() -> None:
    """Words that no rule covers are added to the expected answer's rule, which then matches."""
    proposed = sound(case("my card was charged"))
    assert proposed == {"instruction": "Route the ticket.\nrefund, charged, card -> billing\nparcel -> shipping"}
    assert answer_as_student(proposed["instruction"], "my card was charged") == "billing"


def test_misleading_words_are_removed_from_their_rule() -> None:
    """A word that led to another answer is removed from that rule."""
    proposed = sound(case("a parcel was charged"))
    assert proposed == {"instruction": "Route the ticket.\nrefund, charged -> billing"}


def test_a_truncated_text_gets_a_longer_limit() -> None:
    """If the text was truncated, only the length changes, within its limits."""
    assert sound(case("Hello, hope you are well and", cut=True)) == {"excerpt_words": 14}
    long = case("Hello", cut=True)
    long.parameters["excerpt_words"] = replace(long.parameters["excerpt_words"], value=60)
    assert sound(long) == {"excerpt_words": 80}


@pytest.mark.parametrize("seen", ["REFUND NOW", "a refund!", "Refund, now"])
def test_case_and_punctuation_get_cleaning_code(seen: str) -> None:
    """If only case or punctuation prevents a match, the proposed code makes the rule match."""
    proposed = sound(case(seen))
    assert list(proposed) == ["clean__code"]
    space: dict[str, Any] = {}
    exec(proposed["clean__code"], space)
    assert answer_as_student(TEXT, space["clean"](None, seen)) == "billing"


def test_a_missing_answer_is_added_to_a_list_of_answers() -> None:
    """A list with the given answer, but without the expected one, gets it."""
    given = Case({"teams": Parameter("teams", ["sales"])}, output="sales", score=0.0, feedback="Expected billing.")
    assert sound(given) == {"teams": ["sales", "billing"]}


@pytest.mark.parametrize(("feedback", "value"), [("The limit is too low.", 6), ("Use fewer.", 2)])
def test_more_or_less_scales_a_number(feedback: str, value: int) -> None:
    """Feedback that asks for more or less changes the number that it names, or the first one."""
    limits = {name: Parameter(name, 4) for name in ("search_limit", "depth")}
    given = Case(limits, output="x", score=0.0, feedback=feedback)
    assert sound(given) == {"search_limit": value}
    deeper = Case(limits, output="x", score=0.0, feedback="The depth is too low.")
    assert sound(deeper) == {"depth": 6}


def test_it_errs_at_the_given_rate() -> None:
    """About the given share of proposals differs from the correct one."""
    given = case("my card was charged")
    right = sound(given)
    draws = [propose(given, random.Random(seed), wrong_rate=0.3) for seed in range(400)]
    wrong = sum({name: value for name, (value, _) in draw.items()} != right for draw in draws)
    assert 80 < wrong < 160


def test_its_errors_are_typical_of_models() -> None:
    """Another answer, an uninformative word, a number that is too large, and code that does not parse."""
    proposals = [
        propose(given, random.Random(seed), wrong_rate=1.0)
        for given in (case("my card was charged"), case("Hello,", cut=True), case("REFUND NOW"))
        for seed in range(30)
    ]
    values = [value for proposed in proposals for value, _ in proposed.values()]
    assert any(isinstance(value, int) and value > 80 for value in values)
    assert any("refund, please -> billing" in str(value) for value in values)
    assert any("charged, card -> sales" in str(value) for value in values)
    broken = [value for value in values if isinstance(value, str) and is_code(value)]
    assert broken
    for source in broken:
        with pytest.raises(SyntaxError):
            ast.parse(source)
