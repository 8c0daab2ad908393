"""Type-checked, never run: a program as a user writes it, and the mistakes that a type checker finds in it.

Each `type: ignore` marks a mistake; mypy --strict complains of any that it does not find.
"""

from __future__ import annotations

from aggregator import LLM, AggregatedUpdate, Budget, LLMOptimizer, Module, Observer, ParameterNode, cassette
from aggregator.records import FullStepReport


class Router(Module):
    """Names the team that should answer a ticket."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.instruction = ParameterNode("If no rule applies, answer sales.")
        self.words = ParameterNode(20, description="how many words the model sees")

    async def forward(self, ticket: str) -> str:
        shown = " ".join(ticket.split()[: self.words.data])
        answer = await self.llm.complete(
            [{"role": "system", "content": self.instruction.data}, {"role": "user", "content": shown}]
        )
        return answer.text.strip()


def guide(ticket: str, answer: str, team: str) -> tuple[float, str]:
    """Return a score and feedback."""
    return (1.0, "Correct.") if answer == team else (0.0, f"Expected {team}, got {answer}.")


def guide_of_two(ticket: str, answer: str) -> str:
    """A guide without the expected answer, and without a score."""
    return f"{ticket}: {answer}"


class Steps(Observer):
    """Prints each step."""

    async def step(self, report: FullStepReport) -> None:
        print(report.step, report.score, [proposal.values for proposal in report.all_proposals])


TICKETS = [("the invoice is wrong", "billing"), ("my parcel is broken", "shipping")]


def main() -> None:
    llm = LLM("openai/gpt-4o-mini", budget=Budget(usd=1.0))
    agent = Router(llm)
    agent.words.data = 30
    agent.words.data = "seven"  # type: ignore[assignment]
    trainer = AggregatedUpdate(agent, LLMOptimizer(llm=llm), llm=llm, observers=[Steps()])
    AggregatedUpdate(agent, optimizer=llm)  # type: ignore[arg-type]
    with cassette("train.yaml"):
        result = trainer.train(guide, TICKETS, batch_size=2, stepsize=0.5, test_dataset=TICKETS)
        trainer.train(guide_of_two, TICKETS)  # type: ignore[arg-type]
        trainer.train(guide, TICKETS, batchsize=2)  # type: ignore[call-arg]
    print(result.test_scores[-1], result.parameters["instruction"], result.tset_scores)  # type: ignore[attr-defined]
    agent.save("router.json")
