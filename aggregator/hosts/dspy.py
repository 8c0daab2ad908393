"""Our algorithm as a DSPy optimizer, and our models for its programs.

    AggregatedUpdate(metric, model=llm).compile(program, trainset=rows)
    dspy.configure(lm=lm("openai/gpt-4o-mini"))

The optimizer is `optimize` on a copy of the program: the same arguments and the same seed give the same proposals, and
the same program. Calls of a program through `lm` have our budget, cassettes, limits and lineage, in threads and in
async code, streamed or not. DSPy's cache and retries are off: the client retries itself, and a cassette must see every
call.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextvars import copy_context
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Literal, Self

import dspy
from dspy.teleprompt import Teleprompter

from aggregator import errors, portal
from aggregator.adapters.dspy import DspyAgent
from aggregator.adapters.frameworks import require_version
from aggregator.cassettes.lineage import adopted
from aggregator.errors import ConfigError
from aggregator.llm.budget import Budget
from aggregator.llm.client import LLM
from aggregator.llm.models import as_model
from aggregator.records import Completion, TrainingResult
from aggregator.training.optimize import optimize
from aggregator.training.schedules import Schedule
from aggregator.training.step import AnyOptimizer, Check, Gate, Search, UpdateRule

# ---- our models as DSPy's

require_version("dspy", "3.4", "3.6")
lm15: Any = dspy.lm15
_OPTIONS = ("temperature", "top_p", "seed", "stop", "response_format", "tools", "tool_choice")  # others are `extra`

_ERRORS: dict[type[Exception], Any] = {  # the more special class first
    errors.ContextLengthError: lm15.ContextLengthError,
    errors.BadRequestError: lm15.InvalidRequestError,
    errors.AuthenticationError: lm15.AuthError,
    errors.PermissionDeniedError: lm15.AuthError,
    errors.NotFoundError: lm15.UnsupportedModelError,
    errors.QuotaError: lm15.BillingError,
    errors.RateLimitError: lm15.RateLimitError,
    errors.ServerError: lm15.ServerError,
    errors.APITimeoutError: lm15.TimeoutError,
    errors.APIConnectionError: lm15.TransportError,
}


def lm(model: Any = None, **options: Any) -> Any:
    """Return a `dspy.LM` whose calls `model` answers.

    `model` is anything that `as_model` accepts, None the default model. `options` are those of `dspy.LM` for its
    requests (temperature, max_tokens, ...).
    """
    asked = as_model(model)
    engines = {"engine": Engine(asked), "async_engine": AsyncEngine(asked)}
    name = str(getattr(asked, "model", None) or type(asked).__name__)
    return dspy.LM(name, **{"cache": False, "num_retries": 0, **options, **engines})


class _Engine:
    """The base class of the engines: their calls, and saving them."""

    def __init__(self, model: Any = None) -> None:
        self.model = as_model(model)

    def dump_state(self) -> dict[str, Any]:
        """Return the client's settings for a saved program; raises ConfigError if an argument holds a secret.

        A budget and other arguments that cannot be saved must be given again.
        """
        if not isinstance(self.model, LLM):
            raise ConfigError(
                f"Expected an LLM behind a program that is saved, got {self.model!r}; set the program's lm to None "
                "before it is saved, and again after it was loaded"
            )
        _, (_, settings), *_ = self.model.__reduce__()
        try:
            return dict(json.loads(json.dumps({name: one for name, one in settings.items() if one is not None})))
        except TypeError as error:
            raise ConfigError(f"Expected settings of {self.model!r} that JSON can carry, got {error}") from None

    @classmethod
    def load_state(cls, state: Mapping[str, Any]) -> Self:
        """Build an engine from the result of `dump_state`."""
        return cls(LLM(**state))

    async def _ask(self, request: Any) -> Any:
        messages, options = _question(request)
        try:
            completion = await self.model.complete(messages, **options)
        except errors.LLMError as error:
            raise _projected(error) from error
        return _response(completion, request)

    async def _events(self, request: Any) -> AsyncIterator[Any]:
        """Yield lm15's events: the text as it arrives, then the rest of the answer."""
        stream = getattr(self.model, "stream", None)
        if stream is None or request.config.response_format:
            for event in lm15.response_to_events(await self._ask(request)):
                yield event
            return
        messages, options = _question(request)
        yield lm15.StreamStartEvent(id=None, model=request.model)
        try:
            answer = stream(messages, **options)
            async for text in answer:
                yield lm15.StreamDeltaEvent(lm15.TextDelta(text=text))
        except errors.LLMError as error:
            raise _projected(error) from error
        for event in lm15.response_to_events(_response(answer.completion, request)):
            if (event.delta.type if event.type == "delta" else event.type) not in {"start", "text", "thinking"}:
                yield event


class Engine(_Engine):
    """A model for DSPy's synchronous programs."""

    def complete(self, request: Any) -> Any:
        """Answer an lm15 request."""
        with adopted():
            return portal.call(self._ask, request)

    def stream(self, request: Any) -> Iterator[Any]:
        """Yield the events of an answer as they arrive; leaving early ends the request."""
        events, left = SimpleQueue[Any](), Event()

        async def read() -> None:
            async for event in self._events(request):
                events.put(event)
                if left.is_set():
                    return

        def work() -> None:
            try:
                with adopted():
                    portal.call(read)
            except BaseException as error:  # noqa: BLE001 - raised where the events are read
                events.put(error)
            events.put(None)

        Thread(target=copy_context().run, args=(work,), name="aggregator-stream", daemon=True).start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            left.set()

    def close(self) -> None:
        """Do nothing: connections end with their event loop."""


class AsyncEngine(_Engine):
    """A model for DSPy's async programs."""

    async def complete(self, request: Any) -> Any:
        """Answer an lm15 request."""
        return await self._ask(request)

    def stream(self, request: Any) -> AsyncIterator[Any]:
        """Yield the events of an answer as they arrive."""
        return self._events(request)

    async def aclose(self) -> None:
        """Do nothing: connections end with their event loop."""


def _question(request: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the messages and options of a request, converted to Chat Completions by lm15 itself."""
    body = json.loads(lm15.OpenAIChatLM(api_key="unused").build_request(request, stream=False).body)
    body.pop("model")
    messages = body.pop("messages")
    limit = body.pop("max_completion_tokens", None) or body.pop("max_tokens", None)
    options = {name: body.pop(name) for name in _OPTIONS if name in body} | ({"max_tokens": limit} if limit else {})
    return messages, options | ({"extra": body} if body else {})


def _response(completion: Completion, request: Any) -> Any:
    """Return an answer as lm15's, parsed by lm15 from the Chat Completions format."""
    choice, usage = completion.choices[0], completion.usage
    message: dict[str, Any] = {"role": "assistant", "content": choice.message.content}
    message |= {"reasoning_content": choice.message.reasoning} if choice.message.reasoning else {}
    if choice.message.tool_calls:
        message["tool_calls"] = [
            {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
            for one in choice.message.tool_calls
        ]
    counts = {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}
    body = {
        "id": completion.id or "aggregator",
        "model": completion.model or request.model,
        "choices": [{"index": 0, "message": message, "finish_reason": choice.finish_reason}],
        "usage": {name: count for name, count in counts.items() if count is not None},
    }
    return lm15.response_from_openai_chat(body, response_format=request.config.response_format)


def _projected(error: errors.LLMError) -> Exception:
    """Return an error as lm15's, which DSPy handles; the adapter finds our error behind it."""
    for ours, theirs in _ERRORS.items():
        if isinstance(error, ours):
            return theirs(error.message, status=error.status, request_id=error.request_id)  # type: ignore[no-any-return]
    return error


__all__ = ["AggregatedUpdate", "AsyncEngine", "Engine", "lm"]


# ---- our algorithm as an optimizer


class AggregatedUpdate(Teleprompter):
    """Trains a program minibatch by minibatch: a proposal for each instance, merged by a model.

    `metric` is DSPy's `(gold, prediction, trace=None)`, which returns a score or a Prediction with score and feedback.
    `train` names the trained parts of each predictor: instructions, fields, demos. The other arguments are those of
    `aggregator.optimize`; `valset` of `compile` replaces `validate`. `result` is the latest run's.
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
        """Return a trained copy of the program; the student is not changed.

        Raises ConfigError for a teacher, which this algorithm does not use, and the errors of `optimize`.
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
