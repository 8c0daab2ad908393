"""Minibatch: what every trainer shares. What one step does stands here, how steps follow one another in `loop.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from aggregator import portal
from aggregator.adapters.trace import adapt
from aggregator.errors import ends_run, is_own
from aggregator.executors.local import AsyncExecutor
from aggregator.llm.budget import Budget
from aggregator.observing.console import ConsoleLogger
from aggregator.observing.observer import Watching
from aggregator.protocols import Gate, Logger, UpdateRule
from aggregator.records import Proposal, Rollout, Sample, TrainingResult
from aggregator.training.batches import Dataset, samples
from aggregator.training.context import Variant, current_step, step_context
from aggregator.training.evaluation import rollout
from aggregator.training.failures import failure, root_of
from aggregator.training.gates import always, both, improves_on_batch
from aggregator.training.loop import run
from aggregator.training.parts import check_budget, check_watchers, proposed
from aggregator.training.plan import Plan, as_run_dir, check, trainable
from aggregator.training.rules import identity
from aggregator.training.schedules import Schedule, as_schedule
from aggregator.training.updates import Update, apply, as_proposal, unread

Method = TypeVar("Method", bound=Callable[..., Any])


def face_of(awaitable: str) -> Callable[[Method], Method]:
    """Mark a synchronous method as the face of an async one, so that an override of it can be told apart."""

    def mark(method: Method) -> Method:
        method.__face_of__ = awaitable  # type: ignore[attr-defined]
        return method

    return mark


class Minibatch:
    """Trains an agent minibatch by minibatch. Subclasses say what one instance proposes and how proposals are applied.

    Agents and optimizers written for Trace are taken as they are (`trace_adapter.py`).

    `agent` is called on each input and offers `parameters()`; `optimizer` proposes for one instance. `rule` merges the
    proposals of a minibatch, `gate` accepts or refuses the result. `use_asyncio=False` runs one instance after the
    other; `max_concurrency` bounds how many run at once. `observers` are called with the report of each step; None
    shows a progress bar where standard error is a terminal. `budget` counts every call of a run, whoever makes it, and
    may be shared with other runs and with models.

    Overridable, sync or async: `forward` and `update`.

    The arguments of `train`: `guide(x, output, info)` returns a score or (score, feedback). Data sets are
    dict(inputs=..., infos=...) or sequences of (x, info). `stepsize` in [0, 1] is how much proposals weigh against the
    current value, constant or a schedule. The test set is evaluated before training, every `eval_frequency` steps and
    at the end; 0 is never. `log_frequency` None logs whenever the test set is evaluated. `min_score` is the score of
    an instance on which the agent itself fails. `verbose` logs scores, "output" also the agent's outputs.
    `ensure_improvement` refuses updates that do not raise the batch's own score by `improvement_threshold`.
    `save_frequency` saves the agent every so many steps to `save_path`. `num_threads` is Trace's name for
    `max_concurrency`. A run in which more than `max_failure_ratio` of a batch is lost stops. `run_dir` keeps journal,
    checkpoints and result.json there; `resume=True` goes on where such a run was cut off.
    """

    def __init__(
        self,
        agent: Any,
        optimizer: Any,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        *,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        budget: Budget | None = None,
        max_concurrency: int = 64,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        check_watchers(logger, observers)
        check_budget(budget)
        self.agent, self.optimizer = adapt(agent, optimizer)
        self.use_asyncio = use_asyncio
        self.logger = logger
        self.rule: UpdateRule = rule or identity
        self.gate: Gate = gate or always
        self.budget = budget
        self.max_concurrency = max_concurrency
        self.seed = seed
        self.observers = observers

    def parameters(self) -> list[Any]:
        """Return the parameters that training may change: the optimizer's where it names some, else the agent's."""
        chosen = getattr(self.optimizer, "parameters", None)
        named = list(self.agent.parameters())  # also gives every parameter its name
        return trainable(named, None if chosen is None else list(chosen() if callable(chosen) else chosen))

    def train(
        self,
        guide: Any,
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
    ) -> TrainingResult:
        """Train and return what was reached: the synchronous face of `atrain`."""
        return portal.call(
            self.atrain,
            guide,
            train_dataset,
            stepsize=stepsize,
            num_epochs=num_epochs,
            batch_size=batch_size,
            test_dataset=test_dataset,
            eval_frequency=eval_frequency,
            log_frequency=log_frequency,
            min_score=min_score,
            verbose=verbose,
            ensure_improvement=ensure_improvement,
            improvement_threshold=improvement_threshold,
            save_frequency=save_frequency,
            save_path=save_path,
            num_threads=num_threads,
            max_concurrency=max_concurrency,
            max_failure_ratio=max_failure_ratio,
            seed=seed,
            run_dir=run_dir,
            resume=resume,
        )

    async def atrain(
        self,
        guide: Any,
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
    ) -> TrainingResult:
        """Train on a data set and return what was reached; the class says what the arguments mean.

        Raises ConfigError for arguments that cannot be meant, BudgetExceededError and TrainingError (both with the
        partial `.result`) where the run cannot go on, CassetteMissError where a replay lacks an exchange.
        """
        plan = check(
            Plan(
                guide=guide,
                train=samples(train_dataset),
                test=() if test_dataset is None else samples(test_dataset, name="test_dataset"),
                stepsize=as_schedule(stepsize),
                num_epochs=num_epochs,
                batch_size=batch_size,
                eval_frequency=eval_frequency,
                log_frequency=(eval_frequency or 1) if log_frequency is None else log_frequency,
                save_frequency=save_frequency or 0,
                save_path=save_path,
                min_score=min_score,
                verbose=verbose,
                max_concurrency=self._concurrency(max_concurrency, num_threads),
                max_failure_ratio=max_failure_ratio,
                seed=self.seed if seed is None else seed,
                run_dir=as_run_dir(run_dir),
                resume=resume,
            )
        )
        return await run(self, plan, self._gate(ensure_improvement, improvement_threshold), self.budget)

    def _gate(self, ensure_improvement: bool, threshold: float) -> Gate:
        if not ensure_improvement:
            return self.gate
        improves = improves_on_batch(threshold)
        return improves if self.gate is always else both(improves, self.gate)

    def _concurrency(self, *wanted: int | None) -> int:
        if not self.use_asyncio:
            return 1
        return next((value for value in wanted if value is not None), self.max_concurrency)

    @face_of("aforward")
    def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
        """Run the agent on one instance and return its proposal: the synchronous face of `aforward`."""
        return portal.call(self.aforward, agent, x, guide, info, verbose)

    async def aforward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
        """Run the agent on one instance, judge the output, and return the new parameter values it asks for."""
        step = current_step()
        if agent is not self.agent:  # a copy, say: the prompt shows the values that this agent ran with
            step = replace(step, parameters=self._parameters_of(agent))
        with step_context(step):
            return await self.propose(await self.observe(agent, x, guide, info, verbose))

    def _parameters_of(self, agent: Any) -> list[Any]:
        names = {parameter.name for parameter in self.parameters()}
        return [parameter for parameter in agent.parameters() if parameter.name in names]

    async def observe(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Rollout:
        """Run the agent on one instance and judge the output."""
        step = current_step()
        sample = step.sample or Sample(0, x, info)
        async with AsyncExecutor(1) as own:
            executor = step.executor or own
            seen = await rollout(agent, guide, sample, executor=executor, min_score=step.min_score)
        if verbose == "output":
            (self.logger or ConsoleLogger()).log("Output", seen.output, step.step, sample=sample.id)
        return seen

    async def propose(self, seen: Rollout) -> Proposal:
        """Ask the optimizer what one rollout calls for; a lost call or an unreadable reply is part of the proposal."""
        step = current_step()
        silent = Proposal(
            score=seen.score, feedback=seen.feedback, failures=seen.failures, sample_ids=(seen.sample_id,)
        )
        if step.stepsize == 0 or (seen.failure is not None and not seen.feedback):
            return silent
        parameters = step.parameters or self.parameters()
        try:
            proposal = await proposed(self.optimizer, seen, parameters, step.history)
        except BaseException as error:  # an optimizer of the user's own may raise anything: one is lost
            if not is_own(error):
                raise
            if ends_run(cause := root_of(error)):
                raise cause from None
            lost = failure("proposal", error, sample_id=seen.sample_id)
            return replace(silent, error=f"{lost.error}: {lost.message}", failures=(*seen.failures, lost))
        own = proposal.failures or unread("proposal", proposal.error, seen.sample_id)
        usable = bool(proposal.values)  # what could be read stands as a proposal of its own
        return replace(proposal, failures=(*seen.failures, *own), error=None if usable else proposal.error)

    @face_of("aupdate")
    def update(self, outputs: Sequence[Any], verbose: bool | str = False) -> Any:
        """Merge what the instances proposed and apply it: the synchronous face of `aupdate`."""
        return portal.call(self.aupdate, outputs, verbose)

    async def aupdate(self, outputs: Sequence[Any], verbose: bool | str = False) -> Update:
        """Merge the proposals, check the result against each parameter's type, ask the gate, and apply it."""
        step = current_step()
        proposals = [as_proposal(output) for output in outputs]
        return await apply(proposals, self.rule, step.gate or self.gate, step.parameters or self.parameters())

    def variants(self) -> Sequence[Variant]:
        """Return the values that each sample of a step is run under: only those in force."""
        return (Variant(),)

    async def call_forward(self, sample: Sample, plan: Plan) -> Any:
        """Call `forward`, an override of it included, sync or async."""
        return await self._call(self.forward, self.agent, sample.x, plan.guide, sample.info, plan.verbose)

    async def call_update(self, outputs: Sequence[Any], plan: Plan) -> Any:
        """Call `update`, an override of it included, sync or async."""
        return await self._call(self.update, outputs, plan.verbose)

    async def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        awaitable = getattr(method, "__face_of__", None)
        if awaitable is not None:
            return await getattr(self, awaitable)(*arguments)
        if inspect.iscoroutinefunction(method):
            return await method(*arguments)
        executor = current_step().executor
        result = await executor.call(method, *arguments) if executor is not None else method(*arguments)
        return await result if inspect.isawaitable(result) else result
