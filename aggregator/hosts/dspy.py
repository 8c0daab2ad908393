"""Our algorithm as an optimizer of DSPy's: `AggregatedUpdate(metric, model=llm).compile(program, trainset=rows)`.

It is `optimize` on a copy of the program: the same arguments and the same seed give the same proposals, and the same
program. `lm` is a model of ours for DSPy's programs (`aggregator.hosts.dspy_engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import dspy
from dspy.teleprompt import Teleprompter

from aggregator.adapters.dspy import DspyAgent
from aggregator.errors import ConfigError
from aggregator.hosts.dspy_engine import AsyncEngine, Engine, lm
from aggregator.llm.budget import Budget
from aggregator.records import TrainingResult
from aggregator.training.optimize import optimize
from aggregator.training.schedules import Schedule
from aggregator.training.step import AnyOptimizer, Check, Gate, Search, UpdateRule

__all__ = ["AggregatedUpdate", "AsyncEngine", "Engine", "lm"]


class AggregatedUpdate(Teleprompter):
    """Trains a program minibatch by minibatch: a proposal for each instance, merged by a model.

    `metric` is DSPy's `(gold, prediction, trace=None)`, which returns a score or a Prediction with score and feedback.
    `train` names what is trained of each predictor: instructions, fields, demos. The other arguments are those of
    `aggregator.optimize`; `valset` of `compile` takes the place of `validate`. `result` is the latest run's.
    """

    def __init__(
        self,
        metric: Callable[..., Any],
        *,
        train: Sequence[str] = ("instructions",),
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
        super().__init__()
        self.metric, self.train = metric, train
        self.validate = validate
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

    def compile(
        self,
        student: Any,
        *,
        trainset: Sequence[Any],
        teacher: Any = None,
        valset: Sequence[Any] | None = None,
    ) -> Any:
        """Return a trained copy of the program; the student is untouched.

        Raises ConfigError for a teacher, which this algorithm has no use for, and what `optimize` raises.
        """
        if teacher is not None:
            raise ConfigError("Expected no teacher, got one; AggregatedUpdate learns from the student's own rollouts")
        if not isinstance(student, dspy.Module):
            raise ConfigError(f"Expected a dspy.Module to compile, got {student!r}")
        program = student.deepcopy()
        validate = self.validate if valset is None else list(valset)
        agent = DspyAgent(program, self.train)
        self.result = optimize(agent, list(trainset), guide=self.metric, validate=validate, **self.options)
        program._compiled = True  # noqa: SLF001 - as DSPy's own optimizers do: an outer one leaves it as it is
        return program
