"""Any guide gives a checked score and feedback, or fails; a failure is never a score of 0."""

from __future__ import annotations

import threading
from collections import namedtuple
from contextvars import ContextVar
from typing import Any

import pytest

from aggregator.errors import ConfigError, GuideError
from aggregator.executors.local import LocalExecutor
from aggregator.guides.calling import check_guide, judge
from aggregator.guides.judge import Verdict
from aggregator.guides.matching import exact_match

Pair = namedtuple("Pair", "score feedback")  # noqa: PYI024 - what a user may return


class NumpyScalar:
    """Like numpy.float64: not an int or a float, but convertible."""

    def __float__(self) -> float:
        return 0.25


@pytest.mark.requirement("Trace: any callable (x, output, info) -> (score, feedback)")
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (1, (1.0, "")),
        (0.5, (0.5, "")),
        (True, (1.0, "")),
        (False, (0.0, "")),
        (NumpyScalar(), (0.25, "")),
        (-3, (-3.0, "")),
        ((0.5, "Half."), (0.5, "Half.")),
        ((1, None), (1.0, "")),
        ([0, "No."], (0.0, "No.")),
        ((None, "Cannot say."), (None, "Cannot say.")),
        (Pair(1, "Yes."), (1.0, "Yes.")),
        (Verdict(0.5, "Half."), (0.5, "Half.")),
    ],
)
async def test_accepted_results_of_guides(answer: Any, expected: tuple[float | None, str]) -> None:
    """A score, a pair, or an object with both as attributes; bool, int and numpy scalars become float."""
    score, feedback = await judge(lambda x, output, info: answer, 1, 2, 3)
    assert (score, feedback) == expected
    assert score is None or type(score) is float


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (float("nan"), "the score nan"),
        (float("inf"), "the score inf"),
        ((float("nan"), "x"), "the score nan"),
        ("0.5", "a score of type str"),
        ({"score": 1}, "a score of type dict"),
        (None, "None; does it end without `return`"),
        ((1, "a", "b"), "a tuple of 3"),
        ((1, 5), "feedback of type int"),
        (10**400, "a score that is no number"),
    ],
)
async def test_an_invalid_verdict_is_not_a_score_of_zero(answer: Any, got: str) -> None:
    """NaN, text and None are a failure that names the guide; a broken guide does not make a bad agent."""

    def my_guide(x: Any, output: Any, info: Any) -> Any:
        return answer

    with pytest.raises(GuideError, match="from the guide .*my_guide, got ") as caught:
        await judge(my_guide, 1, 2, 3)
    assert got in str(caught.value)


async def test_a_guides_exception_is_raised() -> None:
    """It reaches the trainer unchanged, which records it."""

    def broken(x: Any, output: Any, info: Any) -> float:
        raise ZeroDivisionError("no division")

    with pytest.raises(ZeroDivisionError, match="no division"):
        await judge(broken, 1, 2, 3)


@pytest.mark.requirement("Trace: any callable (x, output, info) -> (score, feedback)")
async def test_accepted_callables() -> None:
    """Functions, coroutine functions, objects of either kind, and functions that return an awaitable."""

    async def later(x: Any, output: Any, info: Any) -> Any:
        return x + output + info

    class Object:
        def __call__(self, x: Any, output: Any, info: Any) -> Any:
            return x + output + info

    class AsyncObject:
        async def __call__(self, x: Any, output: Any, info: Any) -> Any:
            return x + output + info

    def returns_an_awaitable(x: Any, output: Any, info: Any) -> Any:
        return later(x, output, info)

    guides = [later, Object(), AsyncObject(), returns_an_awaitable]
    async with LocalExecutor(2) as executor:
        for call in (None, executor.call):
            assert [await judge(guide, 1, 2, 3, call=call) for guide in guides] == [(6.0, "")] * 4


@pytest.mark.requirement("Trace: AutoGuide")
async def test_guides_of_trace_are_accepted() -> None:
    """An AutoGuide is called by `get_feedback(query, response, reference)`, whatever other methods it has."""

    class AutoGuide:
        def get_feedback(self, query: str, response: str, reference: str | None = None, **kwargs: Any) -> Any:
            return float(response == reference), f"{query} -> {response}"

        def __call__(self, *arguments: Any) -> Any:
            raise AssertionError

    assert await judge(AutoGuide(), "2+2", "4", "4") == (1.0, "2+2 -> 4")


async def test_a_synchronous_guide_runs_in_the_executor() -> None:
    """A synchronous guide runs in the executor's threads with the caller's context; an async one in the event loop."""
    place: ContextVar[str] = ContextVar("place", default="lost")
    seen: list[tuple[str, str]] = []

    def slow(x: Any, output: Any, info: Any) -> float:
        seen.append((threading.current_thread().name, place.get()))
        return 1

    async def quick(x: Any, output: Any, info: Any) -> float:
        seen.append((threading.current_thread().name, place.get()))
        return 1

    place.set("here")
    async with LocalExecutor(1) as executor:
        await judge(slow, 1, 2, 3, call=executor.call)
        await judge(quick, 1, 2, 3, call=executor.call)
    assert seen[0][0].startswith("aggregator-worker")
    assert seen[1][0] == threading.current_thread().name
    assert [name for _, name in seen] == ["here", "here"]


async def test_an_instant_guide_needs_no_thread() -> None:
    """A guide that is marked as pure computation runs in the event loop."""

    async def refuse(function: Any, *args: Any) -> Any:
        raise AssertionError("a thread was asked for")

    assert await judge(exact_match, "2 + 2?", "4", "4", call=refuse) == (1.0, "Correct.")


class TraceGuide:
    """Trace's base class: a call runs `forward`, which runs `get_feedback`."""

    def __call__(self, task: str, response: str, info: Any, **kwargs: Any) -> Any:
        return self.forward(task, response, info, **kwargs)

    def forward(self, task: str, response: str, info: Any, **kwargs: Any) -> Any:
        return self.get_feedback(task, response, info, **kwargs)

    def get_feedback(self, query: str, response: str, reference: str | None = None, **kwargs: Any) -> Any:
        raise NotImplementedError


class ForwardGuide(TraceGuide):
    def forward(self, task: str, response: str, info: Any, **kwargs: Any) -> Any:
        return float(response == info), "by forward"


class AsyncFeedbackGuide(TraceGuide):
    async def get_feedback(self, query: str, response: str, reference: str | None = None, **kwargs: Any) -> Any:
        return float(response == reference), "by get_feedback"


class CalledGuide(ForwardGuide):
    def __call__(self, task: str, response: str, info: Any, **kwargs: Any) -> Any:
        return self.forward(task, response, info)[0] / 2, "by the call"


@pytest.mark.parametrize(
    ("guide", "expected"),
    [
        (ForwardGuide(), (1.0, "by forward")),
        (AsyncFeedbackGuide(), (1.0, "by get_feedback")),
        (CalledGuide(), (0.5, "by the call")),
    ],
    ids=["forward", "get_feedback", "call"],
)
async def test_an_overridden_forward_of_a_trace_guide_is_called(guide: Any, expected: Any) -> None:
    """The method that a subclass overrides is called."""
    check_guide(guide)
    assert await judge(guide, "2 + 2?", "4", "4") == expected


def test_a_guide_with_other_arguments_is_shown_with_them() -> None:
    """The error printed `<function <lambda>>` alone, which does not show what is missing."""
    with pytest.raises(ConfigError, match=r"got <function .*> with the arguments \(x, output\)"):
        check_guide(lambda x, output: 1.0)
