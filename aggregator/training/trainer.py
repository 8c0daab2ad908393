"""The trainers: what one step does, in the words of the seed API. How steps follow one another stands in `loop.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from aggregator import portal
from aggregator.agents.parameters import read, write
from aggregator.errors import ConfigError, LLMError
from aggregator.protocols import Gate, Logger, UpdateRule
from aggregator.records import Decision, Failure, Proposal, Sample, TrainingResult, Values
from aggregator.training.batches import Dataset, samples
from aggregator.training.context import current_step
from aggregator.training.evaluation import mean
from aggregator.training.executors import AsyncExecutor
from aggregator.training.failures import ends_run, failure
from aggregator.training.gates import always, improves_on_batch
from aggregator.training.loop import Observer, run
from aggregator.training.merge import LLMMerge
from aggregator.training.plan import Plan, check, trainable
from aggregator.training.prompts import AGGREGATOR_SYSTEM_PROMPT
from aggregator.training.rollouts import rollout
from aggregator.training.rules import identity
from aggregator.training.schedules import Schedule, as_schedule
from aggregator.training.suggestions import construct_update_dict, extract_llm_suggestion, typed

Method = TypeVar("Method", bound=Callable[..., Any])


class Update(Struct, frozen=True, kw_only=True):
    """What one update came to: the values that were proposed, the gate's verdict, the batch's mean score."""

    values: Values = {}
    decision: Decision
    score: float | None = None
    reasoning: str = ""
    proposals: int = 0
    failures: tuple[Failure, ...] = ()


def face_of(awaitable: str) -> Callable[[Method], Method]:
    """Mark a synchronous method as the face of an async one, so that an override of it can be told apart."""

    def mark(method: Method) -> Method:
        method.__face_of__ = awaitable  # type: ignore[attr-defined]
        return method

    return mark


class Minibatch:
    """Trains an agent minibatch by minibatch. Subclasses say what one instance proposes and how proposals are applied.

    `agent` is called on each input and offers `parameters()`; `optimizer` proposes for one instance. `rule` merges the
    proposals of a minibatch, `gate` accepts or refuses the result. `use_asyncio=False` runs one instance after the
    other; `max_concurrency` bounds how many run at once. `observers` are called with the report of each step; None
    shows a progress bar where standard error is a terminal.

    Overridable, sync or async: `forward` and `update`.
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
        budget: Any = None,
        max_concurrency: int = 64,
        seed: int = 0,
        observers: Sequence[Observer] | None = None,
    ) -> None:
        self.agent = agent
        self.optimizer = optimizer
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
        return trainable(named if chosen is None else list(chosen() if callable(chosen) else chosen))

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
        """Train and return what was reached: the synchronous face of `atrain`, which says more."""
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
        """Train on a data set and return what was reached.

        `guide(x, output, info)` returns a score or (score, feedback). Data sets are dict(inputs=..., infos=...) or
        sequences of (x, info). `stepsize` in [0, 1] is how much proposals weigh against the current value, constant or
        a schedule. The test set is evaluated before training, every `eval_frequency` steps and at the end; 0 is never.
        `log_frequency` None logs whenever the test set is evaluated. `min_score` is the score of an instance on which
        the agent itself fails. `verbose` logs scores, "output" also the agent's outputs. `num_threads` is Trace's name
        for `max_concurrency`. `ensure_improvement` refuses updates that do not raise the batch's own score by
        `improvement_threshold`. `save_frequency` saves the agent every so many steps to `save_path`. `run_dir` keeps
        journal, checkpoints and result.json there; `resume=True` goes on where such a run was cut off.

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
                log_frequency=eval_frequency if log_frequency is None else log_frequency,
                save_frequency=save_frequency or 0,
                save_path=save_path,
                min_score=min_score,
                verbose=verbose,
                max_concurrency=self._concurrency(max_concurrency, num_threads),
                max_failure_ratio=max_failure_ratio,
                seed=self.seed if seed is None else seed,
                run_dir=None if run_dir is None else Path(run_dir),
                resume=resume,
            )
        )
        gate = improves_on_batch(improvement_threshold) if ensure_improvement else self.gate
        return await run(self, plan, gate)

    def _concurrency(self, *wanted: int | None) -> int:
        if not self.use_asyncio:
            return 1
        return next((value for value in wanted if value is not None), self.max_concurrency)

    @face_of("aforward")
    def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
        """Run the agent on one instance and return its proposal: the synchronous face of `aforward`."""
        return portal.call(self.aforward, agent, x, guide, info, verbose)

    async def aforward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Proposal:
        """Run the agent on one instance, judge the output, and return the new parameter values it asks for."""
        step = current_step()
        sample = step.sample or Sample(0, x, info)
        async with AsyncExecutor(1) as own:
            executor = step.executor or own
            seen = await rollout(agent, guide, sample, executor=executor, min_score=step.min_score)
        if verbose == "output" and self.logger is not None:
            self.logger.log("Output", seen.output, step.step, sample=sample.id)
        failures = () if seen.failure is None else (seen.failure,)
        silent = Proposal(score=seen.score, feedback=seen.feedback, failures=failures, sample_ids=(sample.id,))
        if step.stepsize == 0 or (seen.failure is not None and not seen.feedback):
            return silent
        parameters = step.parameters or self.parameters()
        try:
            proposal: Proposal = await self.optimizer.propose(seen, parameters, history=step.history)
        except LLMError as error:
            if ends_run(error):
                raise
            lost = failure("proposal", error, sample_id=sample.id)
            return replace(silent, error=f"{lost.error}: {lost.message}", failures=(*failures, lost))
        unread = () if proposal.error is None else (_unread(proposal.error, sample.id),)
        return replace(proposal, failures=(*failures, *unread))

    @face_of("aupdate")
    def update(self, outputs: Sequence[Any], verbose: bool | str = False) -> Any:
        """Merge what the instances proposed and apply it: the synchronous face of `aupdate`."""
        return portal.call(self.aupdate, outputs, verbose)

    async def aupdate(self, outputs: Sequence[Any], verbose: bool | str = False) -> Update:
        """Merge the proposals, check the result against each parameter's type, ask the gate, and apply it."""
        step = current_step()
        parameters = step.parameters or self.parameters()
        proposals = [as_proposal(output) for output in outputs]
        before = read(parameters)
        merged = settle(await self.rule(before, proposals, stepsize=step.stepsize))
        checked, refused = typed(merged.values, parameters)
        values = {name: value for name, value in checked.items() if value != before[name]}
        decision = Decision(accepted=False, reason="no change was proposed")
        if values:
            gate = step.gate or self.gate
            decision = await gate(before, {**before, **values}, step.samples)
        if decision.accepted:
            write(parameters, values)
        return Update(
            values=values,
            decision=decision,
            score=mean([proposal.score for proposal in proposals]),
            reasoning=merged.reasoning,
            proposals=sum(bool(proposal.values) for proposal in proposals),
            failures=merged.failures or _refusals(merged.error, refused),
        )

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


class AggregatedUpdate(Minibatch):
    """Asks the optimizer for a proposal per instance, independently, and a model to aggregate them.

    `llm` is the aggregating model, its name, or None for the default model. Set `aggregator_system_prompt` on a
    subclass or an instance to change its instructions. `rule` replaces the aggregation by another rule.
    """

    aggregator_system_prompt = AGGREGATOR_SYSTEM_PROMPT

    def __init__(
        self,
        agent: Any,
        optimizer: Any,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        llm: Any = None,
        max_tokens: int = 4096,
        *,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        budget: Any = None,
        max_concurrency: int = 64,
        seed: int = 0,
        observers: Sequence[Observer] | None = None,
    ) -> None:
        super().__init__(
            agent,
            optimizer,
            use_asyncio,
            logger,
            gate=gate,
            budget=budget,
            max_concurrency=max_concurrency,
            seed=seed,
            observers=observers,
        )
        self.max_tokens = max_tokens
        if rule is None:
            rule = LLMMerge(llm, max_tokens=max_tokens, system_prompt=self.aggregator_system_prompt)
            self.llm = rule.llm
        self.rule = rule

    def to_param_dict(self, update_dict: Mapping[Any, Any]) -> dict[str, Any]:
        """Convert {ParameterNode: value} to {name: value}."""
        return {parameter.py_name: value for parameter, value in update_dict.items()}

    def construct_update_dict(
        self, parameters: list[Any], suggestion: dict[str, Any], ignore_extraction_error: bool = True
    ) -> dict[Any, Any]:
        """Convert a suggestion into each parameter's own type."""
        return construct_update_dict(parameters, suggestion, ignore_extraction_error)

    def extract_llm_suggestion(self, response: str, ignore_extraction_error: bool = True) -> dict[str, Any]:
        """Extract the suggestion from a reply."""
        return extract_llm_suggestion(response, ignore_extraction_error)


def as_proposal(output: Any) -> Proposal:
    """Read what `forward` returned: a Proposal, {parameter or name: value}, or (such a mapping, score)."""
    score = None
    if isinstance(output, tuple) and len(output) == 2:
        output, score = output
    if isinstance(output, Proposal):
        return output
    if output is None:
        return Proposal(score=score)
    if isinstance(output, Mapping):
        return Proposal(values={getattr(key, "name", key): value for key, value in output.items()}, score=score)
    raise ConfigError(
        f"expected forward to return a Proposal, a mapping of parameter to value, or (mapping, score), got {output!r}"
    )


def settle(merged: Sequence[Proposal]) -> Proposal:
    """Return the one proposal that a rule left; raises ConfigError where several contradict each other."""
    if not merged:
        return Proposal()
    names = [name for proposal in merged for name in proposal.values]
    if len(names) != len(set(names)):
        raise ConfigError(
            f"the rule left {len(merged)} proposals for the same parameter; end it with one that merges, "
            "as in chain(top_k(8), LLMMerge(llm))"
        )
    values = {name: value for proposal in merged for name, value in proposal.values.items()}
    failures = tuple(record for proposal in merged for record in proposal.failures)
    return replace(merged[0], values=values, failures=failures)


def _unread(error: str, sample_id: int) -> Failure:
    return Failure(stage="proposal", error="SuggestionError", message=error, sample_id=sample_id)


def _refusals(error: str | None, refused: Mapping[str, str]) -> tuple[Failure, ...]:
    messages = [message for message in (error, *refused.values()) if message]
    return tuple(Failure(stage="aggregation", error="SuggestionError", message=message) for message in messages)
