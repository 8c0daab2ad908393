"""Our algorithm as an ADK agent optimizer: `await AggregatedUpdate(model=...).optimize(agent, sampler)`.

ADK's sampler runs and scores candidates; each is a clone of the tree of agents. Sub-agents are trained too, unlike with
ADK's own optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from google.adk.agents import Agent
from google.adk.optimization.agent_optimizer import AgentOptimizer
from google.adk.optimization.data_types import AgentWithScores, OptimizerResult, UnstructuredSamplingResult
from google.adk.optimization.sampler import Sampler

from aggregator.adapters.adk import copy_with, parameters_of
from aggregator.adapters.frameworks import require_version
from aggregator.adapters.template import HostAgent, Judged
from aggregator.errors import ConfigError
from aggregator.llm.budget import Budget
from aggregator.records import Sample, TrainingResult
from aggregator.text import as_text
from aggregator.training.optimize import aoptimize
from aggregator.training.schedules import Schedule
from aggregator.training.step import AnyOptimizer, Check, Gate, Search, UpdateRule

OUTPUTS = ("output", "outputs", "response", "final_response", "actual_response", "generated_output")
"""The keys of a sampler's data that may hold an output, in order; otherwise the whole data are the output."""
FEEDBACKS = ("feedback", "rationale", "error", "expected", "expected_response", "reference")
"""The keys of a sampler's data that are shown as feedback."""


class AggregatedUpdate(AgentOptimizer[UnstructuredSamplingResult, AgentWithScores]):
    """Trains the instructions of an agent and its sub-agents minibatch by minibatch.

    The arguments are those of `aggregator.optimize`, without a guide: the sampler scores. `result` is the latest run's.
    The given agent is not changed.
    """

    def __init__(
        self,
        *,
        model: Any = None,
        optimizer: AnyOptimizer | None = None,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        search: Search | None = None,
        checks: Sequence[Check] | None = None,
        budget: Budget | None = None,
        seed: int = 0,
        batch_size: int = 4,
        num_epochs: int = 1,
        stepsize: float | Schedule = 0.5,
        max_score: float | None = None,
        run_dir: str | Path | Literal[False] | None = None,
        show: bool = False,
    ) -> None:
        require_version("google-adk", "2", "3")
        self.options: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            "rule": rule,
            "gate": gate,
            "search": search,
            "checks": checks,
            "budget": budget,
            "seed": seed,
            "batch_size": batch_size,
            "num_epochs": num_epochs,
            "stepsize": stepsize,
            "max_score": max_score,
            "run_dir": run_dir,
            "show": show,
        }
        self.result: TrainingResult | None = None

    async def optimize(
        self, initial_agent: Agent, sampler: Sampler[UnstructuredSamplingResult]
    ) -> OptimizerResult[AgentWithScores]:
        """Return the trained agent with its score on the sampler's validation examples.

        Raises ConfigError for a sampler without training examples, and for an agent without a fixed text.
        """
        train, validation = sampler.get_train_example_ids(), sampler.get_validation_example_ids()
        if not train:
            raise ConfigError("Expected training examples from the sampler, got none; see get_train_example_ids")
        evaluate = _Sampling(initial_agent, sampler)
        agent = HostAgent(parameters_of(copy_with(initial_agent, {})), evaluate, isolation="copy")
        self.result = await aoptimize(
            agent,
            [(example, "train") for example in train],
            guide=None,
            validate=[(example, "validation") for example in validation] if validation else 0,
            **self.options,
        )
        best = max(self.result.validation_scores, default=None)
        trained = copy_with(initial_agent, self.result.parameters)
        return OptimizerResult[AgentWithScores](
            optimized_agents=[AgentWithScores(optimized_agent=trained, overall_score=best)]
        )


class _Sampling:
    """A sampler's score of a candidate on a batch of examples."""

    def __init__(self, agent: Any, sampler: Sampler[UnstructuredSamplingResult]) -> None:
        self._agent = agent
        self._sampler = sampler

    async def __call__(self, values: dict[str, Any], samples: Sequence[Sample]) -> list[Judged]:
        kind: Any = samples[0].info
        found = await self._sampler.sample_and_score(
            copy_with(self._agent, values),
            example_set=kind,
            batch=[sample.x for sample in samples],
            capture_full_eval_data=True,
        )
        return [self._judged(found, sample.x) for sample in samples]

    def _judged(self, found: UnstructuredSamplingResult, example: str) -> Judged:
        if example not in found.scores:
            return Judged(error=SamplingError(f"the sampler returned no score for the example {example!r}"))
        data: Mapping[str, Any] = (found.data or {}).get(example) or {}
        lines = [f"{key}: {as_text(data[key])}" for key in FEEDBACKS if data.get(key)]
        output = next((data[key] for key in OUTPUTS if key in data), dict(data))
        shown = "\n".join(f"{key}: {as_text(value)}" for key, value in data.items())
        return Judged(output=output, score=float(found.scores[example]), feedback="\n".join(lines), transcript=shown)


class SamplingError(Exception):
    """A sampler did not score an example."""
