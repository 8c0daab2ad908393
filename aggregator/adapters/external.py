"""Agents in other processes and other languages: the request holds the values, the reply is the rollout as JSON.

A request is `{"input": x, "values": {name: value}}`. A reply is `{"output": ...}`, and may also have

- `score`, `feedback`: the agent's own verdict, which the guide `own_verdict` uses; the output is then a `Reported`;
- `transcript`: a text, or a list of steps, each a text, an object with `name`, `input` and `output`, or a call of a
  model with `messages` and `output`;
- `usage`: `input_tokens`, `output_tokens`, `cost` in USD, `calls`, which count in usage and budget;
- `error`: the agent's error, with which the rollout fails.

`HTTPAgent` (`http.py`) posts the request to an address, `CommandAgent` (`command.py`) gives it to a command.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct

from aggregator.adapters.frameworks import FrameworkAgent
from aggregator.agents.parameters import ParameterNode
from aggregator.agents.transcripts import current_transcript, recording
from aggregator.cassettes.lineage import current_role, passing, tape_here
from aggregator.checks import check_finite
from aggregator.errors import AggregatorError, APIConnectionError, ConfigError
from aggregator.executors.local import LocalExecutor
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.llm.budget import Amount, budgets_of, pico
from aggregator.llm.ledger import count
from aggregator.llm.models import as_completion
from aggregator.records import NO_USAGE, HTTPReply, HTTPRequest, RolloutTask, Usage
from aggregator.text import as_text, clip, shorten, show_size

ReplyForm = Literal["json", "text"]
"""The form of a reply: the object described above, or text that is the output."""

MAX_REPLY = 16 << 20
"""The maximum size of a reply in bytes."""
QUOTED = 2_000
"""The number of characters of an agent's reply that an error quotes."""
_ONE_RUN = Amount(0, 0, 1)


class ExternalError(AggregatorError):
    """An external agent failed: it reported an error, exited with one, timed out, or gave an unreadable reply."""

    is_of_user = True


class Reported(Struct, frozen=True):
    """An output with the agent's own verdict, which the guide `own_verdict` returns."""

    output: Any
    score: float | None = None
    feedback: str = ""


class _Counted(Struct, frozen=True, kw_only=True):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: float | None = None
    calls: int = 1


class _Reply(Struct, frozen=True, kw_only=True):
    output: Any = msgspec.UNSET
    score: float | None = None
    feedback: str = ""
    transcript: str | list[Any] = ""
    usage: _Counted | None = None
    error: str | None = None


class ExternalAgent(FrameworkAgent):
    """The base class of external agents: named values, the budget, and reading a reply. A subclass has `ask`.

    `values` are seed values by name, or ParameterNodes. Await the agent with an input to run it once.
    """

    def __init__(
        self, program: Any, parameters: Iterable[ParameterNode[Any]], *, reply: ReplyForm, timeout: float, remedy: str
    ) -> None:
        check_finite("timeout", timeout, least=0.001, meaning="seconds")
        if reply not in get_args(ReplyForm):
            raise ConfigError(f"Expected reply 'json' or 'text', got {reply!r}")
        parameters = list(parameters)
        if not parameters:
            raise ConfigError(f"Expected values to train, got none; {remedy}")
        self.reply: ReplyForm = reply
        self.timeout = timeout
        super().__init__(program, parameters)

    @contextmanager
    def placed(self) -> Iterator[Any]:
        """Yield this agent, to be awaited with inputs."""
        yield self

    async def ask(self, request: Mapping[str, Any], call: Call) -> bytes:
        """Run the agent once, through a `Turn`, and return the reply's bytes.

        Raises ExternalError, or LLMError for a lost call.
        """
        raise NotImplementedError

    async def forward(self, x: Any) -> Any:
        """Run the agent once and return its output, also in production; raises ExternalError."""
        return await self._ask(x, LocalExecutor().call)

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Run the agent once, as a rollout."""
        return Ran(output=await self._ask(task.sample.x, call))

    async def _ask(self, x: Any, call: Call) -> Any:
        request = {"input": x, "values": {name: one.data for name, one in self._parameters.items()}}
        started, budgets, used = time.perf_counter(), budgets_of(None), NO_USAGE
        for budget in budgets:
            await budget.reserve(_ONE_RUN)
        try:
            reply = read_reply(await self.ask(request, call), self.reply)
            if reply.usage is not None:
                used = Usage(**msgspec.structs.asdict(reply.usage))
                count(current_role(), used, (time.perf_counter() - started) * 1e3)
        finally:
            for budget in budgets:
                budget.settle(_ONE_RUN, Amount(pico(used.cost or 0.0), used.total_tokens, used.calls))
        record_steps(reply.transcript)
        if reply.error is not None:
            raise ExternalError(clip(reply.error, QUOTED))
        is_judged = reply.score is not None or reply.feedback != ""
        return Reported(reply.output, reply.score, reply.feedback) if is_judged else reply.output


class Turn:
    """One run of an external agent with the current tape: recorded, or answered from the recording."""

    def __init__(self, request: HTTPRequest) -> None:
        tape = tape_here()
        admitted = None if tape is None else tape.admit(request)
        self._tape = None if admitted is None else tape
        self._slot = None if self._tape is None or admitted is None else self._tape.issue(admitted)
        self.is_replayed = False

    async def reply_to(self, send: Callable[[], Awaitable[HTTPReply]]) -> HTTPReply:
        """Return the next recorded reply, or what `send` returns; call it again for another attempt.

        Raises the exceptions of `send`, and CassetteMissError.
        """
        if self._tape is None or self._slot is None:
            with passing():  # counted by the agent's own figures
                return await send()
        self.is_replayed = True
        if (reply := self._tape.play(self._slot)) is not None:
            return reply
        self.is_replayed = False
        try:
            with passing():
                reply = await send()
        except APIConnectionError as error:
            from aggregator.cassettes.tape import NO_ANSWER  # loaded with the tape

            await self._tape.arecord(self._slot, NO_ANSWER, failure=error)
            raise
        await self._tape.arecord(self._slot, reply)
        return reply


def as_parameters(values: Mapping[str, Any]) -> list[ParameterNode[Any]]:
    """Return named seed values as parameters."""
    return [
        value if isinstance(value, ParameterNode) else ParameterNode(value, name=name) for name, value in values.items()
    ]


def encode_request(request: Mapping[str, Any]) -> bytes:
    """Return a request as JSON; raises ExternalError for an input that JSON does not support."""
    try:
        return msgspec.json.encode(request)
    except (TypeError, ValueError) as error:
        raise ExternalError(
            f"Expected an input that JSON can carry, got {shorten(request['input'])}: {error}"
        ) from None


def read_reply(body: bytes, form: ReplyForm) -> _Reply:
    """Return an agent's reply. Raises ExternalError for one that cannot be read.

    >>> read_reply(b'{"output": 4, "score": 1}', "json").score
    1.0
    """
    check_size(body)
    try:
        if form == "text":
            return _Reply(output=body.decode().rstrip("\n"))
        reply = msgspec.json.decode(body, type=_Reply)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExternalError(
            f"Expected a reply as JSON, as in {{\"output\": ...}}, got {end_of(body)!r}: {error}; reply='text' takes "
            "text as the output"
        ) from None
    if reply.output is msgspec.UNSET and reply.error is None:
        raise ExternalError(f"Expected `output` or `error` in the reply, got {end_of(body)!r}")
    return reply


def check_size(written: bytes) -> None:
    """Raise ExternalError for more than MAX_REPLY bytes."""
    if len(written) > MAX_REPLY:
        raise ExternalError(f"Expected at most {show_size(MAX_REPLY)} from the agent, got {show_size(len(written))}")


def end_of(written: bytes) -> str:
    """Return the end of an agent's text, where errors are."""
    text = written[-4 * QUOTED :].decode(errors="replace").strip()
    return text if len(text) <= QUOTED else f"...{text[-QUOTED:]}"


def record_steps(steps: str | Sequence[Any]) -> None:
    """Record an agent's own account of a run in the current transcript."""
    for step in [steps] if isinstance(steps, str) and steps else steps:
        if isinstance(step, Mapping) and isinstance(step.get("messages"), list):
            seen = current_transcript()
            if seen is not None:
                seen.add_llm_call(step["messages"], as_completion(as_text(step.get("output"))))
        elif isinstance(step, Mapping):
            name, inputs, output = str(step.get("name", "step")), step.get("input"), step.get("output")
            with recording(name, "", [] if inputs is None else [("input", inputs)]) as span:
                span.finish(output)
        else:
            with recording("step") as span:
                span.finish(step)
