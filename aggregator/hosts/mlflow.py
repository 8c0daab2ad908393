"""Our algorithm as an MLflow prompt optimizer, for prompts of its registry.

    mlflow.genai.optimize_prompts(
        predict_fn=predict, train_data=rows, prompt_uris=[prompt.uri], scorers=[correct],
        optimizer=AggregatedUpdate(model="openai/gpt-4o"),
    )

MLflow runs and scores candidates and registers the results as new versions. It sets a candidate's templates for the
whole process, so candidates run one after the other; the instances of each run in MLflow's own pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import mlflow
from mlflow.genai.optimize import BasePromptOptimizer
from mlflow.genai.optimize.types import EvaluationResultRecord, PromptOptimizerOutput

from aggregator.adapters.frameworks import require_version
from aggregator.adapters.mlflow import as_template, prompt_parameter
from aggregator.adapters.template import HostAgent, Judged
from aggregator.cassettes.lineage import current_lineage
from aggregator.errors import ConfigError
from aggregator.executors.local import LocalExecutor
from aggregator.llm.budget import Budget
from aggregator.observing.observer import Observer
from aggregator.records import FullStepReport, Sample, TrainingResult
from aggregator.text import as_text, canonical_json
from aggregator.training.optimize import optimize
from aggregator.training.schedules import Schedule
from aggregator.training.step import AnyOptimizer, Check, Gate, Search, UpdateRule

FAILED = "Failed to invoke the predict_fn"
"""The prefix of the output that MLflow makes of an error in `predict_fn`."""

EvalFn = Callable[[dict[str, str], list[dict[str, Any]]], list[EvaluationResultRecord]]


class AggregatedUpdate(BasePromptOptimizer):
    """Trains prompts minibatch by minibatch: a proposal for each instance, merged by a model.

    The arguments are those of `aggregator.optimize`. Rationales of the scorers are the feedback, MLflow's traces the
    transcripts. A template keeps its variables, a chat prompt stays a list of messages. `result` is the latest run's.
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
        validate: float = 0.2,
        run_dir: str | Path | Literal[False] | None = None,
        show: bool = False,
    ) -> None:
        require_version("mlflow", "3.12", "4")
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
            "validate": validate,
            "run_dir": run_dir,
            "show": show,
        }
        self.result: TrainingResult | None = None

    def optimize(
        self,
        eval_fn: EvalFn | None,
        train_data: list[dict[str, Any]],
        target_prompts: dict[str, str],
        enable_tracking: bool = True,
    ) -> PromptOptimizerOutput:
        """Return the trained templates with their scores on the validation part, before and after.

        Raises ConfigError without training data or scorers.
        """
        if eval_fn is None or not train_data:
            raise ConfigError("Expected train_data= and scorers= with AggregatedUpdate, got none to learn from")
        parameters = [prompt_parameter(name, template) for name, template in target_prompts.items()]
        initial = {one.name: as_template(one.data) for one in parameters}
        evaluate = _Evaluations(eval_fn, {one.name for one in parameters if one.type is not str})
        agent = HostAgent(parameters, evaluate, isolation="serial")
        run = mlflow.active_run() if enable_tracking else None
        watching = [] if run is None else [_Metrics(run.info.run_id)]
        data = [(record["inputs"], record) for record in train_data]
        result = optimize(agent, data, guide=None, observers=watching, **self.options)
        self.result = result
        chosen = result.validation_scores
        trained = {name: as_template(value) for name, value in result.parameters.items()}
        return PromptOptimizerOutput(
            optimized_prompts=trained,
            initial_eval_score=chosen[0] if chosen else None,
            final_eval_score=max(chosen, default=None),
            initial_eval_score_per_scorer=evaluate.means_of(initial),
            final_eval_score_per_scorer=evaluate.means_of(trained),
        )


class _Evaluations:
    """MLflow's `eval_fn`, called for one candidate at a time, in a thread; it keeps the single scores of validation."""

    def __init__(self, eval_fn: EvalFn, chats: set[str]) -> None:
        self._eval_fn = eval_fn
        self._chats = chats
        self._validated: dict[bytes, dict[int, Mapping[str, float]]] = {}  # templates -> sample -> scorer -> score

    async def __call__(self, values: dict[str, Any], samples: Sequence[Sample]) -> list[Judged]:
        templates = {name: as_template(value) for name, value in values.items()}
        async with LocalExecutor(1) as thread:
            records = await thread.call(self._eval_fn, templates, [sample.info for sample in samples])
        judged = [_judged(record) for record in records]
        if "validate" in current_lineage().split("/"):
            known = self._validated.setdefault(canonical_json(templates), {})
            known.update((sample.id, one.scores) for sample, one in zip(samples, judged, strict=True))
        return judged

    def means_of(self, templates: Mapping[str, str]) -> dict[str, float]:
        """Return each scorer's mean on the validation part with these templates; {} if they were not validated."""
        runs = self._validated.get(canonical_json(templates), {}).values()
        names = dict.fromkeys(name for scores in runs for name in scores)
        return {name: fmean(scores[name] for scores in runs if name in scores) for name in names}


def _judged(record: EvaluationResultRecord) -> Judged:
    if record.score is None:
        raise ConfigError("Expected scorers= with AggregatedUpdate, got none; a prompt is trained by its scores")
    output = record.outputs
    failed = isinstance(output, str) and output.startswith(FAILED)
    lines = [f"{name}: {text}" for name, text in (record.rationales or {}).items() if text]
    expected = record.expectations
    if not lines and expected:
        lines = [f"Expected: {as_text(expected)}"]
    return Judged(
        output=output,
        score=float(record.score),
        feedback="\n".join(lines),
        transcript=_lines(record.trace),
        scores={name: float(score) for name, score in (record.individual_scores or {}).items()},
        error=PredictError(output) if failed else None,
    )


class PredictError(Exception):
    """`predict_fn` raised an error, which MLflow passes on as an output."""


def _lines(trace: Any) -> str:
    """Return MLflow's trace as a transcript: each span with its inputs and outputs."""
    spans = [] if trace is None else trace.data.spans
    return "\n".join(
        f"{span.name}\n  input: {as_text(span.inputs)}\n  returned: {as_text(span.outputs)}" for span in spans
    )


class _Metrics(Observer):
    """Logs the scores of the training minibatches to MLflow's open run."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._client = mlflow.MlflowClient()

    def step(self, report: FullStepReport, /) -> None:
        if report.score is not None:
            self._client.log_metric(self._run_id, "train_score", report.score, step=report.step)
