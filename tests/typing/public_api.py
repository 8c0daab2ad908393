"""Type-checked, never run: the public API as a user's type checker sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_type

import aggregator
from aggregator import (
    LLM,
    AggregatedUpdate,
    Completion,
    Decision,
    LLMMerge,
    LLMOptimizer,
    Module,
    ParameterNode,
    Proposal,
    Step,
    Trainer,
    TrainingResult,
    bundle,
)
from aggregator.gates import always
from aggregator.protocols import ChatModel
from aggregator.rules import chain, dedupe, top_k
from aggregator.searches import beam


class Agent(Module):
    def __init__(self) -> None:
        self.text = ParameterNode("hello")
        self.number = ParameterNode(3)

    @bundle()
    def shout(self, text: str) -> str:
        return text.upper()

    async def forward(self, x: str) -> str:
        assert_type(self.text.data, str)
        assert_type(self.number.data, int)
        assert_type(self.shout(x), str)
        return self.shout(x)


def guide(x: str, output: str, info: str) -> tuple[float, str]:
    return float(output == info), "no"


async def shortest(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
    return proposals[:1] if step.stepsize > 0.1 else []


async def never(before: dict[str, Any], after: dict[str, Any], step: Step) -> Decision:
    return Decision(accepted=False, reason="never")


def trains() -> None:
    llm = LLM("openai/gpt-4o-mini")
    trainer = AggregatedUpdate(Agent(), LLMOptimizer(llm=llm), llm=llm, gate=never)
    assert_type(trainer.train(guide, [("a", "b")], batch_size=2), TrainingResult)
    assert_type(trainer.train(guide, {"inputs": ["a"], "infos": ["b"]}), TrainingResult)
    AggregatedUpdate(Agent(), LLMOptimizer(), rule=chain(dedupe, top_k(8), LLMMerge(llm)), gate=always)
    AggregatedUpdate(Agent(), LLMOptimizer(), rule=shortest)
    Trainer(Agent(), LLMOptimizer(), propose_per="batch", search=beam(4), gate=never)


async def calls() -> None:
    llm = LLM("openai/gpt-4o-mini")
    assert_type(await llm.complete("hello"), Completion)
    assert_type(llm(messages=[{"role": "user", "content": "hello"}]), Completion)
    assert_type((await llm.complete("hello")).choices[0].message.content, str | None)


def stands_for_a_model(model: ChatModel) -> ChatModel:
    return stands_for_a_model(LLM("openai/gpt-4o-mini"))


def records() -> None:
    with aggregator.cassette("cassettes/x.yaml", mode="none") as tape:
        assert_type(tape.report, list[str])
    with aggregator.lineage("retrieval"):
        pass


def a_misspelt_name_is_told() -> None:
    """Names load on first use, but a type checker knows all of them."""
    aggregator.AggregatedUpdates  # type: ignore[attr-defined] # noqa: B018


def a_parameter_has_its_values_type() -> None:
    agent = Agent()
    agent.text.data = "good day"
    agent.number.data = "seven"  # type: ignore[assignment]
