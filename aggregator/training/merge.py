"""Rules that merge proposals: without a model (pure, deterministic, closed under `chain`), or by one.

`LLMMerge` is the seed's aggregation; `tree_merge` makes a tree of it for many proposals. `identity` is the neutral
rule. If two proposals have equal weight, the one of the earlier sample wins, so that the order of completion never
matters. A proposal without a parameter does not vote on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from functools import partial, wraps
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from aggregator.agents.parameters import ParameterNode
from aggregator.cassettes.lineage import lineage
from aggregator.checks import check_positive, is_finite
from aggregator.errors import ConfigError
from aggregator.executors.local import MAX_CONCURRENCY, finish
from aggregator.executors.work import failure
from aggregator.llm.models import as_model
from aggregator.protocols import ChatModel
from aggregator.records import Proposal, Values
from aggregator.text import canonical_json, show_call
from aggregator.training.asking import Answer, ask_or_fail, read_reply
from aggregator.training.gates import compare_runs
from aggregator.training.parts import check_rule, combine_edits, merge_with, refuse_values
from aggregator.training.prompts import (
    AGGREGATOR_SYSTEM_PROMPT,
    CHOOSER_SYSTEM_PROMPT,
    aggregation_messages,
    evidence_of,
)
from aggregator.training.step import Step, UpdateRule

# ---- rules without a model

_Merge = Callable[[Sequence[Proposal], Step], Sequence[Proposal]]


def _rule(merge: _Merge) -> UpdateRule:
    """Make an UpdateRule of a pure function."""

    @wraps(merge)
    async def rule(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
        return merge(proposals, step)

    return rule


def chain(*rules: UpdateRule) -> UpdateRule:
    """Apply rules from left to right, as in `chain(without_failed, dedupe, top_k(8), LLMMerge(llm))`.

    Associative; `chain()` is the identity.
    """
    for rule in rules:
        check_rule(rule)

    async def chained(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
        for rule in rules:
            proposals = await merge_with(rule, proposals, step)
        return proposals

    chained.__qualname__ = show_call("chain", *rules)
    facts: Any = chained
    facts.calls_per_merge = sum(getattr(rule, "calls_per_merge", 0) for rule in rules)
    facts.tries = any(getattr(rule, "tries", False) for rule in rules)
    return chained


@_rule
def identity(proposals: Sequence[Proposal], _step: Step) -> Sequence[Proposal]:
    """Return the proposals unchanged: the neutral rule."""
    return proposals


@_rule
def without_failed(proposals: Sequence[Proposal], _step: Step) -> Sequence[Proposal]:
    """Drop the proposals with an error.

    >>> from aggregator.portal import call
    >>> call(without_failed, [Proposal(error="cut off"), Proposal(values={"k": 1})], Step())[0].values
    {'k': 1}
    """
    return [proposal for proposal in proposals if proposal.error is None]


@_rule
def dedupe(proposals: Sequence[Proposal], _step: Step) -> Sequence[Proposal]:
    """Merge proposals with equal values into one, with their support added up, at the position of the first.

    Its score is the mean by support; sample ids, different feedbacks and reasonings are concatenated in order.
    Proposals without values are unchanged, because their meanings may differ.

    >>> from aggregator.portal import call
    >>> found = call(dedupe, [Proposal(values={"k": 1}, sample_ids=(i,)) for i in (4, 7)], Step())
    >>> [(proposal.support, proposal.sample_ids) for proposal in found]
    [(2, (4, 7))]
    """
    groups: dict[bytes | int, list[Proposal]] = {}
    for i, proposal in enumerate(proposals):
        own = key_of(proposal.values) if proposal.values and proposal.error is None else i
        groups.setdefault(own, []).append(proposal)
    return [group[0] if len(group) == 1 else _join(group[0].values, group) for group in groups.values()]


def top_k(k: int) -> UpdateRule:
    """Keep the k proposals with the highest scores, in order; an unknown score is the lowest.

    >>> from aggregator.portal import call
    >>> scored = [Proposal(values={"k": i}, score=score) for i, score in enumerate([0.2, None, 0.9, 0.2])]
    >>> [proposal.values["k"] for proposal in call(top_k(2), scored, Step())]
    [0, 2]
    """
    if type(k) is not int or k < 1:
        raise ConfigError(f"Expected top_k of an int of at least 1, got {k!r}")

    def best(proposals: Sequence[Proposal], _step: Step) -> Sequence[Proposal]:
        """Keep the proposals with the highest scores; of equal ones those of the earliest samples."""
        scores = [-math.inf if one.score is None else one.score for one in proposals]
        ranked = sorted(range(len(proposals)), key=lambda i: (-scores[i], _first_sample(proposals[i]), i))
        return [proposals[i] for i in sorted(ranked[:k])]

    best.__qualname__ = show_call("top_k", k)
    return _rule(best)


best_of = top_k(1)


@_rule
def majority(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
    """Give each parameter the value that most instances propose.

    A value has the weight stepsize times its number of instances, the current value 1 - stepsize in addition; satisfied
    instances (`step.satisfied`) support the current value. At equal weight the current value loses. Values are compared
    as JSON: 1, 1.0 and True are three values.

    >>> from aggregator.portal import call
    >>> votes = [Proposal(values={"k": k}, sample_ids=(i,)) for i, k in enumerate([3, 5, 5, 5])]
    >>> call(majority, votes, Step(values={"k": 3}))[0].values
    {'k': 5}
    """
    current = step.values
    elected = {name: _elect(name, proposals, step) for name in _names(proposals)}
    values = {
        name: value for name, value in elected.items() if name not in current or key_of(value) != key_of(current[name])
    }
    return [_join(values, proposals)] if values and step.stepsize > 0 else []


@_rule
def mean(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
    """Move each numeric parameter by stepsize towards the mean of the proposals, weighted by support.

    Satisfied instances (`step.satisfied`) count as proposals of the current value. An int is rounded, halves to even.
    Other parameters stay in the proposals for the next rule, as in `chain(mean, majority)`. Sums are exact, so the
    order of the proposals does not matter.

    >>> from aggregator.portal import call
    >>> votes = [Proposal(values={"t": t}) for t in (0.2, 0.4)]
    >>> round(call(mean, votes, Step(values={"t": 0.7}))[0].values["t"], 6)
    0.5
    """
    current = step.values
    proposed = {name: [one.values[name] for one in proposals if name in one.values] for name in _names(proposals)}
    numeric = [name for name, values in proposed.items() if all(map(is_finite, (*values, current.get(name, 0))))]
    if not numeric:
        return proposals
    moved = {name: _move(name, proposals, step) for name in numeric}
    movers = [proposal for proposal in proposals if any(name in proposal.values for name in numeric)]
    rest = [_left(proposal, numeric) for proposal in proposals]
    return [_join(moved, movers), *(proposal for proposal in rest if proposal.values or proposal.error is not None)]


def key_of(value: Any) -> bytes:
    """Encode a value so that equal ones give equal bytes.

    1, 1.0 and True are three values; the order of keys is ignored.
    """
    return canonical_json(value, repr)


def _first_sample(proposal: Proposal) -> float:
    return min(proposal.sample_ids, default=math.inf)


def _in_sample_order(proposals: Sequence[Proposal]) -> list[Proposal]:
    return sorted(proposals, key=_first_sample)


def _names(proposals: Sequence[Proposal]) -> list[str]:
    return list(dict.fromkeys(name for proposal in _in_sample_order(proposals) for name in proposal.values))


def _elect(name: str, proposals: Sequence[Proposal], step: Step) -> Any:
    """Count the votes on one parameter; ties go to the earlier sample, the current value comes last."""
    current, share = step.values, Fraction(step.stepsize)
    weights: dict[bytes, Fraction] = {}
    values: dict[bytes, Any] = {}
    for proposal in _in_sample_order(proposals):
        if name in proposal.values:
            key = key_of(proposal.values[name])
            values.setdefault(key, proposal.values[name])
            weights[key] = weights.get(key, Fraction(0)) + share * proposal.support
    if name in current:
        key = key_of(current[name])
        values.setdefault(key, current[name])
        weights[key] = weights.get(key, Fraction(0)) + 1 - share + share * step.satisfied
    return values[max(weights, key=weights.__getitem__)]


def _move(name: str, proposals: Sequence[Proposal], step: Step) -> int | float:
    current = step.values
    voters = [proposal for proposal in proposals if name in proposal.values]
    support = sum(proposal.support for proposal in voters)
    total = sum(Fraction(proposal.values[name]) * proposal.support for proposal in voters)
    start = Fraction(current[name]) if name in current else total / support
    target = (total + start * step.satisfied) / (support + step.satisfied)
    moved = start + Fraction(step.stepsize) * (target - start)
    whole = isinstance(current.get(name, voters[0].values[name]), int)
    return round(moved) if whole else float(moved)


def _left(proposal: Proposal, taken: Sequence[str]) -> Proposal:
    values = {name: value for name, value in proposal.values.items() if name not in taken}
    return proposal if len(values) == len(proposal.values) else replace(proposal, values=values)


def _join(values: Values, proposals: Sequence[Proposal]) -> Proposal:
    """Return one proposal of these values, supported by all the others."""
    ordered = _in_sample_order(proposals)
    return Proposal(
        values=values,
        score=_mean_score(ordered),
        feedback=_join_texts([proposal.feedback for proposal in ordered]),
        reasoning=_join_texts([proposal.reasoning for proposal in ordered]),
        failures=tuple(failure for proposal in ordered for failure in proposal.failures),
        support=sum(proposal.support for proposal in ordered),
        sample_ids=tuple(dict.fromkeys(i for proposal in ordered for i in proposal.sample_ids)),
    )


def _mean_score(proposals: Sequence[Proposal]) -> float | None:
    scored = [(Fraction(p.score), p.support) for p in proposals if p.score is not None and math.isfinite(p.score)]
    support = sum(count for _, count in scored)
    return float(sum(score * count for score, count in scored) / support) if support else None


def _join_texts(texts: Sequence[str]) -> str:
    return "\n".join(dict.fromkeys(text for text in texts if text))


# ---- merging by a model

Confidence = Literal["constant", "evidence"] | Callable[[Sequence[Proposal], float], Sequence[float]]
"""How sure each proposal is: the stepsize for all, by score and support, or a function of (proposals, stepsize)."""


class LLMMerge:
    """Asks a model for one new value per component, weighing the current value by 1 - stepsize.

    No call is made if there is nothing to weigh: stepsize 0, no proposal, one distinct proposal, or proposals that
    touch different parameters. If instances of the group are satisfied (`step.satisfied`), a single proposal is weighed
    against them, too. A parameter for which no proposal names another value is neither shown nor changed. A failed call
    applies nothing and is listed in the proposal's failures; an error of every call (authentication, the budget) is
    raised. `temperature` and `seed` are sent to the model; None means the server's default. With `evidence` the model
    also sees each proposal's reasoning and the beginning of the transcripts behind it.

    >>> from aggregator.testing import ScriptedModel, suggestion
    >>> from asyncio import run
    >>> rule = LLMMerge(ScriptedModel(suggestion(amount=5)))
    >>> proposals = [Proposal(values={"amount": 4}), Proposal(values={"amount": 6})]
    >>> run(rule(proposals, Step.of(lambda x, *, amount=1: x + amount)))[0].values
    {'amount': 5}
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
        if len(proposals) > 1 or step.satisfied:  # else no model is asked
            proposals = leave_unchanged(proposals, step.values)
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


def leave_unchanged(proposals: Sequence[Proposal], values: Values) -> list[Proposal]:
    """Return the proposals without the parameters whose value all of them repeat.

    A repeated value is a vote only where another proposal names another value.

    >>> asked = [Proposal(values={"k": 1, "t": 2}), Proposal(values={"k": 3})]
    >>> [one.values for one in leave_unchanged(asked, {"k": 1, "t": 2})]
    [{'k': 1}, {'k': 3}]
    """
    current = {name: key_of(value) for name, value in values.items()}
    changed = {name for one in proposals for name, value in one.values.items() if current.get(name) != key_of(value)}
    return [_left(one, [name for name in one.values if name not in changed]) for one in proposals]


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
                raise ConfigError(
                    f"Expected {rule!r} to merge {len(level)} proposals into fewer, got {len(remaining)}; "
                    "give tree_merge a rule that merges, such as LLMMerge(llm)"
                )
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


_best_tried: Any = best_tried
_best_tried.tries = True  # a plan counts its rollouts
