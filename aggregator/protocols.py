"""Every extension point, each a Protocol with one method (two where bytes go in and come out)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from aggregator.records import Completion, Decision, HTTPReply, HTTPRequest, Proposal, Sample, Values


@runtime_checkable
class Transport(Protocol):
    """The I/O seam of the client: aiohttp in production, a fake in tests."""

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        """Send one request and return the whole answer; raises APIConnectionError or APITimeoutError."""
        ...


@runtime_checkable
class ChatModel(Protocol):
    """What stands for a model: `await model.complete(messages, ...)`."""

    async def complete(self, *messages: Any, **options: Any) -> Completion:  # so typed, any choice of options fits
        """Ask once, with the messages and the options of `LLM.complete`, and return the answer; raises LLMError."""
        ...


class Guide(Protocol):
    """Judges an agent's output."""

    def __call__(self, x: Any, output: Any, info: Any) -> Any:
        """Return a score or (score, feedback), now or awaitable."""
        ...


class UpdateRule(Protocol):
    """Merges proposals. Closed: what one rule returns, another can take."""

    async def __call__(self, current: Values, proposals: Sequence[Proposal], *, stepsize: float) -> Sequence[Proposal]:
        """Return fewer proposals than came, or better ones."""
        ...


class Gate(Protocol):
    """Accepts or refuses an update."""

    async def __call__(self, before: Values, after: Values, batch: Sequence[Sample]) -> Decision:
        """Compare the values before and after on whatever the gate looks at."""
        ...


class Executor(Protocol):
    """Runs work over a batch."""

    async def map(self, work: Callable[[Sample], Awaitable[Any]], batch: Sequence[Sample]) -> list[Any]:
        """Return the results in sample order, whatever finishes first."""
        ...


class Logger(Protocol):
    """Trace's logger shape."""

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        """Take one named value of one step."""
        ...
