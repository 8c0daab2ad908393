"""Trainer: an agent, an optimizer, and the decisions between them.

`Trainer(agent, optimizer, rule=LLMMerge(llm), search=beam(4), gate=improves_on_batch())`; the names of the seed and of
Trace, `AggregatedUpdate` for one, are faces of it (`algorithms.py`). The run itself is in `loop.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from msgspec.structs import replace

from aggregator.adapters.agents import as_agent
from aggregator.adapters.template import own_verdict
from aggregator.adapters.trace_optimizer import as_optimizer
from aggregator.agents.parameters import ParameterNode, read
from aggregator.cassettes.lineage import current_lineage, lineage
from aggregator.checks import check_count
from aggregator.errors import ConfigError, TrainingWarning
from aggregator.executors.local import MAX_CONCURRENCY, LocalExecutor
from aggregator.executors.work import AgentWork, InstanceAgent, record_failure
from aggregator.guides.calling import declared_limit
from aggregator.llm.budget import Budget
from aggregator.llm.ledger import Prices, collecting
from aggregator.llm.observed import Clients, apart, observed
from aggregator.observing.observer import ConsoleLogger, Watching
from aggregator.portal import sync
from aggregator.protocols import Agent, AnyGuide, Executor, Logger
from aggregator.records import Candidate, Failure, Kept, Proposal, Rollout, RolloutTask, Sample, TrainingResult, Values
from aggregator.text import shorten, show_call
from aggregator.training.batches import Dataset, samples
from aggregator.training.gates import (
    Keep,
    all_checks,
    always,
    apply_values,
    both,
    check_keep,
    improves_on_batch,
    values_named,
)
from aggregator.training.loop import run
from aggregator.training.merge import LLMMerge, identity
from aggregator.training.parts import (
    ask_optimizer,
    check_budget,
    check_clients,
    check_executor,
    check_gate,
    check_optimizer,
    check_rule,
    check_search,
    check_watchers,
)
from aggregator.training.plan import (
    Plan,
    RunPlan,
    as_run_dir,
    check,
    check_perfect,
    check_skipped,
    choose_parameters,
    count_run,
    with_sample,
)
from aggregator.training.prompts import join_rollouts
from aggregator.training.schedules import Schedule, as_schedule
from aggregator.training.searches import greedy
from aggregator.training.step import (
    AnyOptimizer,
    Check,
    Gate,
    Hooks,
    Optimizer,
    Search,
    Step,
    UpdateRule,
    current_place,
    read_output,
    use_values,
)
from aggregator.training.stops import AnyStop, check_stops, interrupt_of
from aggregator.training.updates import Explored, Parts, ProposePer, is_single, make_update, skip_satisfied, unread


class Trainer:
    """Trains an agent minibatch by minibatch.

    `agent` is anything that `as_agent` accepts; `optimizer` proposes new values, for each instance by itself or, with
    `propose_per="batch"`, for the whole minibatch. `rule` merges the proposals of a minibatch: by default the
    optimizer's model does (`LLMMerge(llm)`), or for whole minibatches nothing. `search` decides which candidates are
    explored and become current (default: `greedy`), `gate` accepts or refuses an update (default: `always`), `checks`
    refuse single values, `keeps_placeholders` among them unless the list is empty.

    `executor` runs the rollouts (default: this process). `max_concurrency` bounds the instances in flight,
    `use_asyncio=False` runs one after the other. `observers` see the run; None shows a progress bar if standard error
    is a terminal. `skip_samples` are ids of training samples to leave out, also in a resumed run. `skip_perfect` makes
    no proposal for an instance that reached `max_score` (by default the guide's); it counts as support for the current
    value. `budget` counts every call of a run, and may be shared with other runs and with models.

    `clients="all"`, or a list of names as of `cassette(clients=)`, counts the calls of the agent's own clients (of SDKs
    and frameworks) in transcripts, usage and budget; a call that they lose is not a failure of the agent. None does so
    for the clients of an open cassette, () for none. `prices` are those of models without a known price.

    Overridable: the seed's `forward(agent, x, guide, info, verbose)` and `update(outputs, verbose)`, sync or async, and
    `propose(rollouts, step)`. An overridden `forward` runs in this process, with the trainer's agent.

    The arguments of `train`: `guide(x, output, info)` returns a score or (score, feedback); None is for an agent that
    scores itself, such as an adapter of GEPA's. Data sets are dict(inputs=..., infos=...) or sequences of (x, info).
    `stepsize` in [0, 1] is the weight of the proposals against the current value, constant or a schedule. The test set
    is evaluated before training, every `eval_frequency` steps and at the end; 0 means never. `log_frequency` None logs
    whenever the test set is evaluated, every step if that is never. `min_score` is the score of an instance on which
    the agent itself fails: by default the guide's, else the lowest score of the comparison, at most 0. `verbose` logs
    scores, "output" also the agent's outputs. `ensure_improvement` refuses updates that do not raise the batch's own
    score by `improvement_threshold`. `save_frequency` saves the agent to `save_path` every that many steps.
    `num_threads` is Trace's name for `max_concurrency`. A run in which more than `max_failure_ratio` of a batch is lost
    stops. `run_dir` keeps journal, checkpoints and result.json there; `resume=True` continues such a run. `repeats` is
    the number of rollouts of each instance, whose score is their mean. `stop` ends the run between two steps:
    `target(0.95)`, `patience(3)` or `seconds(600)` (of `aggregator.stops`), a callable of the history that returns
    True, or a list of these; `result.stopped` is the reason. `instance_timeout` is the number of seconds that the
    agent, and then the guide, may take for one instance.
    """

    def __init__(
        self,
        agent: Any,
        optimizer: AnyOptimizer | None,
        *,
        propose_per: ProposePer = "instance",
        rule: UpdateRule | None = None,
        search: Search | None = None,
        gate: Gate | None = None,
        checks: Sequence[Check] | None = None,
        skip_samples: Sequence[int] = (),
        skip_perfect: bool = False,
        max_score: float | None = None,
        executor: Executor | None = None,
        observers: Sequence[Watching] | None = None,
        logger: Logger | None = None,
        budget: Budget | None = None,
        clients: Clients = None,
        prices: Prices | None = None,
        use_asyncio: bool = True,
        max_concurrency: int = MAX_CONCURRENCY,
        seed: int = 0,
    ) -> None:
        check_watchers(logger, observers)
        check_budget(budget)
        if propose_per not in get_args(ProposePer):
            raise ConfigError(f"Expected propose_per 'instance' or 'batch', got {propose_per!r}")
        if rule is not None:
            check_rule(rule)
        if gate is not None:
            check_gate(gate)
        if search is not None:
            check_search(search)
        self.agent = agent
        self.optimizer: Any = optimizer
        self.propose_per: ProposePer = propose_per
        self.rule = rule
        self.search: Search = greedy if search is None else search
        self.gate: Gate = gate or always
        self.checks: Sequence[Check] = all_checks(checks)
        self.skip_samples = skip_samples
        self.skip_perfect = skip_perfect
        self.max_score = max_score
        self.executor = executor
        self.observers = observers
        self.logger = logger
        self.budget = budget
        self.clients = clients
        self.prices = prices
        self.use_asyncio = use_asyncio
        self.max_concurrency = max_concurrency
        self.seed = seed
        self._adapted: tuple[Any, Any] = (None, None)
        self._result: TrainingResult | None = None
        self._proposing: tuple[Any, Any, Any] = (None, None, None)
        self._check_parts()

    def __repr__(self) -> str:
        return show_call(type(self).__name__, self.agent, self.optimizer)

    def _check_parts(self) -> UpdateRule:
        """Check agent, optimizer and executor against one another; return the rule that merges."""
        rule = self.merging_rule()
        agent, hooks = self.agent_to_run(), self.hooks()
        if hooks.forward is None and type(self).propose is Trainer.propose:
            check_optimizer(self._optimizer())
        check_clients(self.clients, self.executor)
        if self.executor is not None:
            check_executor(self.executor)
            if not isinstance(agent, InstanceAgent):
                raise ConfigError(
                    f"Expected no executor for an agent that takes batches, got {shorten(self.executor)} for "
                    f"{type(self.agent).__name__}, whose own framework runs the rollouts; leave executor out"
                )
        if hooks.forward is None:
            return rule
        if not isinstance(agent, InstanceAgent):
            raise ConfigError(
                f"Expected an agent that can be called with one input with an overridden forward, got "
                f"{type(self.agent).__name__}, which takes batches; leave forward as it is"
            )
        if self.executor is not None and getattr(self.executor, "is_remote", True):
            raise ConfigError(
                f"Expected an executor of this process with an overridden forward, got "
                f"{type(self.executor).__name__}; leave forward as it is, or use LocalExecutor"
            )
        return rule

    def agent_to_run(self) -> Agent:
        """Return the agent as executors run it."""
        if self._adapted[0] is not self.agent or self._adapted[1] is None:
            self._adapted = (self.agent, as_agent(self.agent))
        agent: Agent = self._adapted[1]
        return agent

    def _optimizer(self) -> Optimizer:
        """Return the optimizer to call; a Trace optimizer is adapted."""
        agent = self.agent_to_run()
        if self._proposing[0] is not self.optimizer or self._proposing[1] is not agent:
            self._proposing = (self.optimizer, agent, as_optimizer(self.optimizer, agent))
        optimizer: Optimizer = self._proposing[2]
        return optimizer

    def parameters(self) -> list[ParameterNode[Any]]:
        """Return the parameters that training may change: the optimizer's if it names some, else the agent's."""
        own: Sequence[Any] = self.agent_to_run().parameters()  # this also gives every parameter its name
        chosen = getattr(self._optimizer(), "parameters", None)
        return choose_parameters(own, None if chosen is None else list(chosen() if callable(chosen) else chosen))

    def parts(self, gate: Gate, limit: int) -> Parts:
        """Return the parts for the next step; attributes set on the trainer meanwhile are used."""
        return Parts(
            propose_per=self.propose_per,
            propose=self.propose,
            rule=self.merging_rule(),
            search=self.search,
            gate=gate,
            limit=limit,
        )

    def merging_rule(self) -> UpdateRule:
        """Return the rule that merges the proposals of a minibatch."""
        if self.rule is None:
            model = getattr(self.optimizer, "llm", None)
            model = model if hasattr(model, "complete") else None
            self.rule = LLMMerge(model) if self.propose_per == "instance" else identity
        return self.rule

    def hooks(self) -> Hooks:
        """Return the hooks of the seed that a subclass or an instance overrides."""
        found: dict[str, Callable[..., Any]] = {}
        for name, awaitable in (("forward", "aforward"), ("update", "aupdate")):
            method = getattr(self, name)
            if not hasattr(method, "__face_of__"):
                found[name] = method  # whatever is there is the user's
            elif awaitable in vars(self) or getattr(type(self), awaitable) is not getattr(Trainer, awaitable):
                found[name] = getattr(self, awaitable)
        return Hooks(**found)

    async def atrain(
        self,
        guide: AnyGuide | None,
        train_dataset: Dataset,
        *,
        stepsize: float | Schedule = 0.5,
        num_epochs: int = 1,
        batch_size: int = 1,
        test_dataset: Dataset | None = None,
        eval_frequency: int = 1,
        log_frequency: int | None = None,
        min_score: float | None = None,
        verbose: bool | str = False,
        ensure_improvement: bool = False,
        improvement_threshold: float = 0.0,
        save_frequency: int | None = None,
        save_path: str = "checkpoints/agent.json",
        num_threads: int | None = None,
        max_concurrency: int | None = None,
        max_failure_ratio: float = 0.5,
        seed: int | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        validate_dataset: Dataset | None = None,
        keep: Keep = None,
        repeats: int = 1,
        stop: AnyStop | Sequence[AnyStop] | None = None,
        instance_timeout: float | None = None,
    ) -> TrainingResult:
        """Train on a data set and return the result; the class explains the arguments.

        Raises ConfigError, BudgetExceededError, TrainingError, CassetteMissError. An early end has a partial `.result`.
        """
        plan = Plan(
            guide=self._guide(guide),
            train=(train := samples(train_dataset)),
            test=() if test_dataset is None else samples(test_dataset, name="test_dataset"),
            stepsize=as_schedule(stepsize),
            num_epochs=num_epochs,
            batch_size=batch_size,
            eval_frequency=eval_frequency,
            log_frequency=(eval_frequency or 1) if log_frequency is None else log_frequency,
            save_frequency=save_frequency or 0,
            save_path=save_path,
            min_score=declared_limit(guide, "min_score") if min_score is None else min_score,
            verbose=verbose,
            max_concurrency=self._concurrency(max_concurrency, num_threads),
            max_failure_ratio=max_failure_ratio,
            seed=self.seed if seed is None else seed,
            run_dir=as_run_dir(run_dir),
            resume=resume,
            skip=check_skipped(self.skip_samples, len(train)),
            validation=() if validate_dataset is None else samples(validate_dataset, name="validate_dataset"),
            keep=check_keep(keep, validates=validate_dataset is not None),
            skip_from=check_perfect(self.skip_perfect, self.max_score, guide),
            repeats=repeats,
            stops=check_stops(stop),
            instance_timeout=instance_timeout,
        )
        return await self._run(check(plan), improves_on_batch(improvement_threshold) if ensure_improvement else always)

    train = sync(atrain)

    async def aplan(
        self,
        guide: AnyGuide | None,
        train_dataset: Dataset,
        *,
        num_epochs: int = 1,
        batch_size: int = 1,
        test_dataset: Dataset | None = None,
        eval_frequency: int = 1,
        validate_dataset: Dataset | None = None,
        ensure_improvement: bool = False,
        repeats: int = 1,
        sample: int = 0,
        seed: int | None = None,
    ) -> RunPlan:
        """Count what `train` with these arguments would do, without running it.

        With `sample` that many rollouts of the first minibatches are run to measure tokens and cost, as the plan
        states. Warns (TrainingWarning) of an aggregator that has nothing to merge, and of a run that mostly evaluates.
        Raises ConfigError for invalid arguments.
        """
        plan = check(
            Plan(
                guide=self._guide(guide),
                train=(train := samples(train_dataset)),
                test=() if test_dataset is None else samples(test_dataset, name="test_dataset"),
                validation=() if validate_dataset is None else samples(validate_dataset, name="validate_dataset"),
                stepsize=as_schedule(0.5),
                num_epochs=num_epochs,
                batch_size=batch_size,
                eval_frequency=eval_frequency,
                repeats=repeats,
                seed=self.seed if seed is None else seed,
                skip=check_skipped(self.skip_samples, len(train)),
            )
        )
        check_count("sample", sample, meaning="0 runs nothing")
        rule = self._check_parts()
        gate = both(improves_on_batch(), self.gate) if ensure_improvement else self.gate
        counted = count_run(
            plan,
            rule=rule,
            search=self.search,
            gate=gate,
            optimizer=self._optimizer(),
            propose_per=self.propose_per,
        )
        for note in counted.notes:
            warnings.warn(note, TrainingWarning, stacklevel=2)
        if not sample:
            return counted
        chosen = [one for turn in plan.schedule() for one in turn.samples][:sample]
        step = Step.of(self.agent, guide=plan.guide, samples=chosen)
        with observed(self.clients, self.prices), lineage("plan"), collecting() as ledger:
            runs = await step.evaluate(step.values, chosen, fresh=True)
        return with_sample(counted, runs, ledger.totals())

    plan = sync(aplan)

    async def _run(self, plan: Plan, first: Gate) -> TrainingResult:
        """Run the plan with the gate `first` before the trainer's gate; `restore` uses even a partial result."""
        rule = self._check_parts()
        if plan.repeats > 1 and self.hooks().forward is not None:
            raise ConfigError(
                f"Expected repeats=1 with an overridden forward, got {plan.repeats}; repeat the run in forward"
            )
        if plan.instance_timeout is not None:
            if self.hooks().forward is not None:
                raise ConfigError(
                    f"Expected instance_timeout=None with an overridden forward, got {plan.instance_timeout:g}; use "
                    "asyncio.timeout in forward"
                )
            if not isinstance(self.agent_to_run(), InstanceAgent):
                raise ConfigError(
                    f"Expected instance_timeout=None with {type(self.agent).__name__}, which runs whole batches, got "
                    f"{plan.instance_timeout:g}; set a timeout in the agent itself"
                )
        gate = first if self.gate is always else self.gate if first is always else both(first, self.gate)
        try:
            with observed(self.clients, self.prices):
                self._result = await run(self, plan, gate, rule, self.budget)
        except BaseException as error:
            self._result = getattr(error, "result", None)
            if (interrupt := interrupt_of(error)) is not None:
                raise interrupt from error
            raise
        return self._result

    def restore(self, which: Kept = "best") -> Values:
        """Store the best or the last values of the latest run in the agent, and return them.

        Without a validation set nothing was chosen, and both are the last values. Raises ConfigError before the first
        run.
        """
        if self._result is None:
            raise ConfigError("Expected a run whose values can be restored, got none; call train first")
        values = values_named(self._result, which)
        chosen = which if self._result.best_step is not None else "last"  # without a validation set nothing was chosen
        apply_values(self.agent, self.parameters(), values, chosen)
        return values

    def _guide(self, guide: Any) -> Any:
        """Return the guide; None means the verdict of an agent that takes batches, as in `protocols.Agent`."""
        return own_verdict if guide is None and not isinstance(self.agent_to_run(), InstanceAgent) else guide

    def _concurrency(self, wanted: int | None, threads: int | None) -> int:
        if not self.use_asyncio:
            return 1
        wanted = threads if wanted is None else wanted
        return self.max_concurrency if wanted is None else wanted

    async def aforward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
        """Run the agent on one instance, judge the output, and return the proposed values.

        With `propose_per="batch"` return the rollout: the proposal comes from `update`, for all together.
        """
        place = current_place()
        mine = as_agent(agent) if agent is not self.agent else self.agent_to_run()
        names = {parameter.name for parameter in self.parameters()}
        own: Sequence[Any] = [parameter for parameter in mine.parameters() if parameter.name in names]
        step = Step(samples=(Sample(0, x, info),)) if place is None else place.step
        step = replace(
            step, parameters=own, values=read(own)
        )  # assignments of a hook, or the values of a copy of the agent
        task = RolloutTask(
            sample=Sample(step.samples[0].id, x, info),
            values=step.values,
            lineage=tuple(filter(None, current_lineage().split("/"))),
            min_score=step.min_score,
        )
        async with LocalExecutor(1) as alone:
            rollout = await AgentWork(mine, guide, call=alone.call if place is None else place.call)(task)
        if verbose == "output":
            self.log_output(rollout, step)
        if place is not None:
            place.seen.append(rollout)
        if self.propose_per == "batch":
            return rollout
        with use_values(step):
            return await skip_satisfied(self.propose)(
                (rollout,), replace(step, samples=(task.sample,), rollouts=(rollout,))
            )

    forward = sync(aforward)

    def log_output(self, rollout: Rollout, step: Step) -> None:
        """Log the output of one instance, for `verbose="output"`."""
        (self.logger or ConsoleLogger()).log("Output", rollout.output, step.number, sample=rollout.sample_id)

    async def propose(self, rollouts: Sequence[Rollout], step: Step) -> Proposal:
        """Ask the optimizer for a proposal from the rollouts of one instance, or of a whole minibatch.

        A lost call or an unreadable reply is part of the proposal; an error that ends a run is raised.
        """
        seen = join_rollouts(rollouts)
        sample_id = seen.sample_id if len(rollouts) == 1 else None
        record: Failure | None = None
        if step.stepsize > 0 and (seen.failure is None or seen.feedback):
            try:
                with apart():
                    proposal = await ask_optimizer(self._optimizer(), rollouts, step)
            except BaseException as error:  # noqa: BLE001 - the boundary: an optimizer may raise anything, one is lost
                record = record_failure("proposal", error, sample_id)
            else:
                if not proposal.failures and not proposal.error and seen.failure is None:
                    return proposal
                own = proposal.failures or unread("proposal", sample_id, proposal.error)
                usable = bool(proposal.values)  # the readable part is a proposal
                return replace(proposal, failures=(*seen.failures, *own), error=None if usable else proposal.error)
        return Proposal(
            score=seen.score,
            feedback=seen.feedback,
            error=None if record is None else f"{record.error}: {record.message}",
            failures=seen.failures if record is None else (*seen.failures, record),
            sample_ids=tuple([rollout.sample_id for rollout in rollouts]),
        )

    async def aupdate(self, outputs: Sequence[Any], verbose: bool | str = False) -> Any:
        """Merge the instances' proposals, check them against each parameter's type, ask the gate, and apply the update.

        Returns the Update; an override may return a score, or nothing.
        """
        place = current_place()
        if place is not None and place.update is not None:
            return await place.update(outputs)
        if not is_single(self.search):
            raise ConfigError(f"Expected {type(self).__name__}.update to be called by train, where its memory is kept")
        parameters = self.parameters()
        step = Step(values=read(parameters), parameters=parameters)
        current = Candidate(id="0.0", values=step.values)
        explored = Explored(candidate=current, step=step, instances=[read_output(output) for output in outputs])
        return await make_update(self.parts(self.gate, self.max_concurrency), [explored], step, [current])

    update = sync(aupdate)
