"""An optimizer: one method, `propose(rollouts, step)`. This one asks a model with a prompt of its own.

The rollouts have what the agent did: input, output, score, feedback, transcript, failure. It is asked once for each
instance, or with `propose_per="batch"` once for the whole minibatch. `step.parameters` may change.
"""

from collections.abc import Sequence
from typing import Any

from aggregator import Proposal, Rollout, Step, Trainer, as_model, lineage
from aggregator.optimizers import ask
from aggregator.rules import majority
from aggregator.testing import ScriptedModel, suggestion

PROMPT = """An agent failed on an example. Change as few of its settings as possible so that it succeeds. Reply with one
JSON object: {"reasoning": "...", "suggestion": {"<setting>": ...}}, or with TERMINATE if nothing should change."""


class Minimal:
    """Asks for the smallest change, and only about examples that failed."""

    def __init__(self, llm: Any, enough: float = 1.0) -> None:
        self.llm = as_model(llm)
        self.enough = enough

    async def propose(self, rollouts: Sequence[Rollout], step: Step) -> Proposal:
        failed = [rollout for rollout in rollouts if rollout.score is not None and rollout.score < self.enough]
        if not failed:
            return Proposal()  # no change is wanted, and no call is paid
        settings = "\n".join(f"- {parameter.name}: {parameter.describe()}" for parameter in step.parameters)
        examples = "\n".join(f"- input {one.x!r}, output {one.output!r}: {one.feedback}" for one in failed)
        messages = [
            {"role": "system", "content": PROMPT},
            {"role": "user", "content": f"Settings:\n{settings}\n\nExamples:\n{examples}"},
        ]
        with lineage("propose", role="optimizer"):  # the place of the call in a recording, and whose cost it is
            answer = await ask(self.llm, messages, step.parameters, max_tokens=1000, seed=step.seed)
        return Proposal(values=answer.values, reasoning=answer.reasoning, error=answer.error)


def shout(word: str, *, times: int = 1, sign: str = ".") -> str:
    return word.upper() + sign * times


def guide(word: str, output: str, wanted: str) -> tuple[float, str]:
    return float(output == wanted), f"Expected {wanted!r}, got {output!r}."


def main() -> None:
    model = ScriptedModel(suggestion("three signs", times=3, sign="!"))
    data = [("hey", "HEY!!!"), ("stop", "STOP!!!"), ("go", "GO!!!")]
    trainer = Trainer(shout, Minimal(model), rule=majority, observers=[])  # or propose_per="batch": one call a step
    result = trainer.train(guide, data, batch_size=3, num_epochs=2)
    print(f"scores {result.train_scores} for {result.usage['optimizer'].calls} calls: {shout('hey')}")


if __name__ == "__main__":
    main()
