"""GEPA adapters as agents: whatever `gepa.optimize` evaluates can be trained, with its scores and feedback.

    agent = trainable(adapter, candidate={"system_prompt": "Answer briefly."})
    result = optimize(agent, rows, guide=None, model="openai/gpt-4o")

An adapter scores itself: `guide=None`. Each call of `evaluate` gets all instances with the same values. Its reflective
records are the transcript, their "Feedback" is the feedback, `objective_scores` are further scores by name. GEPA itself
is not imported: an adapter is recognised by `evaluate` and `make_reflective_dataset`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any, Literal

from aggregator.adapters.frameworks import is_gepa_adapter
from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode, by_name
from aggregator.cassettes.lineage import lineage_at
from aggregator.errors import ConfigError
from aggregator.executors.local import LocalExecutor
from aggregator.executors.work import Ran, judge_run
from aggregator.llm.ledger import collecting
from aggregator.records import Rollout, RolloutTask, Scores
from aggregator.text import as_text, shorten

FEEDBACK = "Feedback"
"""The key of a reflective record that GEPA recommends for feedback."""


class GepaAgent(Module):
    """A GEPA adapter; the parameters are the named texts of `candidate`, GEPA's seed candidate.

    Calls of `evaluate` run one at a time, in a thread, as in GEPA's engine: an adapter need not be thread-safe. Raises
    ConfigError for a candidate that does not map names to texts.
    """

    isolation: Literal["overlay", "copy", "serial"] = "copy"
    max_concurrency: int | None = None

    def __init__(self, adapter: Any, candidate: Mapping[str, str]) -> None:
        given: Any = candidate
        if (
            not isinstance(given, Mapping)
            or not given
            or {type(one) for pair in given.items() for one in pair} != {str}
        ):
            raise ConfigError(
                f"Expected candidate={{'name': 'text'}} with a GEPA adapter, as gepa.optimize takes it, got "
                f"{shorten(candidate)}; write trainable(adapter, candidate={{'system_prompt': '...'}})"
            )
        self.adapter = adapter
        made = [ParameterNode(text, name=name) for name, text in candidate.items()]
        self._parameters = by_name(made)
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"<GepaAgent of {type(self.adapter).__name__} with parameters {', '.join(self._parameters)}>"

    def parameters_dict(self) -> dict[str, ParameterNode[Any]]:
        """Return name -> parameter."""
        return dict(self._parameters)

    @property
    def candidate(self) -> dict[str, str]:
        """The current values, in GEPA's form."""
        return {name: parameter.data for name, parameter in self._parameters.items()}

    async def rollouts(self, tasks: Sequence[RolloutTask], guide: Any) -> AsyncIterator[tuple[int, Rollout]]:
        """Evaluate the tasks in one call, and yield (index, rollout) for each; a guide replaces the adapter's score.

        The adapter's model calls belong to the first task: GEPA's interface does not distinguish them.
        """
        candidate = {**self.candidate, **tasks[0].values}
        wanted = [parameter.name for parameter in self._parameters.values() if parameter.trainable]
        first = "/".join(tasks[0].lineage)
        async with LocalExecutor(1) as thread:
            with lineage_at(first, tasks[0].role), collecting() as ledger:
                found = await thread.call(self._evaluate, [_instance(task, guide) for task in tasks], candidate, wanted)
        measures = {name: value / len(tasks) for name, value in ledger.measures().items()}
        for i, (task, (output, scores, transcript)) in enumerate(zip(tasks, found, strict=True)):
            judge = (lambda _x, _output, _info, given=scores: given) if guide is None else guide
            with lineage_at("/".join(task.lineage), task.role):
                yield (
                    i,
                    await judge_run(
                        task, Ran(output=output), judge, transcript=transcript * task.capture, measures=measures
                    ),
                )

    def _evaluate(
        self, batch: list[Any], candidate: dict[str, str], wanted: Sequence[str]
    ) -> list[tuple[Any, Scores, str]]:
        """Return output, scores and transcript of each instance."""
        with self._lock:
            found = self.adapter.evaluate(batch, candidate, capture_traces=True)
            if len(found.outputs) != len(batch) or len(found.scores) != len(batch):
                raise ConfigError(
                    f"Expected an output and a score for each of {len(batch)} instances from "
                    f"{type(self.adapter).__name__}.evaluate, got {len(found.outputs)} and {len(found.scores)}"
                )
            return [self._one(found, i, candidate, wanted) for i in range(len(batch))]

    def _one(self, found: Any, i: int, candidate: dict[str, str], wanted: Sequence[str]) -> tuple[Any, Scores, str]:
        objectives = found.objective_scores[i] if found.objective_scores else {}
        feedback, lines = self._reflect(found, i, candidate, wanted) if found.trajectories else ("", "")
        return found.outputs[i], Scores(found.scores[i], dict(objectives), feedback), lines

    def _reflect(self, found: Any, i: int, candidate: dict[str, str], wanted: Sequence[str]) -> tuple[str, str]:
        """Return feedback and transcript of one instance: its reflective records, component by component."""
        single = {name: None if getattr(found, name) is None else [getattr(found, name)[i]] for name in _COLUMNS}
        records = [
            (name, record) for name in wanted for record in self._records(replace(found, **single), candidate, name)
        ]
        feedback = dict.fromkeys(as_text(record.get(FEEDBACK, "")) for _, record in records)
        return "\n".join(filter(None, feedback)), "\n".join(_lines(name, record) for name, record in records)

    def _records(self, found: Any, candidate: dict[str, str], name: str) -> list[Mapping[str, Any]]:
        """Return the records of one instance about one component, if the adapter has any."""
        try:
            return list(self.adapter.make_reflective_dataset(candidate, found, [name]).get(name, ()))
        except Exception:  # noqa: BLE001 - adapters raise if a component took no part in an instance
            return []


_COLUMNS = ("outputs", "scores", "trajectories", "objective_scores")


def adapt(thing: Any, candidate: Any = None) -> GepaAgent | None:
    """Return a GEPA adapter as an agent, or None for anything else."""
    return GepaAgent(thing, candidate) if is_gepa_adapter(thing) else None


def _instance(task: RolloutTask, guide: Any) -> Any:
    """Return a row in the adapter's own form: a DSPy Example as a whole; a pair too, unless a guide needs its info."""
    x, info = task.sample.x, task.sample.info
    if hasattr(info, "with_inputs") and hasattr(info, "toDict"):
        return info
    return x if info is x or info is None or guide is not None else (x, info)


def _lines(component: str, record: Mapping[str, Any]) -> str:
    """Format a record as a part of a transcript."""
    shown = [f"{component}:"]
    for key, value in record.items():
        if key != FEEDBACK:
            text = as_text(value)
            shown += (
                [f"  {key}: {text}"] if "\n" not in text else [f"  {key}: |", *(f"    {x}" for x in text.split("\n"))]
            )
    return "\n".join(shown)
