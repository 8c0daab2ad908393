"""Observers: what is accepted, what they see, and what happens if one raises."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from aggregator.errors import ConfigError
from aggregator.observing.observer import EVENTS, Observer, as_observer, as_observers, from_logger, notify
from aggregator.observing.observer import notify_failed as notify_of_failure
from aggregator.records import (
    Decision,
    Evaluation,
    Failure,
    FullStepReport,
    Proposal,
    Rollout,
    RunInfo,
    StepReport,
    Usage,
)

INFO = RunInfo(
    trainer="AggregatedUpdate",
    agent="Router",
    optimizer="LLMOptimizer",
    guide="exact_match",
    parameters={"rule": "Answer."},
    seed=0,
    steps=2,
    num_epochs=1,
    batch_size=2,
    train_samples=4,
    usage={"agent": Usage(input_tokens=5, calls=3)},
)


def report(step: int = 0, *, accepted: bool = True, **facts: Any) -> FullStepReport:
    given: dict[str, Any] = {
        "sample_ids": (0, 1),
        "scores": (1.0, 0.0),
        "score": 0.5,
        "decision": Decision(accepted=accepted, reason="mean score 0.5 -> 0.25 on 2 instances"),
        "update": {"rule": "Answer briefly."},
        "usage": {"agent": Usage(input_tokens=7, output_tokens=3, cost=0.25, calls=2)},
    }
    return FullStepReport(epoch=0, step=step, **{**given, **facts})


class Values:
    """A logger in Trace's shape that records its calls."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, Any, int]] = []

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        self.logged.append((name, data, step))


def test_every_method_of_an_observer_does_nothing() -> None:
    """The base class has one method per event, all of them optional."""
    assert [event for event in EVENTS if getattr(Observer(), event)(None) is not None] == []


def test_a_callable_sees_the_steps() -> None:
    """The shortest observer is a function of a StepReport."""
    seen: list[Any] = []
    observer = as_observer(seen.append)
    assert [getattr(observer, event)(event) for event in EVENTS] == [None] * len(EVENTS)
    assert seen == ["step"]


def test_an_object_with_some_methods_gets_these_events() -> None:
    """It need not derive from Observer, and is not called for a step if it has methods."""

    class Watch:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def started(self, info: RunInfo) -> None:
            self.seen.append(info)

        def finished(self, result: Any) -> None:
            self.seen.append(result)

        def __call__(self, report: StepReport) -> None:
            raise AssertionError(report)

    watch = Watch()
    observer = as_observer(watch)
    for event in EVENTS:
        getattr(observer, event)(event)
    assert watch.seen == ["started", "finished"]


class Late:
    def step(self) -> None: ...


class Nothing: ...


@pytest.mark.parametrize(
    ("thing", "got"),
    [
        (3, "got 3"),
        ("wandb", "got 'wandb'"),
        (Nothing(), "got "),
        (Values, "got the class Values; give an instance, as in Values(...)"),
        (Late(), "its step() must take one argument, the record"),
        (lambda: None, "it must take one argument, the record"),
    ],
)
def test_an_invalid_observer(thing: Any, got: str) -> None:
    """The error lists what is accepted, and what it got."""
    with pytest.raises(ConfigError, match=r"^Expected a callable that takes a StepReport, an Observer, or") as error:
        as_observer(thing)
    assert got in str(error.value)
    with pytest.raises(ConfigError, match=r"^Expected observers=\[\.\.\.\], each a callable that takes a StepReport"):
        as_observers([thing])


def test_one_observer_instead_of_a_list() -> None:
    """`observers=print` is an error, because a list is expected."""
    with pytest.raises(ConfigError, match=re.escape("Expected observers=[...]")):
        as_observers(print)


def test_a_logger_gets_the_baseline_refusals_failures_usage_and_cost() -> None:
    """It got only three kinds of value: the two scores and the parameters."""
    logger = Values()
    observer = from_logger(logger)
    observer.started(INFO)
    observer.evaluation(Evaluation(step=0, score=0.25, scores=(0.25,), usage={"agent": Usage(cost=0.5, calls=1)}))
    observer.step(report(test_score=0.75))
    observer.step(report(1, accepted=False, failures=(Failure(stage="agent", error="KeyError", message="'x'"),)))
    observer.step(report(2, accepted=False, update={}, usage={}))
    assert logger.logged == [
        ("Average test score before training", 0.25, 0),
        ("Average train score", 0.5, 0),
        ("Average test score", 0.75, 0),
        ("Parameter: rule", "Answer briefly.", 0),
        ("Calls so far", 6, 0),
        ("Tokens so far", 15, 0),
        ("USD so far", 0.75, 0),
        ("Average train score", 0.5, 1),
        ("Update refused", "mean score 0.5 -> 0.25 on 2 instances", 1),
        ("Failures", 1, 1),
        ("First failure", "agent: KeyError: 'x'", 1),
        ("Calls so far", 8, 1),
        ("Tokens so far", 25, 1),
        ("USD so far", 1.0, 1),
        ("Average train score", 0.5, 2),
        ("No update", "mean score 0.5 -> 0.25 on 2 instances", 2),
        ("Calls so far", 8, 2),
        ("Tokens so far", 25, 2),
        ("USD so far", 1.0, 2),
    ]


@pytest.mark.parametrize(("frequency", "steps"), [(0, []), (1, [0, 1, 2, 3]), (3, [2])])
def test_frequency_counts_steps(frequency: int, steps: list[int]) -> None:
    """0 logs nothing, including the baseline; the sums count steps that are not logged, too."""
    logger = Values()
    observer = from_logger(logger, frequency)
    observer.evaluation(Evaluation(step=0, score=0.25, scores=(0.25,)))
    for step in range(4):
        observer.step(report(step))
    assert [step for name, _, step in logger.logged if name == "Average train score"] == steps
    assert [data for name, data, _ in logger.logged if name == "Calls so far"] == [2 * step + 2 for step in steps]
    assert ("Average test score before training" in {name for name, _, _ in logger.logged}) is bool(frequency)


async def test_an_observer_that_raises_is_named() -> None:
    """Its error is raised with a note that names the observer."""

    class Breaks(Observer):
        async def step(self, report: FullStepReport, /) -> None:
            raise ZeroDivisionError

    seen: list[StepReport] = []
    with pytest.raises(ZeroDivisionError) as error:
        await notify([as_observer(seen.append), Breaks(), as_observer(seen.append)], "step", report())
    assert error.value.__notes__ == ["raised in step() of the observer Breaks()"]
    assert len(seen) == 1


async def test_an_observer_that_raises_in_failed_does_not_hide_the_error() -> None:
    """The error that ends the run is raised, and the other observers still see it."""

    class Breaks(Observer):
        def failed(self, error: BaseException, /) -> None:
            raise OSError("disk full")

    class Sees(Observer):
        errors: tuple[BaseException, ...] = ()

        async def failed(self, error: BaseException, /) -> None:
            self.errors = (error,)

    ended, sees = KeyError("x"), Sees()
    await notify_of_failure([Breaks(), sees], ended)
    assert sees.errors == (ended,)
    assert ended.__notes__ == ["OSError: disk full\nraised in failed() of the observer Breaks()"]


def test_a_slim_report_holds_no_outputs() -> None:
    """Its size does not depend on what agents and models wrote, and it can be loaded again."""
    big = "x" * 100_000
    full = report(
        rollouts=(Rollout(sample_id=0, output=big, transcript=big),),
        all_proposals=(Proposal(values={"rule": big}, reasoning=big),),
        lineages=("train/epoch=0/batch=0/sample=0",),
    )
    kept = msgspec.json.encode(full.slim())
    assert type(full.slim()) is StepReport
    assert len(kept) < 1_000
    assert msgspec.json.decode(kept, type=StepReport) == full.slim() == report().slim()
