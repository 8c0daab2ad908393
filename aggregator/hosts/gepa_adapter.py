"""Our agents as adapters of GEPA's, and reflective records as rollouts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gepa.core.adapter import EvaluationBatch

from aggregator import portal
from aggregator.adapters.agents import as_agent
from aggregator.agents.parameters import ParameterNode, by_name
from aggregator.errors import ConfigError
from aggregator.guides.calling import check_guide, declared_limit
from aggregator.records import Rollout, RolloutTask
from aggregator.text import as_text
from aggregator.training.batches import samples
from aggregator.training.evaluation import alone

INPUTS, OUTPUTS, FEEDBACK, SCORE, TRANSCRIPT = "Inputs", "Generated Outputs", "Feedback", "Score", "Transcript"
"""The keys of a reflective record: those that GEPA recommends, and two that an AgentAdapter adds."""


class AgentAdapter:
    """An agent of ours, with its guide, as an adapter of GEPA's; a row is what `train` takes.

    A candidate holds each parameter as a text, other values as JSON. An instance without a score has
    `failure_score`. Raises what ends a run.
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
        """The agent's current values, as GEPA takes them."""
        return {name: encoded(one.data) for name, one in self.parameters.items()}

    def values(self, candidate: Mapping[str, str]) -> dict[str, Any]:
        """Return a candidate as values for `agent.apply`; raises ParameterError for a text that does not fit."""
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
        """Return a record of each rollout, the same for each component."""
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
    """Return records as rollouts: those of several components as one, if there are as many of each."""
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
