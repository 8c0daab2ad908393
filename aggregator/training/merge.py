"""Merging by a model: the aggregation of the seed, and a tree of it for many proposals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aggregator.agents.parameters import ParameterNode
from aggregator.cassettes.lineage import lineage
from aggregator.errors import ConfigError, LLMError, ends_run
from aggregator.executors.local import AsyncExecutor
from aggregator.llm.models import as_model
from aggregator.protocols import ChatModel, UpdateRule
from aggregator.records import Proposal, Sample, Values
from aggregator.training.asking import Answer, ask
from aggregator.training.context import current_step
from aggregator.training.evaluation import mean
from aggregator.training.failures import failure
from aggregator.training.parts import check_rule
from aggregator.training.prompts import AGGREGATOR_SYSTEM_PROMPT, CHOOSER_SYSTEM_PROMPT, aggregation_messages
from aggregator.training.rules import dedupe

Confidence = Literal["constant", "evidence"] | Callable[[Sequence[Proposal], float], Sequence[float]]
"""How sure each proposal is: the stepsize for all, by score and support, or a function of (proposals, stepsize)."""


class LLMMerge:
    """Asks a model for one new value per component, weighing the current value by 1 - stepsize.

    No call is made where there is nothing to weigh: stepsize 0, no proposal, one distinct proposal, or proposals that
    touch different parameters. A failed call applies nothing and stands in the proposal's failures; an error that no
    further call can escape (authentication, a wrong request, the budget) is raised.
    """

    def __init__(
        self,
        llm: Any = None,
        *,
        max_tokens: int = 4096,
        system_prompt: str = AGGREGATOR_SYSTEM_PROMPT,
        confidence: Confidence = "constant",
    ) -> None:
        if not callable(confidence) and confidence not in {"constant", "evidence"}:
            raise ConfigError(f"expected confidence 'constant', 'evidence' or a function, got {confidence!r}")
        self.llm: ChatModel = as_model(llm)
        self.max_tokens = max_tokens
        self.system_prompt = system_prompt
        self.confidence = confidence

    async def __call__(self, current: Values, proposals: Sequence[Proposal], *, stepsize: float) -> Sequence[Proposal]:
        """Return no proposal, or one."""
        if stepsize == 0:
            return []
        distinct = await dedupe(current, [proposal for proposal in proposals if proposal.values], stepsize=stepsize)
        if not _contested(distinct):
            return [united(distinct)] if distinct else []
        messages = aggregation_messages(
            current,
            distinct,
            confidences(distinct, stepsize, self.confidence),
            stepsize=stepsize,
            system_prompt=self.system_prompt,
        )
        with lineage("aggregate", role="aggregator"):
            return [answered(await self._ask(messages, current), distinct)]

    async def _ask(self, messages: list[dict[str, str]], current: Values) -> Answer | Exception:
        parameters = [parameter for parameter in current_step().parameters if parameter.name in current]
        try:
            return await ask(self.llm, messages, parameters, max_tokens=self.max_tokens)
        except LLMError as error:
            if ends_run(error):
                raise
            return error


def confidences(proposals: Sequence[Proposal], stepsize: float, confidence: Confidence) -> Sequence[float]:
    """Return one confidence per proposal.

    "constant" is the seed's: the stepsize for each. "evidence" scales it by support * (1 + score) / 2, relative to the
    best of the batch, for scores in [0, 1]: what more instances ask for, and what came from a run that got further,
    counts more.
    """
    if callable(confidence):
        return confidence(proposals, stepsize)
    if confidence == "constant":
        return [stepsize] * len(proposals)
    weights = [proposal.support * (1 + min(max(proposal.score or 0.0, 0.0), 1.0)) / 2 for proposal in proposals]
    return [stepsize * weight / max(weights) for weight in weights]


def _contested(proposals: Sequence[Proposal]) -> bool:
    """Tell whether two proposals want the same component."""
    names = [name for proposal in proposals for name in proposal.values]
    return len(names) != len(set(names))


def united(proposals: Sequence[Proposal]) -> Proposal:
    """Join proposals that touch different components."""
    if len(proposals) == 1:
        return proposals[0]
    return Proposal(
        values={name: value for proposal in proposals for name, value in proposal.values.items()},
        reasoning="\n".join(proposal.reasoning for proposal in proposals if proposal.reasoning),
        **_merged_facts(proposals),
    )


def answered(answer: Answer | Exception, proposals: Sequence[Proposal]) -> Proposal:
    """Make a proposal of a model's answer, or of the error instead of one, with what stood behind the question."""
    facts = _merged_facts(proposals)
    if isinstance(answer, Exception):
        record = failure("aggregation", answer)
        return Proposal(error=f"{record.error}: {record.message}", failures=(record,), **facts)
    return Proposal(values=answer.values, reasoning=answer.reasoning, error=answer.error, **facts)


def _merged_facts(proposals: Sequence[Proposal]) -> dict[str, Any]:
    scores = [proposal.score for proposal in proposals if proposal.score is not None]
    return {
        "score": sum(scores) / len(scores) if scores else None,
        "support": sum(proposal.support for proposal in proposals),
        "sample_ids": tuple(sorted({i for proposal in proposals for i in proposal.sample_ids})),
    }


CHARACTERS_PER_TOKEN = 4
"""The usual rule of thumb for English text, used to bound a prompt before it is sent."""


class tree_merge:  # noqa: N801 - used like the rules beside it, which are functions
    """Merges many proposals in rounds: at most `fan_in` and about `max_prompt_tokens` at once, nothing dropped.

    The instances that failed worst come first. `rule` is what merges one group, usually LLMMerge.
    """

    def __init__(
        self, rule: UpdateRule, *, fan_in: int = 8, max_prompt_tokens: int = 16_000, max_concurrency: int = 64
    ) -> None:
        check_rule(rule)
        if fan_in < 2:
            raise ConfigError(f"expected fan_in of at least 2, got {fan_in!r}")
        self.rule = rule
        self.fan_in = fan_in
        self.max_prompt_tokens = max_prompt_tokens
        self.executor = AsyncExecutor(max_concurrency)

    async def __call__(self, current: Values, proposals: Sequence[Proposal], *, stepsize: float) -> Sequence[Proposal]:
        """Return no proposal, or one."""
        level = worst_first([proposal for proposal in proposals if proposal.values])
        failed: list[Proposal] = []
        depth = 0
        while len(level) > 1:
            merged = await self._round(current, level, stepsize, depth)
            failed += [proposal for proposal in merged if proposal.failures]
            remaining = [proposal for proposal in merged if proposal.values]
            if len(remaining) >= len(level):
                raise ConfigError(f"{self.rule!r} did not merge: expected fewer proposals than {len(level)}")
            level, depth = remaining, depth + 1
        return level or failed[:1]

    async def _round(self, current: Values, level: Sequence[Proposal], stepsize: float, depth: int) -> list[Proposal]:
        async def merge(group: tuple[int, Sequence[Proposal]]) -> Sequence[Proposal]:
            with lineage(f"round={depth}", f"group={group[0]}"):
                return await self.rule(current, group[1], stepsize=stepsize)

        groups = grouped(level, self.fan_in, self.max_prompt_tokens)
        results = await self.executor.map(merge, list(enumerate(groups)))
        return [proposal for result in results for proposal in result]


def worst_first(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Order proposals by score, unknown first; equal ones keep their order."""
    return sorted(proposals, key=lambda proposal: float("-inf") if proposal.score is None else proposal.score)


def grouped(proposals: Sequence[Proposal], fan_in: int, max_tokens: int) -> list[list[Proposal]]:
    """Cut a sequence into groups of at least two where there are two, within the fan-in and the token limit."""
    groups: list[list[Proposal]] = [[]]
    room = max_tokens
    for proposal in proposals:
        cost = len(msgspec.json.encode(proposal.values, enc_hook=str)) // CHARACTERS_PER_TOKEN
        full = len(groups[-1]) >= fan_in or (len(groups[-1]) > 1 and cost > room)
        if full:
            groups.append([])
            room = max_tokens
        groups[-1].append(proposal)
        room -= cost
    return groups


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
