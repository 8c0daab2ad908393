"""A bug in the user's code stops the run with its traceback, before the run is paid for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from training_fakes import ScriptedModel, suggest

from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import RateLimitError, TrainingError, TrainingWarning
from aggregator.records import TrainingResult
from aggregator.training.algorithms import AggregatedUpdate, BasicSearchAlgorithm
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.rollouts import cause_of

DATA = [(f"q{i}", "no") for i in range(8)]


class Base(Module):
    """An agent with a model, and a bug in `forward`."""

    def __init__(self) -> None:
        self.llm = ScriptedModel(lambda messages: "yes")
        self.prompt = ParameterNode("Say yes.")


class ForgotData(Base):
    def forward(self, x: str) -> Any:
        return self.llm(messages=[{"role": "system", "content": self.prompt + " now"}]).text  # type: ignore[operator]


class ForgotAwait(Base):
    async def forward(self, x: str) -> Any:
        return self.llm.complete([{"role": "user", "content": x}])


class UsedCoroutine(Base):
    async def forward(self, x: str) -> Any:
        answer: Any = self.llm.complete([{"role": "user", "content": x}])
        answer.close()
        return answer.text


class WrongSignature(Base):
    def forward(self) -> Any:
        return "yes"


class ReturnsCompletion(Base):
    def forward(self, x: str) -> Any:
        return self.llm(messages=[{"role": "user", "content": x}])


class ReturnsGenerator(Base):
    def forward(self, x: str) -> Iterator[str]:
        yield x


class ReturnsAsyncGenerator(Base):
    def forward(self, x: str) -> AsyncIterator[str]:
        async def stream() -> AsyncIterator[str]:
            yield x

        return stream()


class ReturnsList(Base):
    """A list comprehension without `await`, in a dict."""

    async def forward(self, x: str) -> Any:
        return {"answers": [self.llm.complete([{"role": "user", "content": x}]) for _ in range(2)]}


class ReturnsMethod(Base):
    def forward(self, x: str) -> Any:
        return x.upper


class ReturnsIterator(Base):
    """`map` makes an iterator, not a list."""

    def forward(self, x: str) -> Any:
        return {"answers": map(str.upper, x)}


class ReturnsFuture(Base):
    """Of a pool, without `.result()`."""

    def forward(self, x: str) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(x.upper)


class ReturnsParameter(Base):
    def forward(self, x: str) -> Any:
        return self.prompt


def exact(x: str, output: str, info: str) -> tuple[float, str]:
    return float(output == info), "fb"


def broken_guide(x: str, output: str, info: str) -> float:
    return float({"other": 1.0}[x])


def silent_guide(x: str, output: str, info: str) -> None:
    """A guide that forgot its return."""


BUGS = [
    (ForgotData, "test_user_bugs.py:", r"write `\.data`"),
    (ForgotAwait, "Expected the agent's answer, got a coroutine", "write `await`"),
    (UsedCoroutine, "test_user_bugs.py:", "write `await`"),
    (WrongSignature, "positional argument", "does not fit the function"),
    (ReturnsCompletion, "got a Completion", r"write `\.text`"),
    (ReturnsGenerator, "got a generator", r"list\(\.\.\.\)"),
    (ReturnsAsyncGenerator, "got an async generator", "async for"),
    (ReturnsList, "got a dict with a list with a coroutine", "write `await`"),
    (ReturnsMethod, "got the method upper", "call it"),
    (ReturnsIterator, "got a dict with a map;", r"list\(\.\.\.\)"),
    (ReturnsFuture, "got an awaitable Future", "wait for it"),
    (ReturnsParameter, "got a ParameterNode", r"write `\.data`"),
]


def train(agent: Module, guide: Any = exact, kind: Any = AggregatedUpdate, **options: Any) -> tuple[ScriptedModel, Any]:
    llm = ScriptedModel(lambda messages: suggest(prompt="Say no."))
    trainer = kind(agent, LLMOptimizer(llm=llm), **({"llm": llm} if kind is AggregatedUpdate else {}))
    try:
        return llm, trainer.train(guide, DATA, **options)
    except TrainingError as error:
        return llm, error


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"batch_size": 8}, {"batch_size": 1, "test_dataset": DATA}])
@pytest.mark.parametrize("kind", [AggregatedUpdate, BasicSearchAlgorithm])
@pytest.mark.parametrize(("bug", "place", "cause"), BUGS)
def test_a_bug_of_the_agent_stops_the_run(bug: Any, place: str, cause: str, kind: Any, options: Any) -> None:
    """The optimizer got it as feedback in every paid step, and no traceback was shown."""
    llm, error = train(bug(), kind=kind, **options)
    assert isinstance(error, TrainingError)
    with pytest.raises(TrainingError, match=f"(?s){place}.*Likely cause: .*{cause}"):
        raise error
    assert "4 rollouts in a row" in str(error)
    assert str(Path(__file__).parent) not in str(error)
    assert not llm.asked


@pytest.mark.parametrize(("guide", "text"), [(broken_guide, "test_user_bugs.py:"), (silent_guide, "without `return`")])
def test_a_bug_of_the_guide_stops_the_run(guide: Any, text: str) -> None:
    """It stops the run even if `max_failure_ratio` would allow it."""

    class Right(Base):
        def forward(self, x: str) -> str:
            return "no"

    llm, error = train(Right(), guide, batch_size=4, max_failure_ratio=1.0)
    assert text in str(error)
    assert "the guide to work" in str(error)
    assert not llm.asked


def test_a_failure_after_a_success_gets_a_proposal_and_a_warning() -> None:
    """The result has a line for it, with the traceback."""

    class Sometimes(Base):
        def forward(self, x: str) -> str:
            if x == "q0":
                raise KeyError("lang")
            return "yes"

    with pytest.warns(TrainingWarning, match="(?s)the agent failed 1 times with KeyError at test_user_bugs.py:.*lang"):
        llm, result = train(Sometimes(), batch_size=8)
    assert isinstance(result, TrainingResult)
    assert len(llm.asked) == 8  # one for each instance, including the failed one; they agree, so there is no merge
    assert "raise KeyError" in str(result)
    assert result.failures[0].where.startswith("test_user_bugs.py:")


@pytest.mark.parametrize("place", ["agent", "guide"])
def test_next_of_an_empty_iterator_hung_the_run(place: str) -> None:
    """It is a failure with the line of the user's code."""

    class Nothing(Base):
        def forward(self, x: str) -> str:
            return next(iter(())) if place == "agent" and x == "q3" else "yes"

    def guide(x: str, output: str, info: str) -> float:
        return next(iter(())) if place == "guide" and x == "q3" else 0.5

    with pytest.warns(TrainingWarning, match="StopIteration"):
        _, result = train(Nothing(), guide, batch_size=8)
    (failure,) = result.failures
    assert (failure.stage, failure.sample_id, failure.error) == (place, 3, "RuntimeError")
    assert failure.where.startswith("test_user_bugs.py:")


def test_failures_get_no_proposals_until_an_instance_has_succeeded() -> None:
    """Two of two rollouts failed: the optimizer is not called."""

    class Fails(Base):
        def forward(self, x: str) -> str:
            raise KeyError(x)

    llm = ScriptedModel(lambda messages: suggest(prompt="Say no."))
    trainer = AggregatedUpdate(Fails(), LLMOptimizer(llm=llm), llm=llm)
    with pytest.warns(TrainingWarning, match="failed 2 times"):
        result = trainer.train(exact, DATA[:2], batch_size=2)
    assert (llm.asked, result.train_scores) == ([], [0.0])


def test_failures_at_different_lines_or_of_different_types_do_not_stop_a_run() -> None:
    """They are not one bug."""

    class Various(Base):
        def forward(self, x: str) -> str:
            if int(x[1]) % 2:
                raise KeyError(x)
            raise ValueError(x)

    with pytest.warns(TrainingWarning):
        _, result = train(Various(), batch_size=8)
    assert isinstance(result, TrainingResult)


def test_four_failures_in_a_row_stop_a_run_later_too() -> None:
    """Lost calls and the ends of batches in between change nothing."""

    class Later(Base):
        def forward(self, x: str) -> str:
            if self.prompt.data == "Say no.":
                raise RuntimeError("broken") if x != "q3" else RateLimitError("429")
            return "yes"

    class Fixed(AggregatedUpdate):
        def update(self, outputs: Any, verbose: Any = False) -> Any:
            node = self.agent.prompt
            return super().update(outputs, verbose) if node.data == "Say yes." else None

    llm = ScriptedModel(lambda messages: suggest(prompt="Say no."))
    trainer = Fixed(Later(), LLMOptimizer(llm=llm), llm=llm)
    with pytest.raises(TrainingError, match="(?s)4 rollouts in a row.*RuntimeError: broken") as caught:
        trainer.train(exact, DATA, batch_size=1)
    assert caught.value.result is not None
    assert len(caught.value.result.history) in (4, 5)


class FailsOn(Base):
    """Fails on one input, on some of its repeats or on all."""

    def __init__(self, *bad: str, every: int = 1) -> None:
        super().__init__()
        self.bad, self.every, self.calls = bad, every, 0

    def forward(self, x: str) -> str:
        self.calls += x in self.bad
        if x in self.bad and self.calls % self.every == 0:
            raise IndexError(x)
        return f"yes {self.calls}"


@pytest.mark.filterwarnings("ignore::aggregator.errors.TrainingWarning")
@pytest.mark.parametrize("min_score", [None, 0.0, -1.0])
@pytest.mark.parametrize("sets", ["test", "validate", "both"])
def test_the_repeats_of_one_instance_were_taken_for_a_bug(sets: str, min_score: float | None) -> None:
    """An input that fails on each of four repeats is one instance that failed."""
    rows = [("a", "no"), ("bad", "no"), ("b", "no")]
    options = {f"{name}_dataset": rows for name in ("test", "validate") if sets in (name, "both")}
    _, result = train(FailsOn("bad"), repeats=4, min_score=min_score, batch_size=4, **options)
    assert isinstance(result, TrainingResult)


@pytest.mark.filterwarnings("ignore::aggregator.errors.TrainingWarning")
@pytest.mark.parametrize("options", [{}, {"test_dataset": DATA}, {"validate_dataset": DATA}], ids=str)
def test_instances_that_failed_on_one_repeat_were_taken_for_a_bug(options: dict[str, Any]) -> None:
    """An instance that the agent worked on at least once is a success."""
    agent = FailsOn(*(x for x, _ in DATA), every=4)
    _, result = train(agent, lambda x, output, info: (0.5, ""), repeats=4, max_concurrency=1, batch_size=8, **options)
    assert isinstance(result, TrainingResult)


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_bug_on_the_validation_set_stops_the_run(repeats: int) -> None:
    """Its first four instances fail before anything is proposed."""
    llm, error = train(FailsOn("bad"), repeats=repeats, validate_dataset=[("bad", "no")] * 4)
    assert isinstance(error, TrainingError)
    assert "4 rollouts in a row" in str(error)
    assert "IndexError: bad" in str(error)
    assert llm.asked == []


def test_validating_the_same_values_again_does_not_add_to_a_streak() -> None:
    """The last two instances and, at the next step, the first two of the same scores are not four in a row."""
    rows = [("bad", "no"), ("bad", "no"), ("a", "no"), ("bad", "no"), ("bad", "no")]
    with pytest.warns(TrainingWarning):
        _, result = train(FailsOn("bad"), validate_dataset=rows, batch_size=2)
    assert len(result.history) == 4


def test_the_message_names_the_cause() -> None:
    """A type of the library in a message shows what was forgotten."""
    assert "`.text`" in cause_of("TypeError", "can only concatenate str (not 'Completion') to str", "agent")
    assert "async for" in cause_of("TypeError", "'async_generator' object is not iterable", "agent")
    assert cause_of("KeyError", "'q'", "guide") == "the guide itself raises"


def test_the_error_of_a_client_shared_by_event_loops_names_its_cause() -> None:
    """`Runner.run_sync` and the like start a loop in each thread of a synchronous agent."""
    for message in ("<Event> is bound to a different event loop", "Event loop is closed"):
        assert "make the agent `async def`" in cause_of("RuntimeError", message, "agent")
