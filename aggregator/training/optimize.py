"""`optimize`: from a prompt, values, a function or an agent, and some data, to trained values in one call."""

from __future__ import annotations

import secrets
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, Literal

from aggregator.adapters.agents import as_agent
from aggregator.adapters.template import own_verdict
from aggregator.checks import is_finite
from aggregator.errors import ConfigError
from aggregator.llm.budget import Budget
from aggregator.llm.ledger import Prices
from aggregator.llm.observed import Clients
from aggregator.observing.observer import Watching
from aggregator.portal import sync_function
from aggregator.protocols import AnyGuide, Executor
from aggregator.records import Sample, TrainingResult
from aggregator.training.batches import Dataset, samples
from aggregator.training.merge import LLMMerge
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.schedules import Schedule
from aggregator.training.step import AnyOptimizer, Check, Gate, Search, UpdateRule
from aggregator.training.stops import AnyStop
from aggregator.training.trainer import Trainer

RUNS = "runs"
"""The folder in which each call makes its own folder."""

Pairs = list[tuple[Any, Any]]

Evaluator = Callable[[dict[str, Any], Any], Any]
"""Scores named values on a row: (values, row) -> score or (score, feedback)."""


async def aoptimize(
    thing: Any,
    data: Dataset,
    *,
    guide: AnyGuide | Evaluator | None,
    model: Any = None,
    optimizer: AnyOptimizer | None = None,
    budget: Budget | None = None,
    clients: Clients = "all",
    prices: Prices | None = None,
    seed: int = 0,
    validate: float | Dataset = 0.2,
    test_dataset: Dataset | None = None,
    run_dir: str | Path | Literal[False] | None = None,
    batch_size: int = 4,
    num_epochs: int = 1,
    stepsize: float | Schedule = 0.5,
    rule: UpdateRule | None = None,
    gate: Gate | None = None,
    search: Search | None = None,
    checks: Sequence[Check] | None = None,
    max_score: float | None = None,
    executor: Executor | None = None,
    observers: Sequence[Watching] | None = None,
    stop: AnyStop | Sequence[AnyStop] | None = None,
    instance_timeout: float | None = None,
    sample: int = 0,
    show: bool = True,
) -> TrainingResult:
    """Train `thing` on `data` and return the result; afterwards `thing` has the best values.

    `thing` is a template ("Classify: {ticket}"), a mapping of named seed values, or an agent (see `as_agent`). `guide`
    is `(x, output, info) -> score` or `(score, feedback)`; for a mapping `(values, row)`. `model` answers a template,
    proposes and merges. `validate` is a share of the data, split off by `seed`, or a data set, to choose values by; 0
    keeps the last. Instances with the best score (`max_score`, or the guide's) get no proposal. `show` writes the plan,
    with the cost of `sample` rollouts. `run_dir` is a new folder, False none. See `Trainer` and `train` for more.
    """
    known = getattr(guide, "max_score", None) if max_score is None else max_score
    trainer = Trainer(
        as_agent(thing, model=model, evaluator=guide) if isinstance(thing, str | Mapping) else thing,
        LLMOptimizer(llm=model) if optimizer is None else optimizer,
        rule=LLMMerge(model) if rule is None and model is not None else rule,  # None: the optimizer's model merges
        gate=gate,
        search=search,
        checks=checks,
        skip_perfect=known is not None,
        max_score=known,
        executor=executor,
        observers=observers,
        budget=budget,
        clients=None if getattr(executor, "is_remote", False) and clients == "all" else clients,
        prices=prices,
        seed=seed,
    )
    train, validation = split(samples(data, name="data"), validate, seed)
    judge: Any = own_verdict if isinstance(thing, Mapping) else guide
    options: Any = {"batch_size": batch_size, "num_epochs": num_epochs, "test_dataset": test_dataset}
    await _show_plan(trainer, judge, train, validation, sample=sample, show=show, **options)
    options |= {"stop": stop, "instance_timeout": instance_timeout, "stepsize": stepsize}
    return await trainer.atrain(judge, train, validate_dataset=validation or None, run_dir=_run_dir(run_dir), **options)


optimize = sync_function(aoptimize)
optimize.__doc__ = f"""{aoptimize.__doc__}
    Raises ConfigError for an invalid argument, and TrainingError, with the partial `.result`, if a run cannot continue.

    >>> from aggregator.testing import ScriptedModel, suggestion
    >>> optimizer = ScriptedModel(suggestion(instruction="Double it."))
    >>> def agent(x, *, instruction="Return it."):
    ...     return 2 * x if "Double" in instruction else x
    >>> def guide(x, output, info):
    ...     return float(output == info), f"expected {{info}}, got {{output}}"
    >>> data = [(1, 2), (2, 4), (3, 6), (4, 8)]
    >>> result = optimize(agent, data, guide=guide, model=optimizer, run_dir=False, show=False, observers=[])
    >>> result.parameters, result.validation_scores
    ({{'instruction': 'Double it.'}}, [0.0, 1.0])
    """


def split(data: Sequence[Sample], validate: float | Dataset, seed: int) -> tuple[Pairs, Pairs]:
    """Return the training pairs and the validation pairs: a share drawn by `seed`, or a separate data set.

    At least one of each, in the order of the data. Raises ConfigError for a share outside [0, 1), and for a share of a
    single row.

    >>> train, chosen = split([Sample(i, i) for i in range(10)], 0.2, seed=0)
    >>> len(train), len(chosen), sorted(x for x, _ in [*train, *chosen]) == list(range(10))
    (8, 2, True)
    """
    if not isinstance(validate, int | float):
        return _pairs(data), _pairs(samples(validate, name="validate"))
    if not is_finite(validate) or not 0 <= validate < 1:
        raise ConfigError(f"Expected validate to be a share in [0, 1) or a data set, got {validate!r}")
    if validate == 0:
        return _pairs(data), []
    if len(data) < 2:
        raise ConfigError("Expected at least 2 rows to split a validation part off, got 1; give validate=0")
    count = min(max(1, round(validate * len(data))), len(data) - 1)
    chosen = set(Random(f"{seed}/validate").sample(range(len(data)), count))  # noqa: S311 - a split, not a secret
    parts = [[one for i, one in enumerate(data) if (i in chosen) == wanted] for wanted in (False, True)]
    return _pairs(parts[0]), _pairs(parts[1])


async def _show_plan(
    trainer: Trainer, guide: Any, train: Pairs, validation: Pairs, *, show: bool, **options: Any
) -> None:
    """Write the plan to standard error on request; its warnings are part of its text."""
    if not show:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = await trainer.aplan(guide, train, validate_dataset=validation or None, **options)
    sys.stderr.write(f"{plan}\n")


def _pairs(data: Sequence[Sample]) -> Pairs:
    return [(one.x, one.info) for one in data]


def _run_dir(given: str | Path | Literal[False] | None) -> Path | str | None:
    if given is False:
        return None
    if given is not None:
        return given
    return Path(RUNS) / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
