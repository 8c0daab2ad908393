"""The arguments of `train`, checked before the first call is paid for, and an estimate of what the run would spend.

`Plan` holds the arguments; `RunPlan` counts rollouts, calls by role and the share of evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from msgspec import Struct

from aggregator.agents.parameters import ParameterNode
from aggregator.checks import check_count, check_positive, is_finite
from aggregator.errors import ConfigError
from aggregator.guides.calling import check_guide, declared_limit
from aggregator.llm.ledger import total_by_role
from aggregator.records import Kept, Rollout, Sample, Usage, Values
from aggregator.text import shorten, show_count
from aggregator.training.batches import minibatches
from aggregator.training.checkpoints import AGENT_CODE, CHECKPOINT, COMPARED, JOURNAL
from aggregator.training.gates import cost_of
from aggregator.training.identity import REVISION, code_of, digest, identity_of, models_in
from aggregator.training.schedules import Schedule
from aggregator.training.step import Gate, Search

# ---- the plan


class Plan(Struct, frozen=True, kw_only=True):
    """The checked arguments of one `train`."""

    guide: Any
    train: tuple[Sample, ...]
    test: tuple[Sample, ...] = ()
    stepsize: Schedule
    num_epochs: int = 1
    batch_size: int = 1
    eval_frequency: int = 1
    log_frequency: int = 0
    save_frequency: int = 0
    save_path: str = ""
    min_score: float | None = None
    verbose: bool | str = False
    max_concurrency: int = 64
    max_failure_ratio: float = 0.5
    seed: int = 0
    run_dir: Path | None = None
    resume: bool = False
    skip: tuple[int, ...] = ()
    validation: tuple[Sample, ...] = ()
    keep: Kept = "last"
    skip_from: float | None = None
    repeats: int = 1
    stops: tuple[Any, ...] = ()
    instance_timeout: float | None = None

    def schedule(self) -> list[Turn]:
        """Return every step of the run, in order."""
        batches = [
            (epoch, batch, ids)
            for epoch in range(self.num_epochs)
            for batch, ids in enumerate(minibatches(len(self.train), self.batch_size, seed=self.seed, epoch=epoch))
        ]
        return [
            Turn(
                step=step,
                epoch=epoch,
                batch=batch,
                samples=tuple(self.train[i] for i in ids if i not in self.skip),
                stepsize=self.stepsize(step, len(batches)),
            )
            for step, (epoch, batch, ids) in enumerate(batches)
        ]

    def evaluates_at(self, steps: int, total: int) -> bool:
        """Return True if the test set is due after this number of steps.

        Before the first, at the frequency, and at the end.
        """
        return bool(self.test) and self.eval_frequency > 0 and (steps % self.eval_frequency == 0 or steps == total)

    def validates_at(self, steps: int, total: int) -> bool:
        """Return True if the validation set is due: like the test set, and at both ends if that is never evaluated."""
        every = self.eval_frequency or max(total, 1)
        return bool(self.validation) and (steps % every == 0 or steps == total)


class Turn(Struct, frozen=True, kw_only=True):
    """One step's place in the run, and its samples."""

    step: int
    epoch: int
    batch: int
    samples: tuple[Sample, ...]
    stepsize: float


# ---- checking arguments


def check(plan: Plan) -> Plan:
    """Return the plan, or raise ConfigError for invalid combinations."""
    for name in ("batch_size", "max_concurrency", "repeats"):
        check_positive(name, getattr(plan, name))
    for name in ("num_epochs", "eval_frequency", "log_frequency", "save_frequency"):
        check_count(name, getattr(plan, name), meaning="0 is off")
    if not is_finite(plan.max_failure_ratio) or not 0 <= plan.max_failure_ratio <= 1:
        raise ConfigError(f"Expected max_failure_ratio in [0, 1], got {plan.max_failure_ratio!r}")
    if plan.min_score is not None and not is_finite(plan.min_score):
        raise ConfigError(f"Expected min_score to be a finite number, or None for no score, got {plan.min_score!r}")
    if plan.instance_timeout is not None and not (is_finite(plan.instance_timeout) and plan.instance_timeout > 0):
        raise ConfigError(
            f"Expected instance_timeout in seconds above 0, or None for no limit, got {plan.instance_timeout!r}"
        )
    check_guide(plan.guide)
    best = getattr(plan.guide, "max_score", None) if plan.skip_from is None else plan.skip_from
    if plan.min_score is not None and isinstance(best, int | float) and plan.min_score > best:
        raise ConfigError(
            f"Expected min_score, the score of a failure, of at most the maximum {best:g}, got {plan.min_score:g}"
        )
    if plan.run_dir is None and plan.resume:
        raise ConfigError("Expected run_dir with resume=True, got None; name the folder of the run to continue")
    files = () if plan.run_dir is None or plan.resume else (plan.run_dir / CHECKPOINT, plan.run_dir / JOURNAL)
    if any(file.exists() for file in files):
        raise ConfigError(
            f"Expected a run_dir without a run, got {plan.run_dir}, which holds a run already; "
            "give resume=True to continue it, or another run_dir"
        )
    return plan


def check_skipped(skipped: Any, size: int) -> tuple[int, ...]:
    """Return the ids of the samples to leave out, in order; raises ConfigError for ids outside `size` samples."""
    ids: list[Any] = list(skipped) if isinstance(skipped, list | tuple | set | frozenset | range) else [skipped]
    wrong = [one for one in ids if type(one) is not int or not 0 <= one < size]
    if wrong or len(set(ids)) == size:
        raise ConfigError(
            f"Expected skip_samples=[...] with ids of some of the {size} training samples, which count from 0, got "
            f"{shorten(skipped)}"
        )
    return tuple(sorted(set(ids)))


def check_perfect(skip_perfect: Any, max_score: Any, guide: Any) -> float | None:
    """Return the score from which an instance gets no proposal, or None if each gets one.

    It is `max_score`, or the guide's `max_score`, and never the highest score observed. Raises ConfigError for invalid
    arguments, and for `skip_perfect` without a maximum.
    """
    if type(skip_perfect) is not bool:
        raise ConfigError(f"Expected skip_perfect=True or False, got {skip_perfect!r}")
    if max_score is not None and not is_finite(max_score):
        raise ConfigError(f"Expected max_score to be a finite number or None, got {max_score!r}")
    if not skip_perfect:
        return None
    best = declared_limit(guide, "max_score") if max_score is None else float(max_score)
    if best is None:
        raise ConfigError(
            "Expected a declared maximum with skip_perfect=True, got none; give max_score=1.0 to the trainer, or set "
            "max_score on the guide"
        )
    return best


def check_saving(plan: Plan, agent: Any) -> None:
    """Raise ConfigError if the agent should be saved and cannot be; otherwise this would fail after the first steps."""
    if plan.save_frequency and not callable(getattr(agent, "save", None)):
        raise ConfigError(
            f"Expected an agent with save(path) with save_frequency={plan.save_frequency}, got {agent!r}; "
            "derive it from Module, or give run_dir instead"
        )


def as_run_dir(given: Any) -> Path | None:
    """Return the run's folder; raises ConfigError for an invalid path, including ""."""
    if given is None:
        return None
    if not isinstance(given, str | PathLike) or not str(given):
        raise ConfigError(f"Expected run_dir to be the path of a folder, or None, got {given!r}")
    folder = Path(given)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"Expected run_dir to be a folder, got the file {folder}")
    return folder


def fingerprint(plan: Plan, trainer: Any, initial: Values, gate: Any, rule: Any) -> dict[str, str]:
    """Return what must be equal for a run to be resumed, each as a short hash.

    Only num_epochs may grow, and the code of the agent may be mended.
    """
    parts = {
        "guide": plan.guide,
        "gate": gate,
        "rule": rule,
        "search": trainer.search,
        "checks": list(trainer.checks),
        "optimizer": trainer.optimizer,
        "models": models_in(trainer.agent),
        "stepsize schedule": plan.stepsize,
    }
    return {
        **{name: digest(identity_of(part)) for name, part in parts.items()},
        COMPARED: REVISION,
        AGENT_CODE: digest(code_of(trainer.agent)),
        "trainer": type(trainer).__qualname__,
        "train_dataset": digest(plan.train),
        "test_dataset": digest(plan.test),
        "validate_dataset": digest(plan.validation),
        "keep": plan.keep,
        "agent": digest([type(trainer.agent).__qualname__, sorted(initial)]),
        "initial parameters": digest(initial),
        "seed": str(plan.seed),
        "batch_size": str(plan.batch_size),
        "num_epochs": str(plan.num_epochs),
        "min_score": str(plan.min_score),
        "skip_perfect": str(plan.skip_from),
        "repeats": str(plan.repeats),
        "eval_frequency": str(plan.eval_frequency),
        **({} if plan.instance_timeout is None else {"instance_timeout": f"{plan.instance_timeout:g}"}),
    }


def choose_parameters(
    own: Sequence[ParameterNode[Any]], named: Sequence[Any] | None = None
) -> list[ParameterNode[Any]]:
    """Return the agent's parameters that may change: those that the optimizer names, or all.

    Raises ConfigError if there is none, if two have one name, or if one is not the agent's.
    """
    chosen = list(own)
    if named is not None:
        origins = {id(getattr(one, "origin", one)): one for one in own} | {id(one): one for one in own}
        strange = [parameter for parameter in named if id(parameter) not in origins]
        if strange:
            raise ConfigError(
                f"Expected the optimizer's parameters to be the agent's own ({', '.join(one.name for one in own)}), "
                f"got {strange[0]!r}; name them as in LLMOptimizer(parameters=[agent.instruction])"
            )
        chosen = [origins[id(parameter)] for parameter in named]
    chosen = [parameter for parameter in chosen if parameter.trainable]
    if not chosen:
        raise ConfigError(
            "Expected an agent with a trainable parameter, got none; give it an attribute ParameterNode(value), "
            "or an operation with @bundle(trainable=True)"
        )
    names = [parameter.name for parameter in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"Expected different names of parameters, got {twice[0]!r} twice; name them with ParameterNode(name=...)"
        )
    return chosen


MOSTLY = 0.5
"""A plan warns if evaluation has a larger share: more is spent on measuring than on learning."""


# ---- counting calls


class RunPlan(Struct, frozen=True, kw_only=True):
    """What a run would do. Counts are upper bounds, except for repairs and retries, which no plan can know.

    `rollouts` counts runs of the agent by purpose: "training", "evaluation" (test and validation set, baselines
    included) and "gate" (trials of gate and search). `calls` counts calls to models by role; "agent" and "guide" assume
    one call a rollout unless `sampled` rollouts were run to measure it. `evaluation_share` is the share of rollouts
    that is not training. `usage` extrapolates the sampled rollouts' usage by role; it includes neither optimizer nor
    aggregator.
    """

    steps: int
    rollouts: Mapping[str, int]
    calls: Mapping[str, int]
    sampled: int = 0
    usage: Mapping[str, Usage] = {}
    notes: Sequence[str] = ()

    @property
    def evaluation_share(self) -> float:
        """The share of rollouts that measure and do not train."""
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
        total = show_count(sum(self.rollouts.values()), "rollout")
        lines = [f"{show_count(self.steps, 'step')}, {total} ({rollouts}), {share}"]
        lines.append(f"calls, at most: {calls}")
        for role, usage in self.usage.items():
            cost = "" if usage.cost is None else f", {usage.cost:.4g} USD"
            lines.append(f"{role}: about {usage.total_tokens or 0} tokens{cost}, from {self.sampled} rollouts")
        return "\n".join([*lines, *self.notes])


def count_run(
    plan: Plan, *, rule: Any, search: Search, gate: Gate, optimizer: Any, propose_per: str = "instance"
) -> RunPlan:
    """Return the maximum that a run by this plan would do.

    Parts declare what they cost: a gate by `cost` (see `gates.costing`), an optimizer by `calls_per_proposal`, a rule
    by `calls_per_merge`, a guide by `calls_per_rollout`. Without a declaration the counts are none, one, none and none.
    A search, a rule and an optimizer's `select` that run what they compare have `tries = True`; other searches than
    those with `is_single` do so by default.
    """
    turns = plan.schedule()
    explored = getattr(search, "num_candidates", 1)
    tried = len(getattr(search, "validation", ()))
    cost = cost_of(gate)
    tries = getattr(search, "tries", not getattr(search, "is_single", False))
    own_guide = getattr(search, "guide", None) is not None
    asked = getattr(optimizer, "calls_per_proposal", 1)
    selects = getattr(getattr(optimizer, "select", None), "tries", False) and asked > 1
    training = gates = proposals = merges = 0
    for turn in turns:
        size = len(turn.samples)
        training += size * explored
        made = (search.proposals if size and propose_per == "batch" else min(search.proposals, size)) * explored
        proposals += made if propose_per == "batch" else size * explored
        merges += made if propose_per == "instance" and made and size // made * explored > 1 else 0
        gates += cost.per_instance * size + cost.per_step
        if tries:  # the explored ones ran on the minibatch, with the guide of the run
            gates += made * (tried or size) + (explored * size if own_guide and not tried else 0)
        if getattr(rule, "tries", False) and propose_per == "instance":
            gates += made * size + size * explored * size
        if selects:
            gates += size * explored * (1 + asked) * (made if propose_per == "batch" else 1)
    ends = range(len(turns) + 1)
    tested = sum(plan.evaluates_at(steps, len(turns)) for steps in ends) * len(plan.test)
    validated = sum(plan.validates_at(steps, len(turns)) for steps in ends) * len(plan.validation)
    gates += cost.once + (explored * tried if tries else 0)
    rollouts = {"training": training, "evaluation": tested + validated, "gate": gates if turns else 0}
    rollouts = {name: count * plan.repeats for name, count in rollouts.items()}
    every = sum(rollouts.values())
    calls = {
        "agent": every,
        "optimizer": proposals * asked,
        "aggregator": merges * getattr(rule, "calls_per_merge", 0),
        "guide": every * getattr(plan.guide, "calls_per_rollout", 0),
    }
    return RunPlan(steps=len(turns), rollouts=rollouts, calls=calls, notes=_notes(plan, rule, rollouts, merges))


def _notes(plan: Plan, rule: Any, rollouts: Mapping[str, int], merges: int) -> tuple[str, ...]:
    notes = []
    if getattr(rule, "calls_per_merge", 0) and not merges:
        few = plan.batch_size > 1 and len(plan.train) < 2  # then a larger batch_size changes nothing
        cause = f"{len(plan.train)} training instance" if few else f"batch_size={plan.batch_size}"
        remedy = "give more data" if few else "give a larger batch_size"
        notes.append(f"the aggregator is idle: {cause} gives one proposal a step, so nothing is merged; {remedy}")
    every = sum(rollouts.values())
    names = [name for name, data in (("test", plan.test), ("validation", plan.validation)) if data]
    sets = f"{' and '.join(names)} {'sets' if len(names) > 1 else 'set'}"
    if every and rollouts["evaluation"] / every > MOSTLY:
        notes.append(
            f"{rollouts['evaluation']} of {every} rollouts evaluate the {sets}; give a larger eval_frequency than "
            f"{plan.eval_frequency}, or a smaller {sets}"
        )
    return tuple(notes)


def with_sample(plan: RunPlan, rollouts: Sequence[Rollout], usage: Mapping[str, Usage]) -> RunPlan:
    """Return the plan with the usage of some rollouts, extrapolated to all of its rollouts."""
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
