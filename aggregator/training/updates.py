"""One update: from the proposals of a step's instances to the one lasting mutation.

    proposals -> merge -> new candidates -> trials -> choice -> gate -> write

`greedy` has one candidate and no trials, so that an update is merge, gate, write. All of it happens in this process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from aggregator.cassettes.lineage import lineage
from aggregator.checks import is_finite
from aggregator.errors import ConfigError
from aggregator.executors.local import MAX_CONCURRENCY, finish
from aggregator.records import (
    Candidate,
    Decision,
    Failure,
    FullStepReport,
    Proposal,
    Rollout,
    Sample,
    Stage,
    Usage,
    Values,
)
from aggregator.text import shorten
from aggregator.training.asking import convert_suggestion
from aggregator.training.evaluation import failures_of, lowest_of, mean, scores_of
from aggregator.training.gates import always
from aggregator.training.merge import key_of
from aggregator.training.parts import (
    ask_gate,
    check_candidates,
    check_choice,
    check_trials,
    combine_edits,
    merge_with,
    permit_replayed_code,
    refuse_values,
)
from aggregator.training.plan import Turn
from aggregator.training.searches import contributors, greedy, plain, sources, with_named, with_scores
from aggregator.training.step import (
    Gate,
    Instance,
    Search,
    Step,
    UpdateRule,
    is_satisfied,
    propose_nothing,
    read_only,
    read_output,
    use_values,
)

Propose = Callable[[Sequence[Rollout], Step], Awaitable[Proposal]]
"""Asks the optimizer for a proposal from rollouts."""

ProposePer = Literal["instance", "batch"]


# ---- an update


class Parts(Struct, frozen=True, kw_only=True):
    """The decisions of a trainer, read again for each step."""

    propose_per: ProposePer
    propose: Propose
    rule: UpdateRule
    search: Search = greedy
    gate: Gate = always
    limit: int = MAX_CONCURRENCY


def skip_satisfied(propose: Propose) -> Propose:
    """Return how to propose for a single instance unless it is satisfied."""

    async def skip(rollouts: Sequence[Rollout], step: Step) -> Proposal:
        if len(rollouts) == 1 and is_satisfied(rollouts[0], step):
            return propose_nothing(rollouts[0])
        return await propose(rollouts, step)

    return skip


class Explored(Struct, frozen=True, kw_only=True):
    """A candidate that this step explores: its values in the parameters' types, and its minibatch results.

    `step` is the step as the parts that propose for this candidate see it.
    """

    candidate: Candidate
    step: Step
    instances: Sequence[Instance] = ()


class Update(Struct, frozen=True, kw_only=True):
    """The result of one update: the proposed values, the gate's decision, the minibatch's mean score."""

    values: Values = {}
    decision: Decision
    score: float | None = None
    reasoning: str = ""
    proposals: int = 0
    contributors: tuple[int, ...] = ()
    sources: Mapping[str, tuple[int, ...]] = {}
    failures: tuple[Failure, ...] = ()
    pool: Sequence[Candidate] = ()


class Made(Struct, frozen=True, kw_only=True):
    """The new candidates made from a step's proposals, and the failures."""

    candidates: Sequence[Candidate]
    failures: Sequence[Failure]
    proposals: int
    reasoning: str


async def make_update(parts: Parts, explored: Sequence[Explored], step: Step, pool: Sequence[Candidate]) -> Update:
    """Propose, try, choose, ask the gate, and write; `explored` and `pool` begin with the current candidate.

    `step.memory` is the gate's to write; the other parts see it read-only.
    """
    search, seen = parts.search, read_only(step)
    made = await make_candidates(parts, explored, seen, pool)
    # each candidate's values, in the parameters' types
    own = {one.candidate.id: one.step.values for one in explored} | {one.id: one.values for one in made.candidates}
    tried, failures = await try_candidates(search, explored, made.candidates, own, seen)
    current, old, new = tried[0], tried[: len(explored)], tried[len(explored) :]
    best, decision = check_choice(search, search.choose(old, new, seen), own)
    after = step.values if best is None else own[best.id]
    values = changes_between(step.values, after)
    if best is not None and decision.accepted:
        verdict = await ask_gate(parts.gate, step.values, after, step)
        decision = decision if verdict.accepted and decision.reason else verdict
    if decision.accepted:
        for parameter in step.parameters:
            if parameter.name in values:
                parameter.store(values[parameter.name])
    # the pool to remember
    judged = [replace(instance.rollout, score=instance.proposal.score) for instance in explored[0].instances]
    known = {candidate.id: candidate for candidate in (*pool, *tried)}
    now = best if best is not None and decision.accepted else current
    kept: Sequence[Candidate] = ()
    if not is_single(search):
        kept = check_candidates(search, "keep", search.keep([now, *without(now, list(known.values()))], seen))
        kept = [now, *without(now, kept)]
    return Update(
        values=values,
        decision=decision,
        score=mean(scores_of(judged, lowest_of([run.score for run in judged], min_score=step.min_score))),
        reasoning=made.reasoning if best is None else best.reasoning,
        proposals=made.proposals,
        contributors=() if best is None else contributors(best, current, known.values()),
        sources={} if best is None else sources(best, current, known.values()),
        failures=(*made.failures, *failures),
        pool=kept,
    )


async def merge_group(rule: UpdateRule, group: Sequence[Proposal], step: Step) -> Proposal:
    """Return one proposal made by a rule from several; item-by-item edits are combined without the rule."""
    if not group:
        return Proposal()
    rest, edits = combine_edits(group, step)
    if edits is None or step.stepsize == 0:
        return settle(await merge_with(rule, rest, step))
    asking = [proposal for proposal in rest if proposal.values or proposal.failures]
    return settle([*(await merge_with(rule, asking, step) if asking else ()), edits])


# ---- candidates


async def make_candidates(parts: Parts, explored: Sequence[Explored], step: Step, pool: Sequence[Candidate]) -> Made:
    """Merge the proposals of each explored candidate's instances into new candidates, in order."""
    count, single = parts.search.proposals, is_single(parts.search)
    per_instance = parts.propose_per == "instance"
    jobs = [(one, i) for one in explored for i in range(min(count, len(one.instances)) if per_instance else count)]

    async def merge(job: tuple[Explored, int]) -> tuple[Proposal, Sequence[Proposal]]:
        one, i = job
        places = [f"candidate={i}"] if single else [*place_of(parts.search, one.candidate), f"proposal={i}"]
        with lineage(*(() if single and count == 1 else places)), use_values(one.step):
            mine = one.instances[i::count] if per_instance else one.instances
            rest = [own for own in mine if own.proposal.values or not is_satisfied(own.rollout, one.step)]
            if per_instance:
                group = [instance.proposal for instance in mine]
            else:
                rollouts = informative(rest)
                group = [await parts.propose(rollouts, replace(one.step, rollouts=rollouts))] if rollouts else []
            proposal = await merge_group(parts.rule, group, replace(one.step, satisfied=len(mine) - len(rest)))
            if group and not per_instance:
                proposal = replace(proposal, sample_ids=tuple(rollout.sample_id for rollout in rollouts))
            return proposal, group

    merged = await finish(merge, jobs, parts.limit)
    known = {key_of(plain(candidate.values)) for candidate in [*pool, *(one.candidate for one in explored[1:])]}
    made: list[Candidate] = []
    failures: list[Failure] = []
    for (one, _), (proposal, group) in zip(jobs, merged, strict=True):
        accepted, refused = convert_suggestion(proposal.values, step.parameters)
        permit_replayed_code(accepted, step.parameters)
        reasons = refuse_values(accepted, one.step)
        accepted = {name: value for name, value in accepted.items() if name not in reasons}
        recorded = [] if per_instance else [record for own in group for record in own.failures]
        wrong = reasons.values() if proposal.failures else (proposal.error, *refused.values(), *reasons.values())
        more = list(proposal.failures)
        if any(wrong):
            more += unread("aggregation" if per_instance else "proposal", proposal.sample_id, *wrong)
        failures += [*recorded, *[record for record in more if record not in recorded]]  # a rule may drop them
        values = {**one.step.values, **accepted}
        changes = changes_between(one.step.values, values)
        if changes and (key := key_of(plain(values))) not in known:
            known.add(key)
            made.append(
                Candidate(
                    id=f"{step.number}.{len(made) + 1}",
                    values=values,
                    parent=one.candidate.id,
                    step=step.number,
                    reasoning=proposal.reasoning,
                    sample_ids=proposal.sample_ids,
                    sources={name: _proposers_of(name, group, proposal, one.step.values) for name in changes},
                )
            )
    asked = [proposal for _, group in merged for proposal in group] if single else [proposal for proposal, _ in merged]
    return Made(
        candidates=made,
        failures=failures,
        proposals=len([proposal for proposal in asked if proposal.values]),
        reasoning=merged[0][0].reasoning if single and len(merged) == 1 else "",
    )


def _proposers_of(name: str, group: Sequence[Proposal], merged: Proposal, values: Values) -> tuple[int, ...]:
    """Return the samples behind a merged proposal that proposed to change this parameter, not to leave it as it is."""
    behind, current = set(merged.sample_ids), repr(values[name])
    changed = [one for one in group if name in one.values and repr(one.values[name]) != current]
    return tuple(sorted({i for one in changed for i in one.sample_ids if i in behind}))


async def try_candidates(
    search: Search, explored: Sequence[Explored], made: Sequence[Candidate], values: Mapping[str, Values], step: Step
) -> tuple[list[Candidate], list[Failure]]:
    """Return all candidates with the scores that this step adds, and the failures.

    `values` are those of each candidate, by its id.

    An explored candidate is not run on the minibatch again, unless the search has its own guide or the call was lost.
    If the agent failed, the score is the lowest of this comparison (`lowest_of`).
    """
    candidates = [*[one.candidate for one in explored], *made]
    trials = check_trials(search, search.trials(candidates[: len(explored)], made, step), values)
    if not trials:
        return candidates, []
    guide = getattr(search, "guide", None)
    shown = {
        (one.candidate.id, id(instance.sample)): instance.rollout
        for one in (explored if guide is None else ())
        for instance in one.instances
        if instance.rollout.failure is None or not instance.rollout.failure.infrastructure
    }

    async def run(trial: tuple[Candidate, Sequence[Sample]]) -> tuple[Sequence[Rollout], list[Failure]]:
        candidate, samples = trial
        due = [sample for sample in samples if (candidate.id, id(sample)) not in shown]
        runs = await step.evaluate(values[candidate.id], due, guide=guide) if due else ()
        made = {id(sample): run for sample, run in zip(due, runs, strict=True)}
        known = [made.get(id(sample)) or shown[candidate.id, id(sample)] for sample in samples]
        return known, [replace(record, stage="evaluation") for record in failures_of(runs)]

    found = await finish(run, trials, max(len(trials), 1))
    earlier = [total / count for candidate in candidates for total, count in candidate.scores.values()]
    lowest = lowest_of(earlier, *(scores_of(rollouts) for rollouts, _ in found), min_score=step.min_score)
    scores: dict[str, list[tuple[int, float | None]]] = {}
    for (candidate, samples), (rollouts, _) in zip(trials, found, strict=True):
        more = zip(samples, scores_of(rollouts, lowest), strict=True)
        scores.setdefault(candidate.id, []).extend((sample.id, score) for sample, score in more)
    failures = [record for _, records in found for record in records]
    lost = {name: [i for i, score in more if score is None] for name, more in scores.items()}
    named: dict[str, list[Rollout]] = {}
    for (candidate, _), (rollouts, _) in zip(trials, found, strict=True):
        named.setdefault(candidate.id, []).extend(rollouts)
    names = getattr(search, "scores", ())
    scored = [with_scores(one, scores.get(one.id, ()), lost.get(one.id, ())) for one in candidates]
    return [with_named(one, names, named.get(one.id, ())) if names else one for one in scored], failures


def informative(instances: Sequence[Instance]) -> list[Rollout]:
    """Return the observed rollouts, for an optimizer that sees the whole minibatch.

    Raises ConfigError for proposals of an overridden `forward`, because no rule would merge them.
    """
    asking = [instance for instance in instances if not instance.is_observed and instance.proposal.values]
    if asking:
        raise ConfigError(
            "Expected forward to return a Rollout where the optimizer gets the whole minibatch, "
            f"got {shorten(asking[0].output)}; use AggregatedUpdate, or a search with rule=, to merge proposals"
        )
    seen = [instance.rollout for instance in instances if instance.is_observed]
    return [rollout for rollout in seen if rollout.feedback or not rollout.failure]


# ---- settling an update


def settle(merged: Sequence[Proposal]) -> Proposal:
    """Return the one proposal that a rule leaves; raises ConfigError if several contradict each other."""
    if not merged:
        return Proposal()
    values: Values = {}
    failures: list[Failure] = []
    samples: set[int] = set()
    for proposal in merged:
        if values.keys() & proposal.values.keys():
            raise ConfigError(
                f"Expected a rule that leaves one proposal for each parameter, got {len(merged)} for the same "
                "parameter; end it with one that merges, as in chain(top_k(8), LLMMerge(llm))"
            )
        values |= proposal.values
        failures += proposal.failures
        samples.update(proposal.sample_ids if proposal.values else ())
    return replace(merged[0], values=values, failures=tuple(failures), sample_ids=tuple(sorted(samples)))


def unread(stage: Stage, sample_id: int | None, *messages: str | None) -> list[Failure]:
    """Return unreadable replies and invalid values as failures of this stage."""
    return [
        Failure(stage=stage, error="SuggestionError", message=message, sample_id=sample_id)
        for message in messages
        if message
    ]


def is_single(search: Search) -> bool:
    """Return True for a search without a pool, such as `greedy`."""
    return bool(getattr(search, "is_single", False))


def place_of(search: Search, candidate: Candidate) -> tuple[str, ...]:
    """Return the part of the lineage that names a candidate."""
    return () if is_single(search) else (f"candidate={candidate.id}",)


def changes_between(before: Values, after: Values) -> Values:
    """Return the values that differ, after the change."""
    return {name: value for name, value in after.items() if name not in before or value != before[name]}


def without(candidate: Candidate, others: Sequence[Candidate]) -> list[Candidate]:
    """Return the values without the given names."""
    return [other for other in others if other.id != candidate.id]


def with_outputs(explored: Sequence[Explored], given: Sequence[Any]) -> list[Explored]:
    """Return the explored candidates with the outputs given to `update`, candidate by candidate.

    An overridden `update` may pass on other outputs than the step's, or fewer.
    """
    known = {id(instance.output): instance for one in explored for instance in one.instances}
    instances = [known.get(id(output)) or read_output(output) for output in given]
    size = len(instances) // len(explored)
    return [replace(one, instances=instances[i * size : (i + 1) * size]) for i, one in enumerate(explored)]


def as_update(answer: Any, explored: Sequence[Explored], written: Values, pool: Sequence[Candidate]) -> Update:
    """Return the Update of an overridden `update` that returned a score or nothing usable; `pool` is unchanged."""
    runs = [instance.rollout for instance in explored[0].instances]
    lowest = lowest_of([run.score for run in runs], min_score=explored[0].step.min_score)
    return Update(
        values=written,
        decision=Decision(accepted=bool(written), reason="applied by update()"),
        score=float(answer) if is_finite(answer) else mean(scores_of(runs, lowest)),
        proposals=sum(len(one.instances) for one in explored),
        pool=pool,
    )


def report_step(turn: Turn, explored: Sequence[Explored], update: Update, usage: dict[str, Usage]) -> FullStepReport:
    """Return the report of a step: all its rollouts and proposals, the decision, and the usage."""
    instances = [instance for one in explored for instance in one.instances]
    failures = [record for instance in instances for record in instance.proposal.failures]
    failures += [record for record in update.failures if record not in failures]  # a proposal includes them
    return FullStepReport(
        epoch=turn.epoch,
        step=turn.step,
        sample_ids=tuple([sample.id for sample in turn.samples]),
        scores=tuple([instance.rollout.score for instance in explored[0].instances]),
        score=update.score,
        decision=update.decision,
        update=update.values,
        reasoning=update.reasoning,
        proposals=update.proposals,
        contributors=update.contributors,
        sources=update.sources,
        failures=tuple([replace(record, epoch=turn.epoch, step=turn.step) for record in failures]),
        usage=usage,
        rollouts=tuple([without_handle(instance.rollout) for instance in instances]),
        all_proposals=tuple([instance.proposal for instance in instances]),
        lineages=tuple([instance.rollout.lineage for instance in instances]),
    )


def without_handle(rollout: Rollout) -> Rollout:
    """Return the rollout for observers, without the handle, which belongs to the agent's adapter."""
    return rollout if rollout.handle is None else replace(rollout, handle=None)
