"""Priority search: several candidates side by side, a bounded memory of the good ones, the best of them in force.

What a candidate is worth follows from its scores (`candidates.py`). Which candidates are explored, who stays in the
memory and who comes into force are methods that other searches replace (`searches.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, get_args

from msgspec import to_builtins
from msgspec.structs import replace

from aggregator.adapters.trace import TraceOptimizer
from aggregator.agents.parameters import overriding, read, write
from aggregator.cassettes.lineage import lineage
from aggregator.checks import check_finite, check_positive
from aggregator.errors import ConfigError
from aggregator.executors.local import AsyncExecutor
from aggregator.llm.budget import Budget
from aggregator.observing.observer import Watching
from aggregator.protocols import Gate, Logger, UpdateRule
from aggregator.records import Candidate, Decision, Failure, Proposal, Rollout, Sample, Values
from aggregator.training.batches import Dataset, samples
from aggregator.training.candidates import (
    compared,
    contributors,
    gain,
    mean_score,
    plain,
    upper_bound,
    with_scores,
)
from aggregator.training.checkpoints import CANDIDATES, candidates_in
from aggregator.training.context import Variant, current_step
from aggregator.training.evaluation import failures_of, mean
from aggregator.training.minibatch import Minibatch
from aggregator.training.parts import check_gate, check_optimizer, check_rule, decided, merged
from aggregator.training.rules import key_of
from aggregator.training.suggestions import typed
from aggregator.training.trainer import batchify, judged
from aggregator.training.updates import Update, as_proposal, settle, unread

Result = TypeVar("Result")
ScoreFunction = Literal["mean", "ucb"]
"""How candidates are ranked: by mean score, or by what the mean may still rise to."""


class PrioritySearch(Minibatch):
    """Keeps a memory of candidates, explores the best of them on each minibatch, and has the best one in force.

    A step runs the minibatch under the candidate in force and the best others of the memory, `num_candidates` in all,
    asks `num_proposals` new candidates of each, tries these out, and remembers the best `memory_size`. A candidate
    comes into force where it scores higher than the one in force on the instances that both were tried on, unless
    `gate` refuses it.

    New candidates are tried on the minibatch; with `validate_dataset` every candidate is tried once on that, and only
    those scores count. `validate_guide` judges these trials instead of the guide of `train`.

    Without `rule` the optimizer sees the whole minibatch of a candidate at once. With one, each instance proposes for
    itself, as in AggregatedUpdate, and the rule merges the proposals in `num_proposals` groups, each a new candidate.

    `score_function="ucb"` ranks by mean + ucb_exploration_constant * sqrt(ln(trials of all) / own trials), so that the
    little tried are explored too. Scores are expected in [0, 1]; for others scale the constant.
    """

    def __init__(
        self,
        agent: Any,
        optimizer: Any,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        *,
        num_candidates: int = 4,
        num_proposals: int = 1,
        memory_size: int = 16,
        score_function: ScoreFunction = "mean",
        ucb_exploration_constant: float = 1.0,
        validate_dataset: Dataset | None = None,
        validate_guide: Any = None,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        budget: Budget | None = None,
        max_concurrency: int = 64,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        super().__init__(
            agent,
            optimizer,
            use_asyncio,
            logger,
            rule=rule,
            gate=gate,
            budget=budget,
            max_concurrency=max_concurrency,
            seed=seed,
            observers=observers,
        )
        self.num_candidates = num_candidates
        self.num_proposals = num_proposals
        self.memory_size = memory_size
        self.score_function = score_function
        self.ucb_exploration_constant = ucb_exploration_constant
        self.validation: tuple[Sample, ...] = ()
        if validate_dataset is not None:
            self.validation = samples(validate_dataset, name="validate_dataset")
        self.validate_guide = validate_guide
        self.per_instance = rule is not None
        _check(self, rule, gate)

    def explore(self, in_force: Candidate, others: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates that this step explores, the best ones; the one in force is always among them."""
        return [in_force, *self.ranked(others)[: self.num_candidates - 1]]

    def exploit(
        self, in_force: Candidate, explored: Sequence[Candidate], made: Sequence[Candidate]
    ) -> tuple[Candidate | None, Decision]:
        """Return the best candidate by what this step found out, and whether it comes into force.

        Where none is better the best new one is returned with its refusal, so that the optimizer is told of it.
        """
        better = [candidate for candidate in (*explored, *made) if gain(in_force, candidate) > 0]
        best = max(better or made, key=partial(gain, in_force), default=None)
        if best is None:
            return None, Decision(accepted=False, reason="no new candidate was proposed")
        return best, compared(in_force, best)

    def keep(self, in_force: Candidate, others: Sequence[Candidate]) -> list[Candidate]:
        """Return what is remembered, the best candidates; the one in force is always among them."""
        return [in_force, *self.ranked(others)[: self.memory_size - 1]]

    def due(self, explored: Sequence[Candidate], made: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates to try out; what the minibatch has shown of the explored ones is not run again."""
        return list(made) if self._minibatch_counts else [*explored, *made]

    def ranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return candidates from the best to the worst by the score function; of equal ones the newer comes first."""
        trials = sum(candidate.trials for candidate in candidates)

        def priority(candidate: Candidate) -> float:
            if self.score_function == "mean":
                return mean_score(candidate)
            return upper_bound(candidate, trials, self.ucb_exploration_constant)

        return sorted(candidates, key=lambda candidate: (-priority(candidate), -candidate.step))

    def variants(self) -> Sequence[Variant]:
        """Return the values of each candidate that this step explores."""
        in_force, *others = self._explored(self._memory())
        return [Variant(place=_place(in_force)), *map(_overlay, others)]

    async def aforward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
        """Run the agent on one instance and judge the output; with a rule, also ask what this instance proposes."""
        if self.per_instance:
            return await super().aforward(agent, x, guide, info, verbose)
        return await self.observe(agent, x, guide, info, verbose)

    async def aupdate(self, outputs: Sequence[Any], verbose: bool | str = False) -> Update:
        """Ask for new candidates, try them out, put the best into force, and remember the good ones."""
        memory = self._memory()
        explored = self._explored(memory)
        size = len(outputs) // len(explored)
        runs = [outputs[i * size : (i + 1) * size] for i in range(len(explored))]
        # new candidates
        asked = [(candidate, run, i) for candidate, run in zip(explored, runs, strict=True) for i in self._asks(run)]
        proposals = await _map(self._propose_for, asked)
        made, unusable = _made([candidate for candidate, _, _ in asked], proposals, memory)
        # their scores
        tried, lost = await self._try_out(explored, made, runs)
        in_force, explored, made = tried[0], tried[1 : len(explored)], tried[len(explored) :]
        # the best of them
        best, decision = self.exploit(in_force, explored, made)
        update = await self._install(best, decision)
        # what is remembered
        known = {candidate.id: candidate for candidate in (*memory, *tried)}
        now = best if best is not None and update.decision.accepted else in_force
        kept = self.keep(now, _without(now, known.values()))
        current_step().notes[CANDIDATES] = to_builtins([now, *_without(now, kept)])
        return replace(
            update,
            score=mean([as_proposal(output).score for output in runs[0]]),
            proposals=sum(bool(proposal.values) for proposal in proposals),
            contributors=() if best is None else contributors(best, in_force, known.values()),
            failures=(*unusable, *lost),
        )

    def _memory(self) -> list[Candidate]:
        """Return what is remembered, the candidate in force first: in a new run the agent's own values."""
        step = current_step()
        if step.executor is None:
            raise ConfigError(f"expected {type(self).__name__}.update to be called by train, where its memory is kept")
        values = plain(read(step.parameters))
        found = candidates_in(step.notes)
        at = next((i for i, candidate in enumerate(found) if key_of(candidate.values) == key_of(values)), None)
        in_force = Candidate(id=f"{step.step}.0", values=values, step=step.step) if at is None else found.pop(at)
        return [in_force, *found]

    def _explored(self, memory: Sequence[Candidate]) -> list[Candidate]:
        in_force, *others = memory
        return [in_force, *_without(in_force, self.explore(in_force, others))]

    def _asks(self, run: Sequence[Any]) -> range:
        """Number the candidates to make from one candidate's run; there are no more groups than instances."""
        return range(min(self.num_proposals, len(run)) if self.per_instance else self.num_proposals)

    async def _propose_for(self, candidate: Candidate, run: Sequence[Any], i: int) -> Proposal:
        """Return one proposal from what one candidate did on the minibatch."""
        step = current_step()
        with _overlay(candidate).laid_over(step.parameters), lineage(f"proposal={i}"):
            if self.per_instance:
                group = [as_proposal(output) for output in run[i :: self.num_proposals]]
                return settle(await merged(self.rule, read(step.parameters), group, stepsize=step.stepsize))
            seen = judged(run)
            proposal = await self.propose(batchify(seen)) if seen else Proposal()
            return replace(proposal, sample_ids=tuple(output.sample_id for output in seen))

    @property
    def _minibatch_counts(self) -> bool:
        """Whether the minibatch's own scores are those that candidates are compared by."""
        return not self.validation and self.validate_guide is None

    async def _try_out(
        self, explored: Sequence[Candidate], made: Sequence[Candidate], runs: Sequence[Sequence[Any]]
    ) -> tuple[list[Candidate], list[Failure]]:
        """Return all candidates with the scores that this step adds, and what failed on the way."""
        batch = current_step().samples
        if self._minibatch_counts:
            explored = [_with_run(candidate, batch, run) for candidate, run in zip(explored, runs, strict=True)]
        trials = [
            (candidate, sample)
            for candidate in self.due(explored, made)
            for sample in self.validation or batch
            if str(sample.id) not in candidate.scores
        ]
        rollouts = await _map(self._try, trials)
        scores: dict[str, list[tuple[int, float | None]]] = {}
        for (candidate, sample), rollout in zip(trials, rollouts, strict=True):
            scores.setdefault(candidate.id, []).append((sample.id, rollout.score))
        tried = [with_scores(candidate, scores.get(candidate.id, ())) for candidate in (*explored, *made)]
        return tried, [replace(record, stage="evaluation") for record in failures_of(rollouts)]

    async def _try(self, candidate: Candidate, sample: Sample) -> Rollout:
        place = f"validate/{_place(candidate)}"
        (rollout,) = await current_step().observe(candidate.values, [sample], place, self.validate_guide)
        return rollout

    async def _install(self, best: Candidate | None, decision: Decision) -> Update:
        """Put the best candidate into force unless the gate refuses it."""
        if best is None:
            return Update(decision=decision)
        step = current_step()
        before, after = read(step.parameters), _read_under(best.values)
        if decision.accepted:
            verdict = await decided(step.gate or self.gate, before, after, step.samples)
            decision = decision if verdict.accepted else verdict
        values = {name: value for name, value in after.items() if value != before[name]}
        if decision.accepted:
            write(step.parameters, values)
        return Update(values=values, decision=decision, reasoning=best.reasoning)


def _check(search: PrioritySearch, rule: Any, gate: Any) -> None:
    """Raise ConfigError for what cannot be meant."""
    for name in ("num_candidates", "num_proposals", "memory_size"):
        check_positive(name, getattr(search, name))
    if search.memory_size < search.num_candidates:
        raise ConfigError(
            f"expected memory_size of at least num_candidates={search.num_candidates}, which are explored from it, "
            f"got {search.memory_size}"
        )
    if search.score_function not in get_args(ScoreFunction):
        raise ConfigError(f"expected score_function 'mean' or 'ucb', got {search.score_function!r}")
    check_finite("ucb_exploration_constant", search.ucb_exploration_constant, least=0)
    if rule is not None:
        check_rule(rule)
    elif isinstance(search.optimizer, TraceOptimizer):
        raise ConfigError("expected rule= beside an optimizer of Trace, which takes feedback on one instance at a time")
    if gate is not None:
        check_gate(gate)
    if all(getattr(type(search), name) is getattr(PrioritySearch, name) for name in ("forward", "aforward", "propose")):
        check_optimizer(search.optimizer)


def _place(candidate: Candidate) -> str:
    return f"candidate={candidate.id}"


def _without(candidate: Candidate, others: Iterable[Candidate]) -> list[Candidate]:
    return [other for other in others if other.id != candidate.id]


def _overlay(candidate: Candidate) -> Variant:
    return Variant(place=_place(candidate), values=candidate.values)


def _read_under(values: Values) -> Values:
    """Return values as the parameters have them, each in its own type."""
    parameters = current_step().parameters
    with overriding(parameters, values):
        return read(parameters)


def _with_run(candidate: Candidate, batch: Sequence[Sample], run: Sequence[Any]) -> Candidate:
    scores = [as_proposal(output).score for output in run]
    return with_scores(candidate, zip([sample.id for sample in batch], scores, strict=True))


def _made(
    parents: Sequence[Candidate], proposals: Sequence[Proposal], memory: Sequence[Candidate]
) -> tuple[list[Candidate], list[Failure]]:
    """Return the candidates that are new, in the order of their proposals, and what could not be used."""
    step = current_step()
    known = {key_of(candidate.values) for candidate in memory}
    made: list[Candidate] = []
    failures: list[Failure] = []
    for parent, proposal in zip(parents, proposals, strict=True):
        checked, refused = typed(proposal.values, step.parameters)
        failures += proposal.failures or unread("proposal", proposal.error, proposal.sample_id, *refused.values())
        values = plain(_read_under({**parent.values, **checked}))
        if key_of(values) not in known:
            known.add(key_of(values))
            made.append(
                Candidate(
                    id=f"{step.step}.{len(made) + 1}",
                    values=values,
                    parent=parent.id,
                    step=step.step,
                    reasoning=proposal.reasoning,
                    sample_ids=proposal.sample_ids,
                )
            )
    return made, failures


async def _map(work: Callable[..., Awaitable[Result]], jobs: Sequence[tuple[Any, ...]]) -> list[Result]:
    """Return `[await work(*job) for job in jobs]`, computed at the concurrency of the run."""
    executor = current_step().executor or AsyncExecutor(1)
    return await executor.finish(lambda job: work(*job), jobs)
