"""The demo's agent and data set."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from aggregator.agents.parameters import overriding
from aggregator.demo.run import TEAMS, TicketRouter, right_team, tickets
from aggregator.errors import ParameterError
from aggregator.records import Choice, Completion, Message


class Echo:
    """Answers with its prompt, and records the instructions."""

    def __init__(self) -> None:
        self.system = ""

    async def complete(self, messages: Any, **options: Any) -> Completion:
        self.system = messages[0]["content"]
        return Completion(choices=(Choice(message=Message(content=messages[-1]["content"])),))


def test_three_parameters_of_three_kinds() -> None:
    """A text, a bounded number and code are trained; their names are their paths."""
    parameters = {parameter.name: parameter for parameter in TicketRouter(Echo()).parameters()}
    assert sorted(parameters) == ["clean__code", "excerpt_words", "instruction"]
    assert all(parameter.trainable for parameter in parameters.values())
    with pytest.raises(ParameterError, match="<= 80"):
        parameters["excerpt_words"].convert(81)


async def test_every_parameter_changes_the_prompt() -> None:
    """The instruction is the system message, the code prepares the ticket, the number limits its length."""
    echo = Echo()
    agent = TicketRouter(echo)
    ticket = "ONE two three four five six seven eight nine"
    assert await agent(ticket) == "ONE two three four five six seven eight …"
    changed = {
        "instruction": "Be kind.",
        "excerpt_words": 5,
        "clean__code": "def clean(self, ticket: str) -> str:\n    return ticket.lower()",
    }
    with overriding(agent.parameters(), changed):
        assert await agent(ticket) == "one two three four five …"
    assert echo.system.startswith("Be kind.\n\nThe teams are account, billing")


async def test_a_short_ticket_is_not_marked_as_shortened() -> None:
    """The mark appears only if something was left out."""
    assert await TicketRouter(Echo())("one two") == "one two"


def test_the_guide_names_expected_and_given_answer() -> None:
    """A wrong answer scores 0 and names both teams."""
    assert right_team("x", "billing", "billing") == (1.0, "Correct.")
    assert right_team("x", "I do not know.", "billing") == (0.0, 'Expected "billing", got "I do not know.".')


def test_data_set() -> None:
    """60 training and 40 test tickets, the teams in equal shares, no ticket in both."""
    data = tickets()
    assert Counter(ticket.team for ticket in data.train) == dict.fromkeys(TEAMS, 12)
    assert Counter(ticket.team for ticket in data.test) == dict.fromkeys(TEAMS, 8)
    texts = [ticket.text for ticket in data.train + data.test]
    assert len(set(texts)) == len(texts) == 100


def test_the_task_is_not_trivial() -> None:
    """Training and test tickets share some words; some are in capitals, and some are longer than the first excerpt."""
    data = tickets()
    known = {word.strip(".,!?:;").lower() for ticket in data.train for word in ticket.text.split()}
    unknown = [{w.strip(".,!?:;").lower() for w in ticket.text.split()} - known for ticket in data.test]
    assert sum(bool(words) for words in unknown) > len(unknown) / 2
    assert sum(any(w.isupper() and len(w) > 3 for w in ticket.text.split()) for ticket in data.train) >= 5
    assert sum(len(ticket.text.split()) > 30 for ticket in data.train) >= 8
