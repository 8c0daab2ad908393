"""Our algorithm as an Opik optimizer: `AggregatedUpdate(model=...).optimize_prompt(prompt, dataset, metric)`.

Opik runs and scores candidates on the items of its data set; its metric's scores and reasons are the training signal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opik_optimizer import ChatPrompt
from opik_optimizer.base_optimizer import BaseOptimizer
from opik_optimizer.core.state import AlgorithmResult, OptimizationContext

from aggregator.adapters.frameworks import require_version
from aggregator.adapters.template import HostAgent, Judged
from aggregator.agents.parameters import ParameterNode
from aggregator.executors.local import LocalExecutor
from aggregator.llm.budget import Budget
from aggregator.records import Sample, TrainingResult
from aggregator.text import as_text, canonical_json
from aggregator.training.optimize import optimize
from aggregator.training.schedules import Schedule
from aggregator.training.step import AnyOptimizer, Check, Gate, Search, UpdateRule

Prompts = Mapping[str, Any]


class AggregatedUpdate(BaseOptimizer):
    """Trains the messages of prompts minibatch by minibatch: a proposal for each item, merged by a model.

    The arguments are those of `aggregator.optimize`. Which roles change is `optimize_prompts=` of Opik's call, by
    default the system message; a message keeps its placeholders. A validation data set replaces `validate`.
    `max_trials` limits the candidates' evaluations. `result` is the latest run's.
    """

    supports_prompt_optimization = True

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
        **options: Any,
    ) -> None:
        require_version("opik-optimizer", "3.1", "4")
        name = model if isinstance(model, str) else getattr(model, "name", type(model).__name__)
        super().__init__(model=name, seed=seed, **{"verbose": 0, **options})
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
        self.validate = validate
        self.result: TrainingResult | None = None

    def run_optimization(self, context: OptimizationContext) -> AlgorithmResult:
        """Return the trained prompts with their score on the validation part."""
        roles = (context.extra_params or {}).get("optimizable_roles") or {"system"}
        parameters = [one for name, prompt in context.prompts.items() for one in _parameters_of(name, prompt, roles)]
        agent = HostAgent(parameters, _Evaluations(self, context), isolation="serial")
        held_out = context.validation_dataset
        self.result = optimize(
            agent,
            _rows(context.dataset),
            guide=None,
            validate=self.validate if held_out is None else _rows(held_out),
            stop=lambda _: bool(context.should_stop) or context.trials_completed >= context.max_trials,
            **self.options,
        )
        best = _prompts_with(context.prompts, self.result.parameters)
        scores = self.result.validation_scores
        return AlgorithmResult(
            best_prompts=best,
            best_score=max(scores) if scores else self.evaluate(context, best),
            metadata={"steps": len(self.result.history), "parameters": list(self.result.parameters)},
        )

    def get_config(self, context: OptimizationContext) -> dict[str, Any]:
        """Return the settings that Opik stores."""
        return {"optimizer": type(self).__name__, "model": self.model, "seed": self.seed}

    def get_optimizer_metadata(self) -> dict[str, Any]:
        """Return the facts that Opik shows about the optimizer."""
        return {name: self.options[name] for name in ("batch_size", "num_epochs", "seed")}


class _Item(NamedTuple):
    """One item and its data set."""

    item: Mapping[str, Any]
    dataset: Any


def _rows(dataset: Any) -> list[tuple[Any, _Item]]:
    items = dataset.get_items()
    return [({key: value for key, value in item.items() if key != "id"}, _Item(item, dataset)) for item in items]


class _Evaluations:
    """Opik's evaluation of a candidate on items by id, one candidate at a time, in a thread."""

    def __init__(self, optimizer: AggregatedUpdate, context: OptimizationContext) -> None:
        self._optimizer = optimizer
        self._context = context

    async def __call__(self, values: dict[str, Any], samples: Sequence[Sample]) -> list[Judged]:
        async with LocalExecutor(1) as thread:
            return list(await thread.call(self._evaluate, values, samples))

    def _evaluate(self, values: dict[str, Any], samples: Sequence[Sample]) -> list[Judged]:
        context = self._context
        found = self._optimizer.evaluate_prompt(
            prompt=_prompts_with(context.prompts, values),
            dataset=samples[0].info.dataset,
            metric=context.metric,
            agent=context.agent,
            dataset_item_ids=[sample.info.item["id"] for sample in samples],
            experiment_config=context.experiment_config,
            n_threads=self._optimizer.n_threads,
            verbose=0,
            allow_tool_use=context.allow_tool_use,
            return_evaluation_result=True,
        )
        context.trials_completed += 1
        results: dict[bytes, list[Any]] = {}
        for one in found.test_results:
            results.setdefault(_content_of(one.test_case.dataset_item_content), []).append(one)
        wanted = [results.get(_content_of(sample.info.item)) for sample in samples]
        return [
            self._judged(left.pop(0) if left else None, sample) for left, sample in zip(wanted, samples, strict=True)
        ]

    def _judged(self, result: Any, sample: Sample) -> Judged:
        if result is None:
            return Judged(error=EvaluationError("Opik returned no result for the item " + repr(sample.info.item["id"])))
        name = self._context.metric.__name__
        scores = [one for one in result.score_results if not one.scoring_failed and math.isfinite(one.value)]
        main = next((one for one in scores if one.name == name), None)
        if main is None:
            reasons = "; ".join(str(one.reason) for one in result.score_results)
            return Judged(error=EvaluationError(f"the metric {name} gave no score: {reasons}"))
        output, content = result.test_case.task_output, dict(result.test_case.dataset_item_content)
        lines = [f"{one.name}: {one.reason}" for one in scores if one.reason]
        return Judged(
            output=output.get("llm_output", output),
            score=float(main.value),
            feedback="\n".join(lines) or f"The item: {as_text(content)}",
            scores={one.name: float(one.value) for one in scores if one is not main},
        )


def _content_of(item: Mapping[str, Any]) -> bytes:
    """Return an item's content: an evaluation without an experiment gives items their own ids."""
    return canonical_json({key: value for key, value in item.items() if key != "id"}, hook=repr)


class EvaluationError(Exception):
    """Opik did not score an item."""


def _places_in(prompt: Any) -> list[tuple[str, int]]:
    """Return the name and the position of each text message: `system`, `user`, `user_2`."""
    messages = prompt.get_messages()
    roles = [message["role"] for message in messages]
    names = [f"{role}_{roles[:i].count(role) + 1}" if role in roles[:i] else role for i, role in enumerate(roles)]
    return [(name, i) for i, name in enumerate(names) if isinstance(messages[i].get("content"), str)]


def _parameters_of(name: str, prompt: Any, roles: Any) -> list[ParameterNode[Any]]:
    messages = prompt.get_messages()
    return [
        ParameterNode(messages[i]["content"], name=f"{name}.{place}", description=f"the {place} message of {name}")
        for place, i in _places_in(prompt)
        if messages[i]["role"] in roles
    ]


def _prompts_with(prompts: Prompts, values: Mapping[str, Any]) -> dict[str, ChatPrompt]:
    """Return copies of the prompts with these texts in their messages."""
    made = {}
    for name, prompt in prompts.items():
        messages = prompt.get_messages()
        for place, i in _places_in(prompt):
            messages[i]["content"] = values.get(f"{name}.{place}", messages[i]["content"])
        made[name] = prompt.copy()
        made[name].set_messages(messages)
    return made
