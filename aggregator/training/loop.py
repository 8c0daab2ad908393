"""One run from its first evaluation to its last step: order, lineage, checkpoints, and what ends it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

from msgspec.structs import replace

from aggregator.agents.modules import Module
from aggregator.agents.parameters import read, write
from aggregator.cassettes.lineage import current_lineage, lineage
from aggregator.checks import is_finite
from aggregator.errors import (
    BudgetExceededError,
    ConfigError,
    LLMError,
    ParameterError,
    TrainingError,
    ends_run,
    is_own,
)
from aggregator.executors.local import AsyncExecutor
from aggregator.llm.budget import Budget
from aggregator.llm.ledger import collecting, total_by_role
from aggregator.observing.configuring import Events
from aggregator.observing.console import ConsoleLogger
from aggregator.observing.observer import Observer, Watching, as_observers, from_logger, notify, notify_failed
from aggregator.observing.progress import ProgressBar, redraws
from aggregator.protocols import Gate, Logger
from aggregator.records import (
    Decision,
    Evaluation,
    Failure,
    FullStepReport,
    Proposal,
    Rollout,
    RunInfo,
    Sample,
    StepReport,
    TrainingResult,
    Values,
)
from aggregator.training import checkpoints
from aggregator.training.context import StepContext, Variant, step_context
from aggregator.training.evaluation import failures_of, mean, score_values
from aggregator.training.failures import failure, is_lost, root_of
from aggregator.training.parts import name_of
from aggregator.training.plan import Plan, Turn, check_saving, fingerprint
from aggregator.training.surroundings import claimed, counted_in, journal, miss_raised, resumed
from aggregator.training.updates import Update, as_proposal, score_of

FEWEST_JUDGED = 4
"""max_failure_ratio is held against this many instances at least: one lost call does not end a run of batches of 1."""


class Trainer(Protocol):
    """What the loop asks of a trainer."""

    agent: Any
    logger: Logger | None
    observers: Sequence[Watching] | None

    def parameters(self) -> list[Any]:
        """Return the parameters that training may change."""
        ...

    def variants(self) -> Sequence[Variant]:
        """Return the values that each sample of a step is run under, those in force first."""
        ...

    async def call_forward(self, sample: Sample, plan: Plan) -> Any:
        """Return what one instance proposes."""
        ...

    async def call_update(self, outputs: Sequence[Any], plan: Plan) -> Any:
        """Apply what a minibatch proposes."""
        ...


async def run(trainer: Trainer, plan: Plan, gate: Gate, budget: Budget | None = None) -> TrainingResult:
    """Train by the plan; every way out leaves the partial result on disk or on the error."""
    check_saving(plan, trainer.agent)
    parameters = trainer.parameters()
    initial = read(parameters)
    with claimed(plan):
        marks = {} if plan.run_dir is None else fingerprint(plan, trainer, initial)
        state = resumed(plan, marks) or checkpoints.RunState(initial=initial, values=initial)
        write(parameters, state.values)
        async with AsyncExecutor(plan.max_concurrency) as executor:
            course = _Course(trainer, plan, gate, executor, parameters, marks, state)
            try:
                with journal(plan, state), counted_in(budget), lineage("train"):
                    await notify(course.observers, "started", run_info(trainer, plan, gate, state))
                    await course.follow()
            except BaseException as error:
                ended = course.broken_off(error)
                await notify_failed(course.observers, ended)
                if ended is error:
                    raise
                raise ended from error
        result = course.finished()
        await notify(course.observers, "finished", result)
        return result


class _Course:
    """A run under way; `state` is where it stands between two steps, `pending` a step whose test set is still due."""

    def __init__(
        self,
        trainer: Trainer,
        plan: Plan,
        gate: Gate,
        executor: AsyncExecutor,
        parameters: Sequence[Any],
        marks: Any,
        state: checkpoints.RunState,
    ) -> None:
        self.trainer = trainer
        self.plan = plan
        self.gate = gate
        self.executor = executor
        self.parameters = parameters
        self.marks = marks
        self.state = state
        self.pending: tuple[StepReport, ...] = ()
        self.notes: dict[str, Any] = {}
        self.observers = _watchers(trainer, plan)

    async def follow(self) -> None:
        """Take every turn that is still due."""
        turns = self.plan.schedule()
        with miss_raised():
            if self.state.steps == 0 and not self.state.evaluations:
                baseline = await self._evaluate(0, len(turns))
                self.state = self._with(baseline)
                if baseline is not None:
                    await notify(self.observers, "evaluation", baseline)
        for turn in turns[self.state.steps :]:
            with miss_raised():
                full = await self.step(turn)
                self.pending = (full.slim(),)
                evaluation = await self._evaluate(turn.step + 1, len(turns))
            full = replace(full, test_score=evaluation and evaluation.score)
            self._finish(full.slim(), evaluation)
            if evaluation is not None:
                await notify(self.observers, "evaluation", evaluation)
            await notify(self.observers, "step", full)

    def _finish(self, report: StepReport, evaluation: Evaluation | None) -> None:
        """Make a step part of the state, in memory and on disk."""
        self.state = replace(
            self._with(evaluation),
            values=read(self.parameters),
            steps=report.step + 1,
            history=(*self.state.history, report),
            notes=self.notes,
            broken_off=False,
        )
        self.pending = ()
        if self.plan.run_dir is not None:
            checkpoints.save(self.plan.run_dir, self.state, self.marks)
        frequency = self.plan.save_frequency
        if frequency and self.state.steps % frequency == 0:
            self.trainer.agent.save(self.plan.save_path)

    async def step(self, turn: Turn) -> FullStepReport:
        """Take one turn: proposals for every sample under every variant, then the update."""
        self.notes = dict(self.state.notes)
        context = self._context(turn)
        with lineage(f"epoch={turn.epoch}", f"batch={turn.batch}"), collecting() as ledger, step_context(context):
            with miss_raised():
                runs = [(variant, sample) for variant in self.trainer.variants() for sample in turn.samples]
                outputs = await self._propose(runs, context)
            scores = tuple(score_of(output) for output in outputs[: len(turn.samples)])
            failures = [record for output in outputs for record in getattr(output, "failures", ())]
            self._check_failures(turn, outputs)
            before = read(self.parameters)
            with step_context(replace(context, scores=scores)):
                update = await self.trainer.call_update(outputs, self.plan)
            after = read(self.parameters)
            lineages = [_place(variant, sample) for variant, sample in runs]
        report = _report(turn, outputs, scores, failures, update, changed(before, after), ledger.totals())
        return replace(report, all_proposals=tuple(map(_proposal_in, outputs)), lineages=tuple(lineages))

    def _context(self, turn: Turn) -> StepContext:
        async def observe(values: Values, samples: Sequence[Sample], place: str, guide: Any = None) -> list[Rollout]:
            with lineage(place):
                return await self._score(values, samples, guide)

        return StepContext(
            stepsize=turn.stepsize,
            epoch=turn.epoch,
            step=turn.step,
            samples=turn.samples,
            parameters=self.parameters,
            history=self.state.history,
            min_score=self.plan.min_score,
            seed=self.plan.seed,
            observe=observe,
            executor=self.executor,
            gate=self.gate,
            notes=self.notes,
        )

    async def _score(self, values: Values, samples: Sequence[Sample], guide: Any = None) -> list[Rollout]:
        return await score_values(
            self.trainer.agent,
            guide or self.plan.guide,
            self.parameters,
            values,
            samples,
            executor=self.executor,
            min_score=self.plan.min_score,
        )

    async def _propose(self, runs: Sequence[tuple[Variant, Sample]], context: StepContext) -> list[Any]:
        """Return what `forward` gave for each sample, variant by variant; errors that end the run are raised."""

        async def one(place: tuple[Variant, Sample]) -> Any:
            variant, sample = place
            mine = replace(context, sample=sample)
            try:
                with variant.laid_over(self.parameters), lineage(f"sample={sample.id}"), step_context(mine):
                    output = await self.trainer.call_forward(sample, self.plan)
            except BaseException as error:  # an overridden forward may raise anything: one instance is lost
                if not is_own(error):
                    raise
                cause = root_of(error)
                if ends_run(cause):
                    raise cause  # noqa: B904 - what it was raised in adds nothing
                return _lost(cause, sample)
            return replace(output, sample_ids=(sample.id,)) if isinstance(output, Proposal) else output

        return await self.executor.finish(one, runs)

    def _check_failures(self, turn: Turn, outputs: Sequence[Any]) -> None:
        """Stop where too many instances were lost: of this batch, and where it is small of the latest ones."""
        found = [[record for record in getattr(output, "failures", ()) if is_lost(record)] for output in outputs]
        lost = [record for records in found for record in records]
        seen, gone = len(outputs), sum(map(bool, found))
        for report in reversed(self.state.history):
            if seen >= FEWEST_JUDGED:
                break
            seen += len(report.sample_ids)
            gone += len({record.sample_id for record in report.failures if is_lost(record)})
        if lost and gone / max(seen, FEWEST_JUDGED) > self.plan.max_failure_ratio:
            raise TrainingError(
                f"{gone} of {seen} instances up to step {turn.step} were lost, more than "
                f"max_failure_ratio={self.plan.max_failure_ratio:g} allows; "
                f"the latest: {lost[0].error}: {lost[0].message}"
            )

    async def _evaluate(self, steps: int, total: int) -> Evaluation | None:
        """Score the test set where it is due."""
        if not self.plan.evaluates_at(steps, total):
            return None
        with lineage("evaluate", f"step={steps}"), collecting() as ledger:
            runs = await self._score(read(self.parameters), self.plan.test)
        scores = tuple(run.score for run in runs)
        return Evaluation(
            step=steps, score=mean(scores), scores=scores, failures=failures_of(runs), usage=ledger.totals()
        )

    def _with(self, evaluation: Evaluation | None) -> checkpoints.RunState:
        """Return the state with one more evaluation, and the best values seen."""
        if evaluation is None:
            return self.state
        state = replace(self.state, evaluations=(*self.state.evaluations, evaluation))
        score, best = evaluation.score, state.best_score
        if score is None or (best is not None and score <= best):
            return state
        return replace(state, best=read(self.parameters), best_score=score)

    def result(self) -> TrainingResult:
        """Return what the run has reached by now."""
        state = replace(self.state, history=(*self.state.history, *self.pending))
        return checkpoints.result_of(state, read(self.parameters))

    def finished(self) -> TrainingResult:
        """Return the whole result, and write it."""
        result = self.result()
        if self.plan.run_dir is not None:
            checkpoints.save_result(result, self.plan.run_dir / checkpoints.RESULT)
            if isinstance(self.trainer.agent, Module):
                self.trainer.agent.save(self.plan.run_dir / checkpoints.PARAMETERS, provenance=result.provenance)
        return result

    def broken_off(self, error: BaseException) -> BaseException:
        """Keep what was reached, on the error and on disk; return the error that tells of it."""
        if isinstance(error, LLMError):
            steps = self.state.steps + len(self.pending)
            error = TrainingError(f"the run ended after {steps} steps: {type(error).__name__}: {error}")
        if isinstance(error, BudgetExceededError | TrainingError):
            error.result = self.result()
        try:
            self.finished()
            if self.plan.run_dir is not None and isinstance(error, Exception):
                checkpoints.save(self.plan.run_dir, replace(self.state, broken_off=True), self.marks)
        except (TrainingError, ParameterError, OSError) as unsaved:
            error.add_note(f"{type(unsaved).__name__}: {unsaved}")
        return error


def _watchers(trainer: Trainer, plan: Plan) -> list[Observer]:
    """Return who watches the run: the events, the logger, and the user's observers or else a progress bar."""
    watchers: list[Observer] = [Events()]
    logger = trainer.logger or (ConsoleLogger() if plan.verbose else None)
    if logger is not None:
        watchers.append(from_logger(logger, plan.log_frequency))
    if trainer.observers is not None:
        watchers.extend(as_observers(trainer.observers))
    elif redraws(sys.stderr):
        watchers.append(ProgressBar())
    return watchers


def run_info(trainer: Trainer, plan: Plan, gate: Gate, state: checkpoints.RunState) -> RunInfo:
    """Return what a run is about to do."""
    return RunInfo(
        trainer=name_of(trainer),
        agent=name_of(trainer.agent),
        optimizer=name_of(getattr(trainer, "optimizer", None)),
        guide=name_of(plan.guide),
        rule=name_of(getattr(trainer, "rule", None)),
        gate=name_of(gate),
        parameters=state.values,
        seed=plan.seed,
        steps=len(plan.schedule()),
        num_epochs=plan.num_epochs,
        batch_size=plan.batch_size,
        train_samples=len(plan.train),
        test_samples=len(plan.test),
        finished_steps=state.steps,
        usage=total_by_role([*(report.usage for report in state.history), *(run.usage for run in state.evaluations)]),
    )


def changed(before: Values, after: Values) -> Values:
    """Return what differs, under its new value."""
    return {name: value for name, value in after.items() if value != before[name]}


def _place(variant: Variant, sample: Sample) -> str:
    return "/".join(part for part in (current_lineage(), variant.place, f"sample={sample.id}") if part)


def _proposal_in(output: Any) -> Proposal:
    """Return the proposal of one instance; an empty one if only an overridden `update` can read the output."""
    try:
        return as_proposal(output)
    except ConfigError:
        return Proposal()


def _lost(error: BaseException, sample: Sample) -> Proposal:
    record = failure("proposal", error, sample_id=sample.id)
    return Proposal(error=f"{record.error}: {record.message}", failures=(record,), sample_ids=(sample.id,))


def _report(
    turn: Turn,
    outputs: Sequence[Any],
    scores: tuple[float | None, ...],
    failures: Sequence[Failure],
    update: Any,
    written: Values,
    usage: Any,
) -> FullStepReport:
    """Make the one event of a step, also where an overridden `update` returned a score or nothing of use."""
    if not isinstance(update, Update):
        score = float(update) if is_finite(update) else mean(scores)
        decision = Decision(accepted=bool(written), reason="applied by update()")
        update = Update(values=written, decision=decision, score=score, proposals=len(outputs))
    more = (record for record in update.failures if record not in failures)  # a proposal carries them on
    return FullStepReport(
        epoch=turn.epoch,
        step=turn.step,
        sample_ids=tuple(sample.id for sample in turn.samples),
        scores=scores,
        score=update.score,
        decision=update.decision,
        update=update.values,
        reasoning=update.reasoning,
        proposals=update.proposals,
        contributors=update.contributors,
        failures=tuple(replace(record, epoch=turn.epoch, step=turn.step) for record in (*failures, *more)),
        usage=usage,
    )
