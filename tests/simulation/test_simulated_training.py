"""The simulated model trains agents other than the demo's."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from aggregator import LLM, AggregatedUpdate, LLMOptimizer, Module, ParameterNode
from aggregator.simulation import SimulatedModel


class Shop(Module):
    """Names the fruit it can offer, up to a number of pieces."""

    def __init__(self) -> None:
        self.stock = ParameterNode(["none"], description="What may be offered.")
        self.limit = ParameterNode(
            2, type=Annotated[int, Meta(ge=1, le=50)], description="The most pieces sold at once."
        )

    def forward(self, wanted: tuple[str, int]) -> str:
        fruit, pieces = wanted
        if fruit not in self.stock.data:
            return "none"
        return fruit if pieces <= self.limit.data else "too many"


def served(wanted: tuple[str, int], output: str, info: Any) -> tuple[float, str]:
    if output == wanted[0]:
        return 1.0, "Correct."
    if output == "too many":
        return 0.0, "The limit is too low."
    return 0.0, f'Expected "{wanted[0]}", got "{output}".'


def test_lists_and_numbers_of_another_agent_are_learned() -> None:
    """A list gets its missing answers and a number grows as the feedback asks, through the whole loop."""
    wishes = [(("apple", 1), None), (("pear", 2), None), (("apple", 5), None), (("pear", 7), None)] * 2
    agent = Shop()
    with SimulatedModel(wrong_rate=0.0) as server:
        llm = LLM("openai-compatible/simulated-1", base_url=server.base_url)
        trainer = AggregatedUpdate(agent, LLMOptimizer(llm=llm), llm=llm, observers=[])
        result = trainer.train(served, wishes, test_dataset=wishes, num_epochs=5, batch_size=8)
        assert server.calls["agent"] == 0
        assert server.calls["optimizer"] == 40
    assert agent.stock.data == ["none", "apple", "pear"]
    assert agent.limit.data >= 7
    assert (result.test_scores[0], result.test_scores[-1]) == (0.0, 1.0)
