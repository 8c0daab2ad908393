"""Fakes for the tests of training: a tiny agent, a guide, and scripts for `ScriptedModel`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.testing import ScriptedModel
from aggregator.testing import suggestion as suggest

__all__ = [
    "Adder",
    "ScriptedModel",
    "additions",
    "exact",
    "first_suggestion",
    "flatten",
    "from_feedback",
    "section",
    "suggest",
]


def section(messages: list[dict[str, Any]], heading: str) -> str:
    """Return the text under one heading of a user message."""
    text: str = messages[-1]["content"]
    _, _, after = f"\n\n{text}".partition(f"\n\n#{heading}\n")
    return after.split("\n\n#", 1)[0]


class Adder(Module):
    """Adds its parameter to the input."""

    def __init__(self, amount: int = 1, label: str = "sum") -> None:
        self.amount = ParameterNode(amount, description="what is added")
        self.label = ParameterNode(label)

    async def forward(self, x: int) -> int:
        return int(x + self.amount.data)


def exact(x: int, output: int, info: int) -> tuple[float, str]:
    """Return score 1 if the output is the expected number; the feedback names it."""
    return (1.0, "right") if output == info else (0.0, f"expected {info}, got {output}")


def additions(amount: int, count: int = 4) -> list[tuple[int, int]]:
    """Return a data set that an Adder of this amount solves."""
    return [(i, i + amount) for i in range(count)]


def from_feedback(messages: list[dict[str, Any]]) -> str:
    """An optimizer that reads the right amount from the feedback: expected minus got, plus the current amount."""
    feedback = section(messages, "Feedback")
    if not feedback.startswith("expected"):
        return "TERMINATE"
    expected, got = (int(word) for word in feedback.replace("expected ", "").split(", got "))
    present = json.loads(section(messages, "Parameters"))["amount"]["value"]
    return suggest(amount=present + expected - got)


def first_suggestion(messages: list[dict[str, Any]]) -> str:
    """An aggregator that returns the first suggestion."""
    block = section(messages, "SuggestedValue_1")
    return json.dumps({"suggestion": json.loads(block[block.index("{") :])})


def flatten(items: Iterable[Iterable[Any]]) -> list[Any]:
    return [x for item in items for x in item]
