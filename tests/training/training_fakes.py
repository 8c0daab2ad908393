"""Fakes through the seams: a scripted model, a tiny agent, a guide."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any

from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.cassettes.lineage import current_lineage, current_role
from aggregator.llm.ledger import count
from aggregator.records import Choice, Completion, Message, Usage

Reply = str | Exception | Callable[[list[dict[str, Any]]], Any]


class ScriptedModel:
    """Answers from a list (the last answer repeats) or a function of the messages; remembers what it was asked."""

    def __init__(self, *replies: Reply, jitter: Callable[[], int] = lambda: 0) -> None:
        self.replies = list(replies)
        self.jitter = jitter
        self.asked: list[list[dict[str, Any]]] = []
        self.options: list[dict[str, Any]] = []
        self.places: list[tuple[str, str]] = []

    async def complete(self, messages: Any, **options: Any) -> Completion:
        self.asked.append(messages)
        self.options.append(options)
        self.places.append((current_lineage(), current_role()))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        for _ in range(self.jitter()):
            await asyncio.sleep(0)
        answer = reply(messages) if callable(reply) else reply
        if isinstance(answer, Exception):
            raise answer
        usage = Usage(input_tokens=10, output_tokens=5, cost=0.1)
        count(current_role(), usage)
        return Completion(choices=(Choice(message=Message(content=answer)),), usage=usage)


def suggest(**values: Any) -> str:
    """A reply that suggests these values."""
    return json.dumps({"reasoning_all": "because", "suggestion": values})


def section(messages: list[dict[str, Any]], heading: str) -> str:
    """The text under one heading of a user message."""
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
    """Score 1 where the output is the expected number; the feedback names it."""
    return (1.0, "right") if output == info else (0.0, f"expected {info}, got {output}")


def additions(amount: int, count: int = 4) -> list[tuple[int, int]]:
    """A data set that an Adder of this amount solves."""
    return [(i, i + amount) for i in range(count)]


def from_feedback(messages: list[dict[str, Any]]) -> str:
    """An optimizer that reads the right amount out of the feedback: expected minus got, plus what is added now."""
    feedback = section(messages, "Feedback")
    if not feedback.startswith("expected"):
        return "TERMINATE"
    expected, got = (int(word) for word in feedback.replace("expected ", "").split(", got "))
    present = json.loads(section(messages, "Parameters"))["amount"]["value"]
    return suggest(amount=present + expected - got)


def first_suggestion(messages: list[dict[str, Any]]) -> str:
    """An aggregator that takes the first suggestion."""
    block = section(messages, "SuggestedValue_1")
    return json.dumps({"suggestion": json.loads(block[block.index("{") :])})


def flatten(items: Iterable[Iterable[Any]]) -> list[Any]:
    return [x for item in items for x in item]
