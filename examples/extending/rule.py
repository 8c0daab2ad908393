"""An aggregation rule that asks a model: the proposals are edited into one value of few words.

A rule is an async callable `(proposals, step) -> proposals`. It is closed, so rules chain, and the step is all that it
may know: the current values, the stepsize, the parameters with their types. So it works when it is called alone.
"""

from collections.abc import Sequence
from typing import Any

from aggregator import ParameterNode, Proposal, Step, Trainer, as_model, lineage, portal
from aggregator.optimizers import LLMOptimizer
from aggregator.rules import ask, chain, dedupe, without_failed
from aggregator.testing import ScriptedModel, suggestion

PROMPT = """You edit instructions. Merge the proposals into one new value per component that says all of what they say
in at most {words} words. Reply with one JSON object: {{"reasoning": "...", "suggestion": {{"<component>": ...}}}}"""


class Editor:
    """Asks `llm` for the shortest values that say what the proposals say."""

    def __init__(self, llm: Any, words: int = 40) -> None:
        self.llm = as_model(llm)
        self.words = words

    async def __call__(self, proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
        if step.stepsize == 0 or len(proposals) < 2:  # nothing to merge, so no call is paid
            return proposals if step.stepsize else []
        shown = "\n".join(f"- {proposal.values}" for proposal in proposals)
        messages = [
            {"role": "system", "content": PROMPT.format(words=self.words)},
            {"role": "user", "content": f"Now: {step.values}\nProposals:\n{shown}"},
        ]
        with lineage("edit", role="aggregator"):  # the place of the call in a recording, and whose cost it is
            answer = await ask(self.llm, messages, step.parameters, max_tokens=1000)
        return [
            Proposal(
                values=answer.values,  # of the parameters' own types; `error` names what could not be used
                reasoning=answer.reasoning,
                error=answer.error,
                support=sum(proposal.support for proposal in proposals),
                sample_ids=tuple(i for proposal in proposals for i in proposal.sample_ids),
            )
        ]


INSTRUCTION = ParameterNode("Answer.", name="instruction")


def answer(question: str) -> str:
    return f"{INSTRUCTION.data} {question}"


def guide(question: str, output: str, wanted: str) -> tuple[float, str]:
    return float(wanted in output), f"The instruction should mention {wanted!r}."


def main() -> None:
    editor = Editor(ScriptedModel(suggestion("both matter", instruction="Answer briefly and politely.")))
    wishes = [Proposal(values={"instruction": f"Answer {word}."}) for word in ("briefly", "politely")]
    print(portal.call(editor, wishes, Step.of(answer))[0].values)  # alone, as in a test or a notebook
    optimizer = LLMOptimizer(llm=ScriptedModel(*(suggestion(instruction=f"Be {i}.") for i in range(4))))
    trainer = Trainer(answer, optimizer, rule=chain(without_failed, dedupe, editor), observers=[])
    result = trainer.train(guide, [("Why?", "briefly"), ("How?", "politely")], batch_size=2)
    print(result.parameters, "in", result.usage["aggregator"].calls, "call of the rule")


if __name__ == "__main__":
    main()
