"""What a run would spend, counted before anything is run: rollouts, calls by role, the share of evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from aggregator.llm.ledger import total_by_role
from aggregator.records import Rollout, Usage
from aggregator.training.decisions import Gate, Search
from aggregator.training.gates import cost_of
from aggregator.training.merge import LLMMerge
from aggregator.training.plan import Plan

MOSTLY = 0.5
"""A share of evaluation above this is noted: more is spent on measuring than on learning."""


class RunPlan(Struct, frozen=True, kw_only=True):
    """What a run would do. Counts are upper bounds: repairs and retries excepted, which no plan can know.

    `rollouts` counts runs of the agent by purpose: "training", "evaluation" (the test set, the baseline included) and
    "gate" (what gate and search try out). `calls` counts calls to models by role; "agent" and "guide" assume one call a
    rollout unless `sampled` rollouts were run to measure it. `evaluation_share` is the share of rollouts that is not
    training. `usage` extrapolates what the sampled rollouts used, by role; it holds neither optimizer nor aggregator.
    """

    steps: int
    rollouts: Mapping[str, int]
    calls: Mapping[str, int]
    sampled: int = 0
    usage: Mapping[str, Usage] = {}
    notes: Sequence[str] = ()

    @property
    def evaluation_share(self) -> float:
        """The share of rollouts that measures and does not train."""
        every = sum(self.rollouts.values())
        return (every - self.rollouts["training"]) / every if every else 0.0

    @property
    def cost(self) -> float | None:
        """USD of all sampled roles together, extrapolated; None if a price is unknown or nothing was sampled."""
        costs = [usage.cost for usage in self.usage.values()]
        return None if not costs or None in costs else sum(cost for cost in costs if cost is not None)

    def __str__(self) -> str:
        rollouts = ", ".join(f"{count} {name}" for name, count in self.rollouts.items())
        calls = ", ".join(f"{count} {role}" for role, count in self.calls.items() if count)
        share = f"{self.evaluation_share:.0%} of them evaluation"
        lines = [f"{self.steps} steps, {sum(self.rollouts.values())} rollouts ({rollouts}), {share}"]
        lines.append(f"calls, at most: {calls}")
        for role, usage in self.usage.items():
            cost = "" if usage.cost is None else f", {usage.cost:.4g} USD"
            lines.append(f"{role}: about {usage.total_tokens or 0} tokens{cost}, from {self.sampled} rollouts")
        return "\n".join([*lines, *self.notes])


def count_run(plan: Plan, *, rule: Any, search: Search, gate: Gate, optimizer: Any) -> RunPlan:
    """Return what a run by this plan would do at most.

    Parts say what they cost: a gate by `cost` (see `gates.costing`), an optimizer by `calls_per_proposal`, a guide by
    `calls_per_rollout`. A part of your own that does not is counted as none, one and none.
    """
    turns = plan.schedule()
    explored = getattr(search, "num_candidates", 1)
    tried = len(getattr(search, "validation", ()))
    cost = cost_of(gate)
    single = bool(getattr(search, "is_single", False))
    training = gates = proposals = merges = 0
    for turn in turns:
        size = len(turn.samples)
        training += size * explored
        proposals += size * explored
        made = min(search.proposals, size) * explored
        merges += sum(size // made * explored > 1 for _ in range(made)) if made else 0
        gates += cost.per_instance * size + cost.per_step + (0 if single else made * (tried or size))
    due = sum(plan.evaluates_at(steps, len(turns)) for steps in range(len(turns) + 1))
    rollouts = {"training": training, "evaluation": due * len(plan.test), "gate": gates + cost.once if turns else 0}
    rollouts = {name: count * plan.repeats for name, count in rollouts.items()}
    every = sum(rollouts.values())
    calls = {
        "agent": every,
        "optimizer": proposals * getattr(optimizer, "calls_per_proposal", 1),
        "aggregator": merges if isinstance(rule, LLMMerge) else 0,
        "guide": every * getattr(plan.guide, "calls_per_rollout", 0),
    }
    return RunPlan(steps=len(turns), rollouts=rollouts, calls=calls, notes=_notes(plan, rule, rollouts, merges))


def _notes(plan: Plan, rule: Any, rollouts: Mapping[str, int], merges: int) -> tuple[str, ...]:
    notes = []
    if isinstance(rule, LLMMerge) and not merges:
        notes.append(
            f"the aggregator is idle: batch_size={plan.batch_size} gives one proposal a step, so nothing is merged; "
            "give a larger batch_size"
        )
    every = sum(rollouts.values())
    if every and rollouts["evaluation"] / every > MOSTLY:
        notes.append(
            f"{rollouts['evaluation']} of {every} rollouts evaluate the test set; give a larger eval_frequency than "
            f"{plan.eval_frequency}, or a smaller test set"
        )
    return tuple(notes)


def with_sample(plan: RunPlan, rollouts: Sequence[Rollout], usage: Mapping[str, Usage]) -> RunPlan:
    """Return the plan with what some rollouts used, extrapolated to all of its rollouts."""
    every = sum(plan.rollouts.values())
    scale = every / len(rollouts)
    scaled = {role: _scale(used, scale) for role, used in total_by_role([usage]).items()}
    calls = {**plan.calls, **{role: used.calls for role, used in scaled.items()}}
    note = (
        f"{len(rollouts)} rollouts were run to measure this; tokens and cost are those of agent and guide, without "
        "optimizer and aggregator"
    )
    return RunPlan(
        steps=plan.steps,
        rollouts=plan.rollouts,
        calls=calls,
        sampled=len(rollouts),
        usage=scaled,
        notes=(*plan.notes, note),
    )


def _scale(usage: Usage, by: float) -> Usage:
    def scaled(count: int | None) -> int | None:
        return None if count is None else round(count * by)

    return Usage(
        input_tokens=scaled(usage.input_tokens),
        output_tokens=scaled(usage.output_tokens),
        cached_tokens=scaled(usage.cached_tokens),
        reasoning_tokens=scaled(usage.reasoning_tokens),
        cost=None if usage.cost is None else usage.cost * by,
        calls=round(usage.calls * by),
    )
