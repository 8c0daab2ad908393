"""Train an instruction on eight tickets and watch each step, offline: the simulated model answers.

To use a provider, set its key and replace the two lines that start the simulated model with
`llm = LLM("openai/gpt-4o-mini")`.
"""

from aggregator import LLM, AggregatedUpdate, LLMOptimizer, Module, Observer, ParameterNode
from aggregator.records import Evaluation, FullStepReport
from aggregator.simulation import SimulatedModel


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


class Steps(Observer):
    """Prints what each ticket proposed, the decision, and the score of the test set after it."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """Print the evaluation before training; a step's report has the one after it."""
        if evaluation.step == 0:
            print(f"test score before training: {evaluation.score}")

    def step(self, report: FullStepReport) -> None:
        """Print one step."""
        print(f"step {report.step}: score of the minibatch {report.score}")
        for proposal in report.all_proposals:
            if proposal.values:
                print(f"  ticket {proposal.sample_id} proposes {proposal.values['instruction']!r}")
        decision = "updated" if report.decision.accepted else f"not updated: {report.decision.reason}"
        print(f"  {decision}; test score {report.test_score}")


def main() -> None:
    """Train and print the result."""
    with SimulatedModel(seed=1) as server:
        llm = LLM("openai-compatible/simulated-1", base_url=server.base_url)
        trainer = AggregatedUpdate(Router(llm), LLMOptimizer(llm=llm), llm=llm, observers=[Steps()])
        result = trainer.train(guide, TICKETS, batch_size=4, num_epochs=2, test_dataset=TICKETS)
    print(result)
    print(result.best_parameters["instruction"])


if __name__ == "__main__":
    main()
