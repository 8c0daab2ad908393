"""One run from its first evaluation to its last step: order, lineage, checkpoints, and its ends.

evaluate the test set -> for each turn: rollouts and proposals -> update -> evaluate -> checkpoint -> observers
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from copy import deepcopy
from functools import partial
from typing import Any, Protocol

from msgspec import to_builtins
from msgspec.structs import replace

from aggregator.agents.modules import Module, write_artefact
from aggregator.agents.parameters import ParameterNode, describe_type, overriding, read, values_of, write
from aggregator.cassettes.lineage import current_lineage, lineage
from aggregator.errors import LLMError, ParameterError, TrainingError
from aggregator.executors.local import LocalExecutor, finish
from aggregator.executors.work import record_failure
from aggregator.llm.budget import Budget
from aggregator.llm.ledger import collecting, total_by_role
from aggregator.llm.observed import apart
from aggregator.observing.configuring import Events
from aggregator.observing.observer import (
    ConsoleLogger,
    Observer,
    ProgressBar,
    Watching,
    as_observers,
    from_logger,
    notify,
    notify_failed,
    redraws,
)
from aggregator.portal import Branch
from aggregator.protocols import Agent, Executor, Logger
from aggregator.records import (
    Candidate,
    Evaluation,
    FullStepReport,
    Rollout,
    RolloutTask,
    RunInfo,
    StepReport,
    TrainingResult,
    Values,
)
from aggregator.training import checkpoints
from aggregator.training.checkpoints import (
    CANDIDATES,
    candidates_in,
    claim,
    count_in,
    open_journal,
    raise_misses,
)
from aggregator.training.evaluation import Evaluations, failures_of, is_lost, lowest_of, mean, run_again, scores_of
from aggregator.training.gates import apply_values, validate
from aggregator.training.identity import digest, identity_of
from aggregator.training.parts import as_json, check_candidates, check_code, name_of
from aggregator.training.plan import Plan, Turn, check_saving, fingerprint
from aggregator.training.rollouts import Arrive, Repeats, Rollouts, follow, is_bug, spare_bugs, warn_at_end
from aggregator.training.searches import plain, pool_of
from aggregator.training.step import (
    Check,
    Gate,
    Hooks,
    Instance,
    Place,
    Step,
    UpdateRule,
    at_place,
    call_hook,
    lose_instance,
    make_instance,
    read_only,
    read_output,
    use_values,
)
from aggregator.training.stops import Clock, Reached, decide, needs_clock
from aggregator.training.updates import (
    Explored,
    Parts,
    Update,
    as_update,
    changes_between,
    make_update,
    place_of,
    report_step,
    skip_satisfied,
    with_outputs,
    without,
)

FEWEST_JUDGED = 4
"""max_failure_ratio applies to at least this number of instances: one lost call does not end a run of batches of 1."""


class Trainer(Protocol):
    """What the loop needs from a trainer."""

    agent: Any
    optimizer: Any
    executor: Executor | None
    logger: Logger | None
    observers: Sequence[Watching] | None
    checks: Sequence[Check]

    def parameters(self) -> list[ParameterNode[Any]]:
        """Return the parameters that training may change."""
        ...

    def agent_to_run(self) -> Agent:
        """Return the agent as executors run it."""
        ...

    def parts(self, gate: Gate, limit: int) -> Parts:
        """Return the parts for the next step."""
        ...

    def hooks(self) -> Hooks:
        """Return the overridden hooks of the seed."""
        ...

    def log_output(self, rollout: Rollout, step: Step) -> None:
        """Log the output of one instance."""
        ...


async def run(
    trainer: Trainer, plan: Plan, gate: Gate, rule: UpdateRule, budget: Budget | None = None
) -> TrainingResult:
    """Train by the plan; on any exit the partial result is on disk or on the error."""
    check_saving(plan, trainer.agent)
    parameters = trainer.parameters()
    sandboxes = check_code(trainer.agent, parameters)
    initial, outside = read(parameters), Branch.outside
    with claim(plan.run_dir, parameters):
        marks: dict[str, str] = {}
        if plan.run_dir is not None:
            marks = fingerprint(plan, trainer, initial, gate, rule)
            if interpreted := [f"{name} in {place}" for name, place in sandboxes.items() if place.startswith("monty")]:
                marks["sandbox"] = ", ".join(interpreted)  # another interpreter may give the code another result
        known = checkpoints.load(plan.run_dir, marks) if plan.run_dir and plan.resume else None
        state = known or checkpoints.RunState(initial=initial, values=initial)
        state = replace(state, skipped=tuple(sorted({*state.skipped, *plan.skip})))
        plan = replace(plan, skip=state.skipped)
        if known is not None:
            write(parameters, known.values)
        async with LocalExecutor(plan.max_concurrency) as local:
            course = _Course(trainer, plan, gate, local, parameters, marks, state)
            try:
                with (
                    open_journal(plan.run_dir, state),
                    count_in(budget, plan.run_dir, state, resumed=plan.resume),
                    lineage("train"),
                ):
                    await notify(course.observers, "started", course.info(rule, sandboxes))
                    await course.follow()
            except BaseException as error:
                ended = course.break_off(error)
                await notify_failed(course.observers, ended)
                if ended is error:
                    raise
                raise ended from error
        result = course.finish()
        warn_at_end(result, course.repeats, Branch.outside - outside)
        await notify(course.observers, "finished", result)
        return result


class _Course:
    """A run in progress; `state` is its state between two steps, `pending` a step whose test set is not scored yet."""

    def __init__(
        self,
        trainer: Trainer,
        plan: Plan,
        gate: Gate,
        local: LocalExecutor,
        parameters: Sequence[ParameterNode[Any]],
        marks: Any,
        state: checkpoints.RunState,
    ) -> None:
        self.trainer = trainer
        self.plan = plan
        self.gate = gate
        self.local = local
        self.agent = trainer.agent_to_run()
        # What a user's own forward does to a Trace agent is visible to all instances.
        shared = getattr(self.agent, "shares_state", False)
        self.forwards: AbstractAsyncContextManager[Any] = asyncio.Lock() if shared else nullcontext()
        self.parameters = parameters
        self.marks = marks
        self.state = state
        self.turns = plan.schedule()
        self.streak = state.streak
        self.pending: tuple[StepReport, ...] = ()
        self.observers = _watchers(trainer, plan)
        self.rollouts = Rollouts(self.agent, trainer.executor or local, local, self.observers, plan.instance_timeout)
        self.repeats = Repeats(plan.repeats)
        self.clock = Clock(state.seconds)
        self.evaluations = Evaluations(
            self.rollouts.map,
            plan.guide,
            parameters,
            min_score=plan.min_score,
            known=state.scores,
            repeats=plan.repeats,
        )

    async def follow(self) -> None:
        """Run every remaining turn."""
        if self.state.steps == 0 and (self.plan.test or self.plan.validation):
            await self._measure()
        for turn in self.turns[self.state.steps :]:
            if await self._is_stopped():
                return
            with raise_misses():
                full, memory = await self._step(turn)
                self.repeats.warn(FEWEST_JUDGED)
                slim = full.slim()
                self.pending = (slim,)
                evaluation = await self._evaluate(turn.step + 1)
                state = await self._validate(self.state, turn.step + 1)
            validated = state.validations[-1] if state is not self.state else None
            scores = (evaluation and evaluation.score, validated and validated.score)
            full = replace(full, test_score=scores[0], validation_score=scores[1])
            self.state = state
            self._commit(replace(slim, test_score=scores[0], validation_score=scores[1]), evaluation, memory)
            if evaluation is not None:
                await notify(self.observers, "evaluation", evaluation)
            if validated is not None:
                await notify(self.observers, "validation", validated)
            await notify(self.observers, "step", full)
        await self._is_stopped()  # the reason is recorded even if the last step brought it

    async def _measure(self) -> None:
        """Score the test and validation sets between two steps, if they are due and not scored yet."""
        steps = self.state.steps
        with raise_misses():
            if not any(one.step == steps for one in self.state.evaluations):
                evaluation = await self._evaluate(steps)
                self.state = self._with(evaluation)
                if evaluation is not None:
                    await notify(self.observers, "evaluation", evaluation)
            if not any(one.step == steps for one in self.state.validations):
                before = self.state
                self.state = await self._validate(before, steps)
                if self.state is not before:
                    await notify(self.observers, "validation", self.state.validations[-1])

    async def _is_stopped(self) -> bool:
        """Return True if a stop ends the run here; a run resumed with the same stops remains stopped."""
        if not (stops := self.plan.stops):
            self.state = replace(self.state, stopped="")
            return False
        state, mark = self.state, digest(identity_of(list(stops)))
        if state.stopped and state.stops == mark:
            return True
        reached = Reached(history=state.history, validations=state.validations)
        with raise_misses(), lineage("stop", f"step={state.steps}"):
            reason = await decide(
                stops, mark, reached, self.clock, lambda stop, history: call_hook(stop, self.local.call, history)
            )
        if reason:
            self.turns = self.turns[: state.steps]  # so that what is due at the end of a run is due here
            await self._measure()
        self.state = replace(self.state, stopped=reason, stops=mark)
        if reason and self.plan.run_dir is not None:
            checkpoints.save(self.plan.run_dir, self.state, self.marks)
        return bool(reason)

    async def _step(self, turn: Turn) -> tuple[FullStepReport, dict[str, Any]]:
        """Run one turn; return its report, and the run's next state."""
        hooks = self.trainer.hooks()
        parts = self.trainer.parts(self.gate, self.plan.max_concurrency)
        if self.plan.skip_from is not None:
            parts = replace(parts, propose=skip_satisfied(parts.propose))
        with lineage(f"epoch={turn.epoch}", f"batch={turn.batch}"), collecting() as ledger:
            step = self._open(turn)
            pool = pool_of(candidates_in(self.state.memory), step)
            with raise_misses():
                explored = await self._explore(parts, step, pool, hooks)
            if not self.streak.succeeded:
                parts = replace(parts, propose=spare_bugs(parts.propose))
            self._check_failures(turn, [instance for one in explored for instance in one.instances])
            step = replace(step, rollouts=explored[0].step.rollouts)
            if turn.step == 0:  # the result warns if the agent was not observed
                ran = [rollout for rollout in step.rollouts if rollout.failure is None and rollout.output is not None]
                if ran and not any(rollout.transcript for rollout in ran):
                    self.state = replace(self.state, unseen=True)
            if hooks.update is None:
                update: Any = await make_update(parts, explored, step, pool)
            else:
                outputs = [instance.output for one in explored for instance in one.instances]

                async def apply(given: Sequence[Any]) -> Update:
                    return await make_update(parts, with_outputs(explored, given), step, pool)

                with at_place(Place(step=step, call=self.local.call, update=apply)):
                    update = await call_hook(hooks.update, self.local.call, outputs, self.plan.verbose)
            if not isinstance(update, Update):
                written = changes_between(step.values, values_of(self.parameters))
                update = as_update(update, explored, written, candidates_in(self.state.memory))
        report = report_step(turn, explored, update, ledger.totals())
        memory = as_json(step.memory, self.gate)
        if update.pool:
            memory[CANDIDATES] = to_builtins([replace(one, values=plain(one.values)) for one in update.pool])
        return report, memory

    def _open(self, turn: Turn) -> Step:
        return Step(
            number=turn.step,
            epoch=turn.epoch,
            stepsize=turn.stepsize,
            seed=self.plan.seed,
            min_score=self.plan.min_score,
            values=values_of(self.parameters),
            parameters=self.parameters,
            training=self.plan.train,
            samples=turn.samples,
            batch_size=len(turn.samples),
            history=self.state.history,
            initial=self.state.initial,
            checks=self.trainer.checks,
            skip_from=self.plan.skip_from,
            memory={name: deepcopy(kept) for name, kept in self.state.memory.items() if name != CANDIDATES},
            evaluator=self.evaluations.at(turn.step, current_lineage().split("/")),
        )

    async def _explore(self, parts: Parts, step: Step, pool: Sequence[Candidate], hooks: Hooks) -> list[Explored]:
        """Run the minibatch with each explored candidate, and request each instance's proposal as its rollout arrives.

        An error that ends the run is raised once the work in flight has ended; the earliest instance's comes first.
        """
        base = tuple(current_lineage().split("/"))
        seen = read_only(step)
        explored = check_candidates(parts.search, "explore", parts.search.explore(pool, seen))
        candidates = [pool[0], *without(pool[0], explored)]
        steps = [seen, *(replace(seen, values=self._convert_values(candidate.values)) for candidate in candidates[1:])]
        size = len(step.samples)
        places = [(*base, *place_of(parts.search, candidate)) for candidate in candidates]
        tasks = [
            RolloutTask(
                sample=sample, values=own.values, lineage=(*place, f"sample={sample.id}"), min_score=step.min_score
            )
            for own, place in zip(steps, places, strict=True)
            for sample in step.samples
        ]

        waiting: dict[int, Rollout] = {}  # user code failed, and no instance has succeeded yet

        async def instance(number: int, arrive: Arrive) -> Instance:
            task, of_candidate = tasks[number], steps[number // size]
            try:
                with lineage(*task.lineage[len(base) :]):
                    if hooks.forward is not None:
                        own = replace(of_candidate, samples=(task.sample,))
                        return await self._call_forward(hooks.forward, own, task, strict=hooks.update is None)
                    rollout = await arrive()
                    if self.plan.verbose == "output":
                        self.trainer.log_output(rollout, step)
                    if parts.propose_per == "batch":
                        return make_instance(task.sample, rollout)
                    if is_bug(rollout) and not self.streak.succeeded and number not in waiting:
                        waiting[number] = rollout
                        return make_instance(task.sample, rollout)
                    own = replace(of_candidate, samples=(task.sample,), rollouts=(rollout,))
                    with use_values(own):
                        return make_instance(task.sample, rollout, await parts.propose((rollout,), own))
            except BaseException as error:  # the boundary: an override may raise any exception
                if error is self.rollouts.refused:
                    raise
                record = record_failure("proposal", error, task.sample.id)
                return lose_instance(task.sample, record, lineage="/".join(task.lineage))

        found = await self.rollouts.each(tasks, self.plan.guide, instance, parts.limit, self.repeats)
        self.streak = follow(self.streak, [one.rollout for one in found[:size]], step.values, step.min_score)
        if self.streak.succeeded and waiting:
            late = await finish(lambda i: instance(i, partial(_known, waiting[i])), sorted(waiting), parts.limit)
            for i, one in zip(sorted(waiting), late, strict=True):
                found[i] = one
        runs = [found[i * size : (i + 1) * size] for i in range(len(candidates))]
        return [
            Explored(candidate=candidate, step=replace(own, rollouts=[one.rollout for one in run]), instances=run)
            for candidate, own, run in zip(candidates, steps, runs, strict=True)
        ]

    async def _call_forward(
        self, forward: Callable[..., Any], step: Step, task: RolloutTask, *, strict: bool
    ) -> Instance:
        """Return the instance that an overridden `forward` gives, called with the user's own agent."""
        place, sample = Place(step=step, call=self.local.call, seen=[]), task.sample
        with use_values(step), at_place(place), apart():
            arguments = (self.trainer.agent, sample.x, self.plan.guide, sample.info, self.plan.verbose)
            async with self.forwards:
                output = await call_hook(forward, self.local.call, *arguments)
        for rollout in place.seen:
            await self.rollouts.see(rollout)
        known: dict[str, Any] = {"seen": place.seen, "lineage": "/".join(task.lineage), "parameters": step.parameters}
        return read_output(output, sample, strict=strict, **known)

    def _convert_values(self, values: Values) -> Values:
        with overriding(self.parameters, values):
            return values_of(self.parameters)

    def _check_failures(self, turn: Turn, instances: Sequence[Instance]) -> None:
        """Stop if too many instances were lost: of this batch, and of the latest ones if it is small."""
        found = [
            [record for record in one.proposal.failures if is_lost(record)]
            for one in instances
            if one.proposal.failures
        ]
        latest = [record for records in found for record in records]
        seen, lost = len(instances), sum(map(bool, found))
        for report in reversed(self.state.history):
            if seen >= FEWEST_JUDGED:
                break
            seen += len(report.sample_ids)
            lost += len({record.sample_id for record in report.failures if is_lost(record)})
        if latest and lost / max(seen, FEWEST_JUDGED) > self.plan.max_failure_ratio:
            raise TrainingError(
                f"Expected at most max_failure_ratio={self.plan.max_failure_ratio:g} of the instances to be lost, got "
                f"{lost} of {seen} lost up to step {turn.step}, the latest by {latest[0].error}: {latest[0].message}"
            )

    async def _evaluate(self, steps: int) -> Evaluation | None:
        """Score the test set if it is due."""
        if not self.plan.evaluates_at(steps, len(self.turns)):
            return None
        with lineage("evaluate", f"step={steps}"), collecting() as ledger:
            values, place = values_of(self.parameters), tuple(current_lineage().split("/"))
            tasks = [
                RolloutTask(
                    sample=sample,
                    values=values,
                    lineage=(*place, f"sample={sample.id}"),
                    capture=False,
                    min_score=self.plan.min_score,
                )
                for sample in self.plan.test
            ]
            every = await run_again(self.rollouts.map, self.repeats.expand(tasks), self.plan.guide)
        runs = self.repeats.join(every)
        self.streak = follow(self.streak, runs, values, self.plan.min_score)
        scores = tuple(run.score for run in runs)
        lowest = lowest_of(scores, *(run.scores for run in self.state.evaluations), min_score=self.plan.min_score)
        return Evaluation(
            step=steps,
            score=mean(scores_of(runs, lowest)),
            scores=scores,
            failures=failures_of(every),
            usage=ledger.totals(),
        )

    def _commit(self, report: StepReport, evaluation: Evaluation | None, memory: dict[str, Any]) -> None:
        """Add a step to the state, in memory and on disk."""
        values = values_of(self.parameters)
        in_use = [
            values,
            *((self._convert_values(self.state.best),) if self.state.best is not None else ()),
            *(self._convert_values(candidate.values) for candidate in candidates_in(memory)),
        ]
        self.state = replace(
            self._with(evaluation),
            values=values,
            steps=report.step + 1,
            history=(*self.state.history, report),
            memory=memory,
            scores=self.evaluations.forget(report.step, in_use),
            streak=self.streak,
            broken_off=False,
            seconds=round(self.clock.seconds(), 3) if needs_clock(self.plan.stops) else 0.0,
        )
        self.pending = ()
        if self.plan.run_dir is not None:
            checkpoints.save(self.plan.run_dir, self.state, self.marks)
        frequency = self.plan.save_frequency
        if frequency and self.state.steps % frequency == 0:
            self.trainer.agent.save(self.plan.save_path)

    def _with(self, evaluation: Evaluation | None) -> checkpoints.RunState:
        """Return the state with one more evaluation; the test set is measured and never used to choose."""
        if evaluation is None:
            return self.state
        return replace(self.state, evaluations=(*self.state.evaluations, evaluation))

    async def _validate(self, state: checkpoints.RunState, steps: int) -> checkpoints.RunState:
        """Return the state after the validation set has been scored, if it is due."""
        if not self.plan.validates_at(steps, len(self.turns)):
            return state
        if state.best is not None:  # in the parameters' types, also after a checkpoint was read
            state = replace(state, best=self._convert_values(state.best))
        plan, values = self.plan, values_of(self.parameters)
        state, runs = await validate(state, values, plan.validation, self.evaluations, steps, plan.min_score)
        alone = follow(
            checkpoints.Streak(), runs, values, plan.min_score
        )  # scores are remembered: these may be counted before
        self.streak = replace(self.streak, succeeded=self.streak.succeeded or alone.succeeded)
        return state

    def info(self, rule: UpdateRule, sandboxes: Mapping[str, str]) -> RunInfo:
        """Return the description of the run that observers get at its start."""
        plan, state, trainer = self.plan, self.state, self.trainer
        spent = [
            *(report.usage for report in state.history),
            *(run.usage for run in (*state.evaluations, *state.validations)),
        ]
        return RunInfo(
            trainer=name_of(trainer),
            agent=name_of(trainer.agent),
            optimizer=name_of(trainer.optimizer),
            guide=name_of(plan.guide),
            rule=name_of(rule),
            gate=name_of(self.gate),
            parameters=state.values,
            seed=plan.seed,
            steps=len(self.turns),
            num_epochs=plan.num_epochs,
            batch_size=plan.batch_size,
            train_samples=len(plan.train),
            test_samples=len(plan.test),
            finished_steps=state.steps,
            usage=total_by_role(spent),
            sandboxes=sandboxes,
            skipped_samples=state.skipped,
        )

    def result(self) -> TrainingResult:
        """Return the result so far."""
        state = replace(self.state, history=(*self.state.history, *self.pending))
        return checkpoints.result_of(state, values_of(self.parameters), self.plan.keep)

    def finish(self) -> TrainingResult:
        """Return the complete result, store the kept values in the agent, and write both."""
        result = self.result()
        apply_values(self.trainer.agent, self.parameters, result.parameters, result.kept)
        if self.plan.run_dir is not None:
            checkpoints.save_result(result, self.plan.run_dir / checkpoints.RESULT)
            path = self.plan.run_dir / checkpoints.PARAMETERS
            if isinstance(self.trainer.agent, Module):
                self.trainer.agent.save(path, provenance=result.provenance)
            else:  # those of any other agent are written in the same format
                parameters: Sequence[Any] = self.agent.parameters()
                types = {parameter.name: describe_type(parameter.type) for parameter in parameters}
                write_artefact(path, read(parameters), types=types, provenance=result.provenance, which=result.kept)
        return result

    def break_off(self, error: BaseException) -> BaseException:
        """Save the partial result, attach it to the raised error, and return the error."""
        if isinstance(error, LLMError):
            steps = self.state.steps + len(self.pending)
            error = TrainingError(
                f"Expected the run to reach its end, got an error after {steps} steps: {type(error).__name__}: {error}"
            )
        if getattr(error, "result", None) is None:
            with suppress(AttributeError):  # a user's exception may have a read-only `result`
                error.result = self.result()  # type: ignore[attr-defined] # on an interrupt and a cancellation too
        try:
            self.finish()
            if self.plan.run_dir is not None and isinstance(error, Exception):
                checkpoints.save(self.plan.run_dir, replace(self.state, broken_off=True), self.marks)
        except (TrainingError, ParameterError, OSError) as unsaved:
            error.add_note(f"{type(unsaved).__name__}: {unsaved}")
        return error


async def _known(rollout: Rollout) -> Rollout:
    return rollout


def _watchers(trainer: Trainer, plan: Plan) -> list[Observer]:
    """Return the run's observers: the events, the logger, and the user's observers or otherwise a progress bar."""
    watchers: list[Observer] = [Events()]
    logger = trainer.logger or (ConsoleLogger() if plan.verbose else None)
    if logger is not None:
        watchers.append(from_logger(logger, plan.log_frequency))
    if trainer.observers is not None:
        watchers.extend(as_observers(trainer.observers))
    elif redraws(sys.stderr):
        watchers.append(ProgressBar())
    return watchers
