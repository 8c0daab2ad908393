"""Which values a run ends with: the validation set chooses the best, the test set never does.

The run goes on from its last values, and so does its resume; the best are written at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from msgspec.structs import replace

from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode, write
from aggregator.cassettes.lineage import current_lineage, lineage
from aggregator.errors import ConfigError
from aggregator.llm.ledger import collecting
from aggregator.records import Evaluation, Kept, TrainingResult, Values
from aggregator.training.checkpoints import RunState
from aggregator.training.evaluation import Evaluations, failures_of, lowest_of, mean, scores_of
from aggregator.training.gates import compare_runs
from aggregator.training.plan import Plan


def check_keep(keep: Any, *, validates: bool) -> Kept:
    """Return which values to keep, by default the best if a validation set can choose them; raises ConfigError."""
    if keep is None:
        return "best" if validates else "last"
    if keep not in get_args(Kept):
        raise ConfigError(f"Expected keep 'best' or 'last', got {keep!r}")
    if keep == "best" and not validates:
        raise ConfigError("Expected validate_dataset beside keep='best', got none; the test set never chooses")
    kept: Kept = keep
    return kept


async def validate(state: RunState, values: Values, plan: Plan, evaluations: Evaluations, steps: int) -> RunState:
    """Return the state with the validation scores of these values, and with them as the best if they are better.

    The scores of values that were validated before cost nothing. Ties keep the earlier values. Instances that were lost
    are compared as by `compare_runs`.
    """
    with lineage("validate", f"step={steps}"), collecting() as ledger:
        evaluate = evaluations.at(steps, current_lineage().split("/"))
        runs = await evaluate(values, plan.validation)
        best, best_step = state.best, state.best_step
        if best is None:
            best, best_step = values, steps
        elif best != values:
            known = await evaluate(best, plan.validation)
            if compare_runs(known, runs, min_score=plan.min_score).accepted:
                best, best_step = values, steps
    scores = tuple(run.score for run in runs)
    lowest = lowest_of(scores, *(seen.scores for seen in state.validations), min_score=plan.min_score)
    evaluation = Evaluation(
        step=steps,
        score=mean(scores_of(runs, lowest)),
        scores=scores,
        failures=failures_of(runs),
        usage=ledger.totals(),
    )
    return replace(state, best=best, best_step=best_step, validations=(*state.validations, evaluation))


def values_named(result: TrainingResult, which: Kept) -> Values:
    """Return the best or the last values of a result."""
    if which not in get_args(Kept):
        raise ConfigError(f"Expected 'best' or 'last', got {which!r}")
    return result.best_parameters if which == "best" else result.last_parameters


def apply_values(agent: Any, parameters: Sequence[ParameterNode[Any]], values: Mapping[str, Any], which: Kept) -> None:
    """Write the values of a run to its agent, all or none; a Module remembers which they are, and `save` says so."""
    if isinstance(agent, Module) and set(values) <= set(agent.parameters_dict()):
        agent.apply(dict(values), which=which)
    else:
        write(parameters, dict(values))


Keep = Literal["best", "last"] | None
"""What `train(keep=...)` takes; None is the best with a validation set, else the last."""
