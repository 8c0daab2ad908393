"""Train an instruction on eight tickets, offline: the answers come from the simulated model.

With a key of your own, replace the two lines that start the simulated model by `llm = LLM("openai/gpt-4o-mini")`.
"""

from aggregator import LLM, AggregatedUpdate, LLMOptimizer, Module, ParameterNode
from aggregator.simulation.model import SimulatedModel


class Router(Module):
    """Names the team that should answer a ticket."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.instruction = ParameterNode(
            "If no rule applies, answer sales.", description="rules, one a line: `word, other word -> team`"
        )

    async def forward(self, ticket: str) -> str:
        messages = [
            {"role": "system", "content": self.instruction.data + "\nThe teams are billing, shipping, sales."},
            {"role": "user", "content": ticket},
        ]
        return (await self.llm.complete(messages)).text


def guide(ticket: str, answer: str, team: str) -> tuple[float, str]:
    """Return a score, and feedback in words."""
    return (1.0, "Correct.") if answer == team else (0.0, f'Expected "{team}", got "{answer}".')


TICKETS = [
    ("the invoice is wrong", "billing"),
    ("my parcel is broken", "shipping"),
    ("a refund for the invoice", "billing"),
    ("where is my parcel", "shipping"),
    ("the refund did not come", "billing"),
    ("the courier lost my parcel", "shipping"),
    ("the courier never rang", "shipping"),
    ("do you sell lamps", "sales"),
]


def main() -> None:
    """Train, and say what came of it."""
    with SimulatedModel(seed=1) as server:
        llm = LLM("openai-compatible/simulated-1", base_url=server.base_url)
        trainer = AggregatedUpdate(Router(llm), LLMOptimizer(llm=llm), llm=llm)
        result = trainer.train(guide, TICKETS, batch_size=4, num_epochs=2, test_dataset=TICKETS)
    print(f"score {result.test_scores[0]} -> {result.test_scores[-1]}")
    print(result.parameters["instruction"])


if __name__ == "__main__":
    main()
