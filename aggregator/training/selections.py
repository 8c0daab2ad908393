"""Rules that choose one of several proposals: the last, the one a model prefers, the one that scores best.

They are made for `LLMOptimizer(num_candidates=..., select=...)`, beside `majority`, and for LLMMerge, which makes one
of all; like every rule they may also stand in a `chain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta

from aggregator.agents.parameters import ParameterNode
from aggregator.cassettes.lineage import lineage
from aggregator.errors import LLMError
from aggregator.llm.models import as_model
from aggregator.protocols import ChatModel
from aggregator.records import Proposal, Sample, Values
from aggregator.training.asking import Answer, ask
from aggregator.training.context import current_step
from aggregator.training.evaluation import mean
from aggregator.training.failures import ends_run
from aggregator.training.merge import answered
from aggregator.training.prompts import CHOOSER_SYSTEM_PROMPT, aggregation_messages
from aggregator.training.rules import dedupe


async def last_of(current: Values, proposals: Sequence[Proposal], *, stepsize: float) -> Sequence[Proposal]:
    """Keep the last proposal that asks for anything: the end of a refinement.

    >>> from aggregator.portal import call
    >>> call(last_of, {}, [Proposal(values={"k": k}) for k in (1, 2)], stepsize=0.5)[0].values
    {'k': 2}
    """
    return [proposal for proposal in proposals if proposal.values][-1:]


class LLMChoice:
    """Asks a model which proposal is best, and keeps that one as it is, or none where the current value is better.

    No call is made for stepsize 0, for no or one distinct proposal. A failed call keeps nothing and stands in the
    proposal's failures; an error that no further call can escape is raised.
    """

    def __init__(self, llm: Any = None, *, max_tokens: int = 4096, system_prompt: str = CHOOSER_SYSTEM_PROMPT) -> None:
        self.llm: ChatModel = as_model(llm)
        self.max_tokens = max_tokens
        self.system_prompt = system_prompt

    async def __call__(self, current: Values, proposals: Sequence[Proposal], *, stepsize: float) -> Sequence[Proposal]:
        """Return no proposal, or one."""
        if stepsize == 0:
            return []
        distinct = await dedupe(current, [proposal for proposal in proposals if proposal.values], stepsize=stepsize)
        if len(distinct) < 2:
            return distinct
        with lineage("choose", role="aggregator"):
            answer = await self._ask(current, distinct, stepsize)
        if isinstance(answer, Exception) or answer.error is not None:
            return [answered(answer, distinct)]
        choice = answer.values.get("choice", 0)
        return distinct[choice - 1 : choice] if choice else []

    async def _ask(self, current: Values, proposals: Sequence[Proposal], stepsize: float) -> Answer | Exception:
        number = Annotated[int, Meta(ge=0, le=len(proposals))]
        choice = ParameterNode(0, name="choice", type=number, description="the number of the best suggestion")
        messages = aggregation_messages(
            current,
            proposals,
            [stepsize] * len(proposals),
            stepsize=stepsize,
            system_prompt=self.system_prompt,
        )
        try:
            return await ask(self.llm, messages, [choice], max_tokens=self.max_tokens)
        except LLMError as error:
            if ends_run(error):
                raise
            return error


async def best_tried(current: Values, proposals: Sequence[Proposal], *, stepsize: float) -> Sequence[Proposal]:
    """Run the agent under each proposal and keep the best, none where the current values do as well (best of n).

    It runs on the instance at hand, or on the minibatch where there is none: a run for each distinct proposal.
    """
    step = current_step()
    return await best_scored(current, proposals, step.samples if step.sample is None else [step.sample])


async def best_scored(
    current: Values, proposals: Sequence[Proposal], samples: Sequence[Sample], guide: Any = None
) -> Sequence[Proposal]:
    """Return the proposal under which the agent scores best on these samples, none where the current values do."""

    async def score(values: Values, place: str) -> float | None:
        with lineage("validate"):
            return mean(await current_step().evaluate(values, samples, place, guide))

    candidates = await dedupe(current, [proposal for proposal in proposals if proposal.values], stepsize=1.0)
    best: list[Proposal] = []
    best_score = await score(current, "current") if candidates else None
    for i, candidate in enumerate(candidates):
        reached = await score({**current, **candidate.values}, f"candidate={i}")
        if reached is not None and (best_score is None or reached > best_score):
            best, best_score = [candidate], reached
    return best
