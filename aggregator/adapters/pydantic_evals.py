"""Data sets of pydantic-evals: their cases as data, their evaluators as a guide.

from aggregator.adapters.pydantic_evals import cases
tickets, guide = cases(dataset)
optimize(agent, tickets, guide=guide)
"""

from __future__ import annotations

from inspect import isawaitable
from math import fsum
from typing import Any

from pydantic_evals import Dataset
from pydantic_evals.evaluators import EvaluationReason, EvaluatorContext
from pydantic_evals.otel.span_tree import SpanTree

from aggregator.adapters.frameworks import require_version
from aggregator.errors import ConfigError, GuideError
from aggregator.records import Scores
from aggregator.text import shorten

SHOWN = 500
"""The number of characters of an expected output and of an output that the feedback quotes."""


def cases(dataset: Dataset[Any, Any, Any]) -> tuple[list[tuple[Any, int]], Evaluators]:
    """Return the cases of a data set as pairs (inputs, position), and the guide that evaluates outputs.

    Raises ConfigError for a data set without cases, and for a case without an evaluator.
    """
    require_version("pydantic-evals", "2.40", "3")
    if not dataset.cases:
        raise ConfigError("Expected a Dataset with cases, got one without")
    for i, case in enumerate(dataset.cases):
        if not [*case.evaluators, *dataset.evaluators]:
            raise ConfigError(
                f"Expected an evaluator for each case, got none for case {case.name or i}; give evaluators to the "
                "Dataset, such as EqualsExpected()"
            )
    return [(case.inputs, i) for i, case in enumerate(dataset.cases)], Evaluators(dataset)


class Evaluators:
    """The evaluators of a data set as a guide: the score is the mean of what they return as numbers or as bool.

    Each named result is a named score. The feedback holds the results with their reasons, including texts, and the
    expected output, unless everything is right. An evaluator that fails is a failure of the guide; a run's spans are
    not recorded for evaluators.
    """

    def __init__(self, dataset: Dataset[Any, Any, Any]) -> None:
        self.dataset = dataset

    async def __call__(self, x: Any, output: Any, info: int) -> Scores:
        """Evaluate the output of the case at position `info`. Raises GuideError if no evaluator returns a number."""
        case = self.dataset.cases[info]
        context: Any = EvaluatorContext(
            name=case.name,
            inputs=case.inputs,
            metadata=case.metadata,
            expected_output=case.expected_output,
            output=output,
            duration=0.0,
            _span_tree=SpanTree(),
            attributes={},
            metrics={},
        )
        named: dict[str, float] = {}
        lines: list[str] = []
        for evaluator in [*case.evaluators, *self.dataset.evaluators]:
            found = evaluator.evaluate(context)
            found = await found if isawaitable(found) else found
            name = evaluator.get_default_evaluation_name()
            for key, result in (found if isinstance(found, dict) else {name: found}).items():
                value, reason = (
                    (result.value, result.reason) if isinstance(result, EvaluationReason) else (result, None)
                )
                if isinstance(value, bool | int | float):
                    named[_free(key, named)] = float(value)
                lines.append(f"{key}: {value}{f' ({reason})' if reason else ''}")
        if not named:
            raise GuideError(f"Expected a number or a bool from an evaluator, got {'; '.join(lines) or 'nothing'}")
        if case.expected_output is not None and any(value < 1 for value in named.values()):
            lines.append(f"Expected {shorten(case.expected_output, SHOWN)}, got {shorten(output, SHOWN)}.")
        return Scores(primary=fsum(named.values()) / len(named), named=named, feedback="\n".join(lines))


def _free(key: str, taken: dict[str, float]) -> str:
    """Return an unused name for a result, with a number if two evaluators share one.

    >>> _free("right", {"right": 1.0})
    'right_2'
    """
    number = 2
    name = key
    while name in taken:
        name = f"{key}_{number}"
        number += 1
    return name
