"""A search that is not a priority search: simulated annealing. There is one candidate, and sometimes it gets worse.

A search decides four things: which candidates to explore, on what to try the new ones, which becomes current, and what
is remembered. It is pure: scores come in with the candidates, and randomness from the step's seed.
"""

from collections.abc import Sequence
from math import exp
from random import Random

from aggregator import Decision, LLMOptimizer, Sample, Step, Trainer
from aggregator.records import Candidate
from aggregator.rules import best_of
from aggregator.testing import ScriptedModel, suggestion


class Annealing:
    """Accepts a worse candidate with probability exp(difference / temperature); the temperature falls."""

    proposals = 1  # new candidates of each explored one

    def __init__(self, temperature: float = 0.5, cooling: float = 0.8) -> None:
        self.temperature = temperature
        self.cooling = cooling

    def explore(self, pool: Sequence[Candidate], step: Step) -> Sequence[Candidate]:
        return pool[:1]  # the current one comes first

    def trials(
        self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step
    ) -> Sequence[tuple[Candidate, Sequence[Sample]]]:
        return [(candidate, step.samples) for candidate in (*explored, *made)]  # on what the minibatch shows

    def choose(
        self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step
    ) -> tuple[Candidate | None, Decision]:
        if not made:
            return None, Decision(accepted=False, reason="no change was proposed")
        before, after = score_on(explored[0], step.samples), score_on(made[0], step.samples)
        temperature = self.temperature * self.cooling**step.number
        chance = 1.0 if after >= before else exp((after - before) / temperature)
        accepted = Random(f"{step.seed}/{step.number}/annealing").random() < chance
        reason = f"{before:g} -> {after:g} at temperature {temperature:.2f}"
        return made[0], Decision(accepted=accepted, reason=reason, before=before, after=after)

    def keep(self, pool: Sequence[Candidate], step: Step) -> Sequence[Candidate]:
        return pool[:1]


def score_on(candidate: Candidate, samples: Sequence[Sample]) -> float:
    """Return the mean score on these samples; one that was not judged counts 0."""
    known = [candidate.scores.get(str(sample.id), (0.0, 1)) for sample in samples]
    return sum(total / count for total, count in known) / len(known)


def add(x: int, *, amount: int = 0) -> int:
    return x + amount


def guide(x: int, output: int, wanted: int) -> tuple[float, str]:
    return 1 / (1 + abs(output - wanted)), f"Expected {wanted}, got {output}."


def main() -> None:
    steps = ScriptedModel(*(suggestion(amount=amount) for amount in (2, 2, 1, 1, 4, 4, 3, 3, 5, 5)))
    trainer = Trainer(add, LLMOptimizer(llm=steps), rule=best_of, search=Annealing(), observers=[])
    result = trainer.train(guide, [(x, x + 4) for x in range(10)], batch_size=2)
    for report in result.history:
        print(f"step {report.step}: {'took' if report.decision.accepted else 'kept'}, {report.decision.reason}")


if __name__ == "__main__":
    main()
