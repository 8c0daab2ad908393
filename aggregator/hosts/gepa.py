"""Our algorithm inside GEPA's engine, and our agents as GEPA adapters.

    adapter = AgentAdapter(agent, guide)
    gepa.optimize(adapter.seed_candidate, trainset=rows, adapter=adapter, reflection_minibatch_size=20,
                  reflection_strategy=AggregatedReflection("openai/gpt-4o", agent=agent))

`AggregatedReflection` makes one proposal for each reflective record, concurrently, and merges them into one new text of
each component (`LLMMerge`); GEPA samples minibatches, accepts and selects. It can also be a
`custom_candidate_proposer`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gepa.core.adapter import EvaluationBatch
from gepa.proposer.reflective_mutation.reflection_lm import ReflectionProposal
from msgspec.structs import replace

from aggregator import portal
from aggregator.adapters.agents import as_agent
from aggregator.adapters.frameworks import require_version
from aggregator.agents.parameters import ParameterNode, by_name
from aggregator.cassettes.lineage import lineage
from aggregator.errors import ConfigError
from aggregator.executors.local import MAX_CONCURRENCY, finish
from aggregator.executors.work import record_failure
from aggregator.guides.calling import check_guide, declared_limit
from aggregator.llm.ledger import collecting, total
from aggregator.records import NO_USAGE, Candidate, Proposal, Rollout, RolloutTask, Sample, Usage
from aggregator.text import as_text
from aggregator.training.batches import samples
from aggregator.training.evaluation import alone
from aggregator.training.gates import all_checks
from aggregator.training.merge import LLMMerge
from aggregator.training.parts import ask_optimizer, check_optimizer, check_rule
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.schedules import check_stepsize
from aggregator.training.step import AnyOptimizer, Check, Step, UpdateRule, is_satisfied, make_instance, propose_nothing
from aggregator.training.updates import Explored, Parts, make_candidates

# ---- our agents as GEPA adapters

INPUTS, OUTPUTS, FEEDBACK, SCORE, TRANSCRIPT = "Inputs", "Generated Outputs", "Feedback", "Score", "Transcript"
"""The keys of a reflective record: those that GEPA recommends, and two that an AgentAdapter adds."""


class AgentAdapter:
    """One of our agents, with its guide, as a GEPA adapter; rows are those of `train`.

    A candidate holds each parameter as a text, other values as JSON. An instance without a score has `failure_score`.
    Raises errors that end a run.
    """

    propose_new_texts = None

    def __init__(self, agent: Any, guide: Any, *, failure_score: float = 0.0) -> None:
        check_guide(guide)
        self.agent, self.guide, self.failure_score = as_agent(agent), guide, failure_score
        found: dict[str, ParameterNode[Any]] = by_name(self.agent.parameters())  # type: ignore[arg-type]
        self.parameters = {name: one for name, one in found.items() if one.trainable}
        if not self.parameters:
            raise ConfigError(f"Expected an agent with a trainable parameter, got {agent!r}")

    @property
    def seed_candidate(self) -> dict[str, str]:
        """The agent's current values, in GEPA's form."""
        return {name: encoded(one.data) for name, one in self.parameters.items()}

    def values(self, candidate: Mapping[str, str]) -> dict[str, Any]:
        """Return a candidate as values for `agent.apply`; raises ParameterError for an invalid text."""
        return {name: decoded(text, self.parameters[name]) for name, text in candidate.items()}

    def evaluate(self, batch: list[Any], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        """Run the agent on rows; the trajectories are rollouts."""
        values, lowest = self.values(candidate), declared_limit(self.guide, "min_score")
        tasks = [
            RolloutTask(
                sample=sample,
                values=values,
                lineage=("evaluate", f"sample={sample.id}"),
                capture=capture_traces,
                min_score=lowest,
            )
            for sample in samples(batch, name="batch")
        ]
        runs = portal.call(self._run, tasks)
        return EvaluationBatch(
            outputs=[run.output for run in runs],
            scores=[self.failure_score if run.score is None else run.score for run in runs],
            trajectories=list(runs) if capture_traces else None,
        )

    async def _run(self, tasks: Sequence[RolloutTask]) -> Sequence[Rollout]:
        return await alone(self.agent)(tasks, self.guide)

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """Return a record of each rollout, the same one for each component."""
        records = [
            {INPUTS: run.x, OUTPUTS: run.output, FEEDBACK: run.feedback, SCORE: run.score, TRANSCRIPT: run.transcript}
            for run in eval_batch.trajectories
        ]
        return dict.fromkeys(components_to_update, records)


def encoded(value: Any) -> str:
    """Return a value as a text of a candidate."""
    return value if isinstance(value, str) else as_text(value)


def decoded(text: str, parameter: ParameterNode[Any]) -> Any:
    """Return a text of a candidate as a value of a parameter."""
    return parameter.convert(text if isinstance(parameter.data, str) else json.loads(text))


def rollouts_of(data: Mapping[str, Sequence[Mapping[str, Any]]], components: Sequence[str]) -> list[Rollout]:
    """Return records as rollouts; those of several components are joined, if there are as many of each."""
    found = [(name, list(data.get(name, ()))) for name in components if data.get(name)]
    if len({len(records) for _, records in found}) == 1:
        joined = [[(name, records[i]) for name, records in found] for i in range(len(found[0][1]))]
    else:
        joined = [[(name, record)] for name, records in found for record in records]
    return [_rollout(i, parts) for i, parts in enumerate(joined)]


def _rollout(i: int, parts: Sequence[tuple[str, Mapping[str, Any]]]) -> Rollout:
    _, first = parts[0]
    feedback = dict.fromkeys(as_text(record.get(FEEDBACK) or "") for _, record in parts)
    score = first.get(SCORE, first.get("score"))
    return Rollout(
        sample_id=i,
        x=first.get(INPUTS),
        output=first.get(OUTPUTS),
        score=float(score) if isinstance(score, int | float) else None,
        feedback="\n".join(filter(None, feedback)),
        transcript=first[TRANSCRIPT] if TRANSCRIPT in first else "\n".join(_shown(*part) for part in parts),
    )


def _shown(component: str, record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key not in {FEEDBACK, SCORE, "score"}}
    return "\n".join([f"{component}:", *(f"  {key}: {as_text(value)}" for key, value in rest.items())])


__all__ = ["AgentAdapter", "AggregatedReflection"]

Job = tuple[Mapping[str, str], Mapping[str, Sequence[Mapping[str, Any]]], Sequence[str]]
"""GEPA's arguments: (candidate, reflective data set by component, components to update)."""


# ---- our algorithm in GEPA's engine


class AggregatedReflection:
    """GEPA's `reflection_strategy` and `custom_candidate_proposer`: a proposal per record, merged by a model.

    `model` proposes and merges unless `optimizer` and `rule` do. With `agent` the components have the types,
    descriptions and constraints of its parameters. Records with a "Score" of at least `max_score` propose nothing, and
    support the current text. GEPA logs a strategy's exceptions and continues: give it `stop_callbacks=[strategy.stop]`,
    which ends its run once no call can succeed (`error`).
    """

    def __init__(
        self,
        model: Any = None,
        *,
        agent: Any = None,
        optimizer: AnyOptimizer | None = None,
        rule: UpdateRule | None = None,
        stepsize: float = 0.5,
        checks: Sequence[Check] | None = None,
        max_score: float | None = None,
        max_concurrency: int = MAX_CONCURRENCY,
    ) -> None:
        require_version("gepa", "0.1.4", "0.2")
        self.optimizer: Any = LLMOptimizer(llm=model) if optimizer is None else optimizer
        self.rule: UpdateRule = LLMMerge(model) if rule is None else rule
        check_optimizer(self.optimizer)
        check_rule(self.rule)
        self.stepsize, self.checks, self.max_score = check_stepsize(stepsize), all_checks(checks), max_score
        self.max_concurrency = max_concurrency
        self.usage: Usage = NO_USAGE
        self.error: Exception | None = None
        self._parameters = {} if agent is None else by_name(as_agent(agent).parameters())  # type: ignore[arg-type]
        self._number = 0

    def __call__(
        self,
        candidate: Mapping[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: Sequence[str],
        *,
        metadata: Any = None,  # in later versions of GEPA
    ) -> dict[str, str]:
        """Return new texts by component: GEPA's `custom_candidate_proposer`."""
        return dict(self.reflect(candidate, reflective_dataset, components_to_update)[0].new_texts)

    def reflect(
        self,
        candidate: Mapping[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: Sequence[str],
    ) -> tuple[Any, AggregatedReflection]:
        """Return new texts for the components, and this strategy."""
        return self.reflect_many([(candidate, reflective_dataset, components_to_update)])[0]

    def reflect_many(self, jobs: Sequence[Job]) -> list[tuple[Any, AggregatedReflection]]:
        """Reflect on several candidates at once; raises errors that end a run."""
        with collecting() as ledger:
            try:
                return [(proposal, self) for proposal in portal.call(self._reflect_all, jobs)]
            except Exception as error:
                self.error = error
                raise
            finally:
                self.usage = total([self.usage, *(usage for _, usage in ledger.entries())])

    async def _reflect_all(self, jobs: Sequence[Job]) -> list[Any]:
        first, self._number = self._number, self._number + len(jobs)

        async def one(i: int) -> Any:
            with lineage("reflect", f"job={first + i}"):
                return await self._reflect(*jobs[i])

        return await finish(one, range(len(jobs)), max(len(jobs), 1))

    async def _reflect(self, candidate: Mapping[str, str], data: Mapping[str, Any], components: Sequence[str]) -> Any:
        parameters = [self._parameters.get(name) or ParameterNode(candidate[name], name=name) for name in components]
        values = {one.name: decoded(candidate[one.name], one) for one in parameters}
        rollouts = rollouts_of(data, components)
        step = Step(
            stepsize=self.stepsize,
            values=values,
            initial=values,
            parameters=parameters,
            samples=[Sample(run.sample_id, run.x) for run in rollouts],
            rollouts=rollouts,
            batch_size=len(rollouts),
            checks=self.checks,
            skip_from=self.max_score,
        )
        proposals = await finish(lambda run: self._propose(run, step), rollouts, self.max_concurrency)
        made = zip(step.samples, rollouts, proposals, strict=True)
        explored = Explored(
            candidate=Candidate(id="0.0", values=values),
            step=step,
            instances=[make_instance(sample, run, proposal) for sample, run, proposal in made],
        )
        parts = Parts(propose_per="instance", propose=self.optimizer.propose, rule=self.rule)
        merged = await make_candidates(parts, [explored], step, [explored.candidate])
        found = merged.candidates[0] if merged.candidates else explored.candidate
        failures = [f"{record.error}: {record.message}" for record in merged.failures]
        return ReflectionProposal(
            new_texts={one.name: encoded(found.values[one.name]) for one in parameters if merged.candidates},
            metadata={
                "aggregated:proposals": [own.values for own in proposals],
                "aggregated:failures": failures,
                "aggregated:reasoning": found.reasoning,
            },
        )

    async def _propose(self, run: Rollout, step: Step) -> Proposal:
        """Return the proposal for one record; a lost call loses its record, an error that ends a run is raised."""
        if is_satisfied(run, step):
            return propose_nothing(run)
        own = replace(step, samples=[Sample(run.sample_id, run.x)], rollouts=[run])
        with lineage(f"sample={run.sample_id}"):
            try:
                return await ask_optimizer(self.optimizer, [run], own)
            except BaseException as error:  # noqa: BLE001 - the boundary: an optimizer may raise anything, one is lost
                record = record_failure("proposal", error, run.sample_id)
        return replace(propose_nothing(run), failures=(record,), error=f"{record.error}: {record.message}")

    def stop(self, state: Any = None) -> bool:
        """Return True once an error has ended all further reflection: one of GEPA's `stop_callbacks`."""
        return self.error is not None

    @property
    def total_cost(self) -> float:
        """USD spent on calls whose price is known, for GEPA's `max_reflection_cost`."""
        return self.usage.cost or 0.0

    def supports_cost_tracking(self) -> bool:
        """Return False if a call with an unknown price was made."""
        return self.usage.calls == 0 or self.usage.cost is not None

    @property
    def total_tokens_in(self) -> int:
        """Input tokens of all calls."""
        return self.usage.input_tokens or 0

    @property
    def total_tokens_out(self) -> int:
        """Output tokens of all calls."""
        return self.usage.output_tokens or 0
