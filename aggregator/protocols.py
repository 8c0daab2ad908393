"""The extension points, each a Protocol with one method (two if bytes go in and come out).

The decisions of training (UpdateRule, Gate, Check, Optimizer, Search) take the step, and are in
`aggregator.training.step`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal, Protocol, SupportsFloat, runtime_checkable

from aggregator.records import Completion, HTTPReply, HTTPRequest, Rollout, RolloutTask, Scores


class StreamedReply(Protocol):
    """An answer whose head has arrived while its body is still arriving. Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    reason: str

    def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives; raises APIConnectionError or APITimeoutError."""
        ...


@runtime_checkable
class Transport(Protocol):
    """The I/O seam of the client: aiohttp in production, a fake in tests. Subclass it to implement `send` alone."""

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        """Send one request and return the whole answer; raises APIConnectionError or APITimeoutError."""
        ...

    def open(self, request: HTTPRequest, *, timeout: float | None = None) -> AbstractAsyncContextManager[StreamedReply]:
        """Send one request and yield the answer once its head has arrived; leaving the block ends the request.

        A subclass with only `send` yields the answer in one piece.
        """
        return _in_one_piece(self, request, timeout)


class _Whole:
    """A whole reply in the shape of a streamed one."""

    def __init__(self, reply: HTTPReply) -> None:
        self.status, self.headers, self.reason, self._body = reply.status, reply.headers, reply.reason, reply.body

    async def pieces(self) -> AsyncIterator[bytes]:
        if self._body:
            yield self._body


@asynccontextmanager
async def _in_one_piece(
    transport: Transport, request: HTTPRequest, timeout: float | None
) -> AsyncIterator[StreamedReply]:
    yield _Whole(await transport.send(request, timeout=timeout))


@runtime_checkable
class ChatModel(Protocol):
    """A model: `await model.complete(messages, ...)`."""

    async def complete(
        self, *messages: Any, **options: Any
    ) -> Completion:  # typed in this way, any choice of options fits
        """Ask once, with the messages and the options of `LLM.complete`, and return the answer; raises LLMError."""
        ...


class Judged(Protocol):
    """A score with its feedback, such as a Verdict."""

    @property
    def score(self) -> SupportsFloat | None:
        """The score; None if the output cannot be judged."""
        ...

    @property
    def feedback(self) -> str:
        """What is right or wrong, in words."""
        ...


Judgement = SupportsFloat | tuple[SupportsFloat | None, str] | Judged | Scores
"""The accepted results of a guide: a score, (score, feedback), Scores, or an object with score and feedback."""


class Guide(Protocol):
    """Judges an agent's output."""

    def __call__(self, x: Any, output: Any, info: Any, /) -> Judgement | Awaitable[Judgement]:
        """Return a score, (score, feedback) or Scores, or an awaitable of one."""
        ...


class TraceGuide(Protocol):
    """A Trace guide, used unchanged."""

    def get_feedback(self, query: Any, response: Any, reference: Any, /) -> Any:
        """Return (score, feedback)."""
        ...


AnyGuide = Guide | TraceGuide
"""What a trainer accepts as a guide."""


class Parameter(Protocol):
    """One trainable part of an agent: a value with a type and a way to store a new one."""

    @property
    def name(self) -> str:
        """The name, unique within the agent."""
        ...

    @property
    def value(self) -> Any:
        """The current value."""
        ...

    @property
    def type(self) -> Any:
        """The type that a new value must have."""
        ...

    @property
    def description(self) -> str:
        """The purpose of the value, shown to the optimizer; "" if unknown."""
        ...

    @property
    def constraint(self) -> Any:
        """A text for the optimizer or a predicate on the value; None for no constraint."""
        ...

    def convert(self, raw: Any) -> Any:
        """Return a suggested value converted to this parameter's type; raises ParameterError."""
        ...

    def store(self, value: Any) -> None:
        """Write a value to the parameter's program."""
        ...


class Agent(Protocol):
    """What is trained: an object with parameters that runs instances.

    `isolation` is the separation of concurrent candidates: "overlay" (values override the parameters per context),
    "copy" (each candidate runs on its own copy) or "serial" (one candidate at a time). `max_concurrency` is the agent's
    own limit; None leaves it to the executor.
    """

    isolation: Literal["overlay", "copy", "serial"]
    max_concurrency: int | None

    def parameters(self) -> Sequence[Parameter]:
        """Return the trainable parameters."""
        ...

    def rollouts(self, tasks: Sequence[RolloutTask], guide: Any) -> AsyncIterator[tuple[int, Rollout]]:
        """Run the tasks and yield (index, rollout) as each ends; with guide None the agent scores itself.

        All tasks of one call have the same values. Calls to models belong to their task inside
        `lineage_at("/".join(task.lineage), task.role)` (`aggregator.cassettes.lineage`), so that a recording
        can distinguish identical calls of several tasks.
        """
        ...


class RolloutWork(Protocol):
    """Work for an executor: `await work(task)`. A remote executor sends `agent` and `guide` once per worker."""

    agent: Any
    guide: Any

    async def __call__(self, task: RolloutTask) -> Rollout:
        """Run one task on `agent` and judge the output with `guide`."""
        ...


class Executor(Protocol):
    """Runs rollouts, in this process or elsewhere."""

    async def map(self, work: RolloutWork, tasks: Sequence[RolloutTask]) -> list[Rollout]:
        """Return the rollouts in the order of the tasks.

        Raises only errors that end a run, the earliest task's first, after the work in flight has ended.
        """
        ...


class Logger(Protocol):
    """Trace's logger shape."""

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        """Log one named value of one step."""
        ...
