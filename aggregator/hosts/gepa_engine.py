"""Our algorithm as an engine of GEPA's `optimize_anything`.

    register()
    config = OptimizeAnythingConfig(engine="aggregated_update", max_evals=200, max_token_cost=2.0,
                                    engine_config={"model": "openai/gpt-4o", "batch_size": 8})
    optimize_anything("Answer briefly.", evaluator=evaluate, dataset=rows, config=config)

It runs `optimize` on the seed's texts, evaluated by GEPA's server with its budget of evaluations. `max_token_cost` is a
budget in USD for proposing and merging. Engines are in versions of GEPA after 0.1.4 (`gepa.oa`); with earlier ones,
give `ReflectionConfig(reflection_strategy=AggregatedReflection(...))`.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

import gepa.oa.engines  # noqa: F401 - registers GEPA's own, which a first registration of another would keep out
from gepa.oa.budget import BudgetExhausted
from gepa.oa.engine import Result
from gepa.oa.registry import register_engine

from aggregator.errors import BudgetExceededError, ConfigError
from aggregator.llm.budget import Budget
from aggregator.records import TrainingResult
from aggregator.text import as_text, list_names
from aggregator.training.optimize import optimize
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.stops import target

NAME = "aggregated_update"
COMPONENT = "candidate"
"""The name of a seed candidate that is a single text."""

OPTIONS = {
    "model": None,
    "optimizer": None,
    "rule": None,
    "batch_size": 4,
    "num_epochs": 20,
    "stepsize": 0.5,
    "seed": 0,
}
"""The options of `engine_config`, with defaults."""


class AggregatedEngine:
    """A GEPA engine; `engine_config` holds `OPTIONS`, which are arguments of `aggregator.optimize`.

    Values are chosen by the validation set, without one by the training set, each candidate once. Raises ConfigError
    for an unknown option, and for a missing seed.
    """

    name = NAME

    def __init__(self, config: Any) -> None:
        if unknown := [name for name in config.engine_config if name not in OPTIONS]:
            raise ConfigError(f"Expected engine_config with {', '.join(OPTIONS)}, got {list_names(unknown)}")
        self.options = {**OPTIONS, **config.engine_config}
        self.budget = None if config.max_token_cost is None else Budget(usd=config.max_token_cost)
        self.stop = None if config.stop_at_score is None else target(config.stop_at_score)
        self.run_dir: Any = config.run_dir or False

    def run(self, task: Any, server: Any) -> Any:
        """Return the best candidate; an exhausted budget ends the run with the best so far."""
        seed = task.seed_candidate
        if not seed:
            raise ConfigError("Expected a seed_candidate to begin with, got none; write a first text")
        values = dict(seed) if isinstance(seed, Mapping) else {COMPONENT: seed}
        evaluate = _Evaluator(server, is_text=not isinstance(seed, Mapping))
        train = [(row, None) for row in task.train_set or task.val_set or [None]]
        options: dict[str, Any] = dict(self.options)
        if options["optimizer"] is None:
            objective = "\n\n".join(filter(None, (task.objective, task.background))) or None
            options["optimizer"] = LLMOptimizer(llm=options["model"], objective=objective)
        result: TrainingResult | None
        try:
            result = optimize(
                values,
                train,
                guide=evaluate,
                validate=[(row, None) for row in task.val_set or ()] or train,
                budget=self.budget,
                stop=self.stop,
                run_dir=self.run_dir,
                clients=(),  # the evaluator's calls are not charged to the engine
                show=False,
                **options,
            )
        except BudgetExceededError as error:
            result = error.result
        reached = result.validation_scores if result else []
        usage = result.usage if result else {}
        spent = [usage[role].cost or 0.0 for role in ("optimizer", "aggregator") if role in usage]
        return Result(
            best_candidate=evaluate.candidate(result.best_parameters if result else values),
            best_score=max(reached, default=0.0),
            total_evals=server.budget.used,
            metadata={"adapter_cost": sum(spent), "steps": len(result.history) if result else 0},
        )

    def process_result(self, result: Any, output_dir: Any) -> None:
        """Do nothing: `run_dir` has everything that is kept."""


def register() -> None:
    """Register this engine for `OptimizeAnythingConfig(engine="aggregated_update")`."""
    register_engine(NAME, AggregatedEngine)


class _Evaluator:
    """Scores named values on GEPA's server, and sends it no more evaluations than its budget allows.

    The server itself counts an evaluation at its end, and does not limit concurrent ones.
    """

    def __init__(self, server: Any, *, is_text: bool) -> None:
        self._server, self._is_text = server, is_text
        self._left: int | None = server.budget.remaining
        self._lock = Lock()

    def candidate(self, values: Mapping[str, Any]) -> Any:
        """Return values as GEPA's candidate: a text, or texts by component."""
        return values[COMPONENT] if self._is_text else dict(values)

    def __call__(self, values: dict[str, Any], row: Any) -> tuple[float, str]:
        """Return score and feedback."""
        with self._lock:
            if self._left is not None:
                if self._left == 0:
                    raise BudgetExceededError(
                        f"Expected at most {self._server.budget.max_evals} evaluations, GEPA's budget, got one more"
                    )
                self._left -= 1
        try:
            score, info = self._server.evaluate(self.candidate(values), row)
        except BudgetExhausted as error:
            raise BudgetExceededError(str(error)) from error
        shown = {key: value for key, value in info.items() if not key.startswith("_")}
        if [key.lower() for key in shown] == ["feedback"]:
            (shown,) = shown.values()
        return score, as_text(shown) if shown else ""
