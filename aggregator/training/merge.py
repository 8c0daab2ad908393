"""Merging by a model: the seed's aggregation, and a tree of it for many proposals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from aggregator.agents.parameters import ParameterNode
from aggregator.cassettes.lineage import lineage
from aggregator.checks import check_positive
from aggregator.errors import ConfigError
from aggregator.executors.local import MAX_CONCURRENCY, finish
from aggregator.executors.work import failure
from aggregator.llm.models import as_model
from aggregator.protocols import ChatModel
from aggregator.records import Proposal
from aggregator.text import show_call
from aggregator.training.asking import Answer, ask_or_fail, read_reply
from aggregator.training.gates import compare_runs
from aggregator.training.parts import check_rule, combine_edits, merge_with, refuse_values
from aggregator.training.prompts import (
    AGGREGATOR_SYSTEM_PROMPT,
    CHOOSER_SYSTEM_PROMPT,
    aggregation_messages,
    evidence_of,
)
from aggregator.training.rules import dedupe
from aggregator.training.step import Step, UpdateRule

Confidence = Literal["constant", "evidence"] | Callable[[Sequence[Proposal], float], Sequence[float]]
"""How sure each proposal is: the stepsize for all, by score and support, or a function of (proposals, stepsize)."""


# ---- merging by a model


class LLMMerge:
    """Asks a model for one new value per component, weighing the current value by 1 - stepsize.

    No call is made if there is nothing to weigh: stepsize 0, no proposal, one distinct proposal, or proposals that
    touch different parameters. If instances of the group are satisfied (`step.satisfied`), a single proposal is weighed
    against them, too. A parameter that no proposal names is neither shown nor changed. A failed call applies nothing
    and is listed in the proposal's failures; an error of every call (authentication, the budget) is raised.
    `temperature` and `seed` are sent to the model; None means the server's default. With `evidence` the model also sees
    each proposal's reasoning and the beginning of the transcripts behind it.
    """

    calls_per_merge = 1

    def __init__(
        self,
        llm: Any = None,
        *,
        max_tokens: int = 4096,
        system_prompt: str | None = None,
        confidence: Confidence = "constant",
        temperature: float | None = None,
        seed: int | None = None,
        evidence: bool = False,
    ) -> None:
        if type(evidence) is not bool:
            raise ConfigError(f"Expected evidence=True or False, got {evidence!r}")
        if not callable(confidence) and confidence not in {"constant", "evidence"}:
            raise ConfigError(f"Expected confidence 'constant', 'evidence' or a function, got {confidence!r}")
        self.llm: ChatModel = as_model(llm)
        self.max_tokens = max_tokens
        self.system_prompt = AGGREGATOR_SYSTEM_PROMPT if system_prompt is None else system_prompt
        self.confidence = confidence
        self.temperature = temperature
        self.seed = seed
        self.evidence = evidence

    def __repr__(self) -> str:
        return show_call("LLMMerge", self.llm, **({"evidence": True} if self.evidence else {}))

    async def __call__(self, proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
        """Return one proposal, or none."""
        if step.stepsize == 0:
            return []
        proposals, edits = combine_edits(proposals, step)
        if edits is not None:
            return [*await self(proposals, step), edits]
        distinct = await dedupe([proposal for proposal in proposals if proposal.values], step)
        names = [name for proposal in distinct for name in proposal.values]
        if not distinct or (len(names) == len(set(names)) and not step.satisfied):
            return [unite(distinct)] if distinct else []  # no two of them change the same component
        about = narrow(step, names)
        with lineage("aggregate", role="aggregator"):
            answer = await self.ask(self.messages(distinct, about), step, about)
        return [answer_of(answer, distinct)]

    def messages(self, proposals: Sequence[Proposal], step: Step) -> list[dict[str, str]]:
        """Return the prompt."""
        return aggregation_messages(
            step.values,
            proposals,
            confidences(proposals, step.stepsize, self.confidence),
            stepsize=step.stepsize,
            satisfied=step.satisfied,
            evidence=[evidence_of(proposal, step.rollouts) for proposal in proposals] if self.evidence else (),
            system_prompt=self.system_prompt,
        )

    async def ask(self, messages: list[dict[str, str]], step: Step, about: Step) -> Answer | Exception:
        """Return the model's answer for the parameters of `about`, or the error of a lost call."""
        read, refuse = partial(read_reply, ignored=names_beyond(step, about)), partial(refuse_values, step=about)
        return await ask_or_fail(
            self.llm,
            messages,
            about.parameters,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            read=read,
            refuse=refuse,
        )


def narrow(step: Step, names: Collection[str]) -> Step:
    """Return the step with only the named parameters."""
    about = [parameter for parameter in step.parameters if parameter.name in names]
    values = {name: value for name, value in step.values.items() if name in names}
    return replace(step, parameters=about, values=values)


def names_beyond(step: Step, about: Step) -> frozenset[str]:
    """Return the parameters that a reply about some others may not change."""
    known, own = ({name for one in s.parameters for name in (one.name, one.py_name)} for s in (step, about))
    return frozenset(known - own)


# ---- proposals in a prompt


def confidences(proposals: Sequence[Proposal], stepsize: float, confidence: Confidence) -> Sequence[float]:
    """Return one confidence per proposal.

    "constant" is the seed's: the stepsize for each. "evidence" scales it by support * (1 + score) / 2, relative to the
    best of the batch, for scores in [0, 1]: proposals of more instances and of better rollouts count more.
    """
    if callable(confidence):
        return confidence(proposals, stepsize)
    if confidence == "constant":
        return [stepsize] * len(proposals)
    weights = [proposal.support * (1 + min(max(proposal.score or 0.0, 0.0), 1.0)) / 2 for proposal in proposals]
    return [stepsize * weight / max(weights) for weight in weights]


def unite(proposals: Sequence[Proposal]) -> Proposal:
    """Join proposals that change different components."""
    if len(proposals) == 1:
        return proposals[0]
    return Proposal(
        values={name: value for proposal in proposals for name, value in proposal.values.items()},
        reasoning="\n".join(proposal.reasoning for proposal in proposals if proposal.reasoning),
        **_facts_of(proposals),
    )


def answer_of(answer: Answer | Exception, proposals: Sequence[Proposal]) -> Proposal:
    """Make a proposal of a model's answer, or of its error, with the sources of the question."""
    facts = _facts_of(proposals)
    if isinstance(answer, Exception):
        record = failure("aggregation", answer)
        return Proposal(error=f"{record.error}: {record.message}", failures=(record,), **facts)
    return Proposal(values=answer.values, reasoning=answer.reasoning, error=answer.error, **facts)


def _facts_of(proposals: Sequence[Proposal]) -> dict[str, Any]:
    scores = [proposal.score for proposal in proposals if proposal.score is not None]
    return {
        "score": sum(scores) / len(scores) if scores else None,
        "support": sum(proposal.support for proposal in proposals),
        "sample_ids": tuple(sorted({i for proposal in proposals for i in proposal.sample_ids})),
    }


CHARACTERS_PER_TOKEN = 4
"""The usual estimate for English text, used to bound a prompt before it is sent."""


# ---- rules around a merge


def tree_merge(
    rule: UpdateRule, *, fan_in: int = 8, max_prompt_tokens: int = 16_000, max_concurrency: int = MAX_CONCURRENCY
) -> UpdateRule:
    """Merge many proposals in rounds: at most `fan_in` and about `max_prompt_tokens` at once, nothing dropped.

    The instances with the lowest scores come first. `rule` merges one group; usually it is LLMMerge.
    """
    check_rule(rule)
    check_positive("max_concurrency", max_concurrency)
    if fan_in < 2:
        raise ConfigError(f"Expected fan_in of at least 2, got {fan_in!r}")

    async def tree(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
        level = worst_first([proposal for proposal in proposals if proposal.values])
        failed: list[Proposal] = []
        depth = 0

        async def merge(group: tuple[int, Sequence[Proposal]]) -> Sequence[Proposal]:
            with lineage(f"round={depth}", f"group={group[0]}"):
                return await merge_with(rule, group[1], step if is_last else replace(step, satisfied=0))

        is_last = False
        while len(level) > 1 or (level and step.satisfied and not is_last):
            groups = list(enumerate(group_proposals(level, fan_in, max_prompt_tokens)))
            is_last = len(groups) == 1  # the round that weighs the result against the satisfied instances
            merged = [proposal for found in await finish(merge, groups, max_concurrency) for proposal in found]
            failed += [proposal for proposal in merged if proposal.failures]
            remaining = [proposal for proposal in merged if proposal.values]
            if len(remaining) >= len(level) > 1:
                raise ConfigError(f"{rule!r} did not merge: expected fewer proposals than {len(level)}")
            level, depth = remaining, depth + 1
        return level or failed[:1]

    tree.__qualname__ = show_call("tree_merge", rule, fan_in=fan_in)
    return tree


def worst_first(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Sort proposals by score, unknown ones first; the order of equal ones is kept."""
    return sorted(proposals, key=lambda proposal: float("-inf") if proposal.score is None else proposal.score)


def group_proposals(proposals: Sequence[Proposal], fan_in: int, max_tokens: int) -> list[list[Proposal]]:
    """Split a sequence into groups within the fan-in and the token limit, of at least two if possible."""
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


async def last_of(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
    """Keep the last proposal with a change: the end of a refinement.

    >>> from aggregator.portal import call
    >>> call(last_of, [Proposal(values={"k": k}) for k in (1, 2)], Step())[0].values
    {'k': 2}
    """
    return [proposal for proposal in proposals if proposal.values][-1:]


# ---- rules that choose


class LLMChoice:
    """Asks a model which proposal is best, and keeps that one unchanged, or none if the current value is better.

    No call is made for stepsize 0, for no proposal, or for one distinct proposal if no instance is satisfied
    (`step.satisfied`). A failed call keeps nothing and is listed in the proposal's failures; an error of every call is
    raised.
    """

    calls_per_merge = 1

    def __init__(self, llm: Any = None, *, max_tokens: int = 4096, system_prompt: str | None = None) -> None:
        self.llm: ChatModel = as_model(llm)
        self.max_tokens = max_tokens
        self.system_prompt = CHOOSER_SYSTEM_PROMPT if system_prompt is None else system_prompt

    def __repr__(self) -> str:
        return show_call("LLMChoice", self.llm)

    async def __call__(self, proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
        """Return one proposal, or none."""
        if step.stepsize == 0:
            return []
        distinct = await dedupe([proposal for proposal in proposals if proposal.values], step)
        if len(distinct) < 2 and not (distinct and step.satisfied):
            return distinct
        number = Annotated[int, Meta(ge=0, le=len(distinct))]
        choice = ParameterNode(0, name="choice", type=number, description="the number of the best suggestion")
        about = narrow(step, {name for proposal in distinct for name in proposal.values})
        messages = aggregation_messages(
            about.values,
            distinct,
            [step.stepsize] * len(distinct),
            stepsize=step.stepsize,
            satisfied=step.satisfied,
            system_prompt=self.system_prompt,
        )
        with lineage("choose", role="aggregator"):
            answer = await ask_or_fail(self.llm, messages, [choice], max_tokens=self.max_tokens)
        if isinstance(answer, Exception) or answer.error is not None:
            return [answer_of(answer, distinct)]
        chosen: int = answer.values.get("choice", 0)
        return distinct[chosen - 1 : chosen] if chosen else []


async def best_tried(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
    """Run the agent with each proposal and keep the best, or none if the current values are as good (best of n).

    It runs on `step.samples`: as an optimizer's `select` on its instance, as a trainer's rule on the minibatch. It
    costs a run for each distinct proposal, and one for the current values.
    """
    candidates = await dedupe([proposal for proposal in proposals if proposal.values], step)
    if not candidates:
        return []
    best: list[Proposal] = []
    known = await step.evaluate(step.values, step.samples)
    for candidate in candidates:
        tried = await step.evaluate({**step.values, **candidate.values}, step.samples)
        if compare_runs(known, tried, min_score=step.min_score).accepted:
            best, known = [candidate], tried
    return best
