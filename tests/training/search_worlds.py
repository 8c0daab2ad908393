"""Deterministic problems for searches: landscapes over one number, and optimizers that step through them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from training_fakes import ScriptedModel, section, suggest

from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.cassettes.lineage import current_lineage
from aggregator.training.proposers import LLMOptimizer

TRAP = {-2: 0.2, -1: 0.5, 0: 0.3, 1: 0.2, 2: 0.4, 3: 0.7, 4: 1.0}
"""From 0 the heights rise to -1 and no further; the summit at 4 is behind a valley."""


class Place(Module):
    """Always answers with its parameter."""

    def __init__(self, at: int = 0) -> None:
        self.at = ParameterNode(at)

    async def forward(self, x: int) -> int:
        return int(self.at.data)


class Height:
    """Scores a place by its height, the same for every instance."""

    def __init__(self, heights: Mapping[int, float]) -> None:
        self.heights = heights

    def __call__(self, x: int, output: int, info: Any) -> tuple[float, str]:
        return self.heights.get(output, 0.0), f"at {output}"


def place_in(messages: list[dict[str, Any]]) -> int:
    """Return the value of the parameter that a prompt shows."""
    return int(json.loads(section(messages, "Parameters"))["at"]["value"])


def neighbours(messages: list[dict[str, Any]]) -> str:
    """An optimizer that proposes the next place up, and the next place down when asked again."""
    asked = re.search(r"(?:proposal|candidate)=(\d)/propose", current_lineage())
    assert asked is not None
    return suggest(at=place_in(messages) + (1 if asked[1] == "0" else -1))


def leads(way: Mapping[int, list[int]]) -> Callable[[list[dict[str, Any]]], str]:
    """An optimizer that maps each place to its first, second, ... proposal."""

    def propose(messages: list[dict[str, Any]]) -> str:
        asked = re.search(r"proposal=(\d)/propose", current_lineage())
        ahead = way.get(place_in(messages), [])
        number = int(asked[1]) if asked else 0
        return suggest(at=ahead[number]) if number < len(ahead) else "TERMINATE"

    return propose


def optimizer(reply: Callable[[list[dict[str, Any]]], Any], **options: Any) -> LLMOptimizer:
    return LLMOptimizer(llm=ScriptedModel(reply, **options))
