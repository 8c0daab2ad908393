"""Ask once and watch it: the transcript, span and event around the attempts of one call, or the owner that makes it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import TYPE_CHECKING

from msgspec.structs import replace

from aggregator.agents.transcripts import Transcript, current_transcript
from aggregator.cassettes.lineage import current_lineage, current_role
from aggregator.llm import tracing
from aggregator.llm.attempts import Attempts, Line
from aggregator.llm.calls import ChatCall
from aggregator.llm.owner import current_owner
from aggregator.llm.schemas import Validate, as_response_format
from aggregator.llm.streams import StreamedAttempts
from aggregator.llm.structured import ask_structured
from aggregator.records import Completion

if TYPE_CHECKING:
    from aggregator.llm.client import LLM


def complete(llm: LLM, call: ChatCall, validate: Validate | None) -> Awaitable[Completion]:
    """Have one call answered and show it in the current transcript if the agent makes it."""
    if call.response_format is not None:
        call = replace(call, response_format=as_response_format(call.response_format))
    transcript = current_transcript()
    if transcript is None or current_role() != "agent":
        return llm.answer(call, validate)
    return _shown(llm, call, validate, transcript)


async def _shown(llm: LLM, call: ChatCall, validate: Validate | None, transcript: Transcript) -> Completion:
    shown = transcript.llm_call(call.messages)
    try:
        completion = await llm.answer(call, validate)
    except BaseException as error:
        shown.fail(error)
        raise
    shown.finish(completion)
    return completion


async def answer(llm: LLM, line: Line, call: ChatCall, validate: Validate | None) -> Completion:
    """Answer one call; raises LLMError, BudgetExceededError, CassetteError or ConfigError."""
    if (owner := current_owner()) is not None:
        return await owner.answer(llm, call, validate)
    call = line.with_defaults(call)
    attempts = Attempts(line, llm.timeout)
    try:
        if tracing.has_spans():
            with tracing.span(line.endpoint, call) as span:
                completion = await _ask(attempts, call, validate)
                span.answered(completion, attempts.count)
        else:
            completion = await _ask(attempts, call, validate)
    except BaseException as error:
        _trace(attempts, None, error)
        raise
    finally:
        attempts.leave()
    _trace(attempts, completion, None)
    return completion


def _ask(attempts: Attempts, call: ChatCall, validate: Validate | None) -> Awaitable[Completion]:
    if call.response_format is not None and call.response_format["type"] != "text":
        return ask_structured(attempts, call, validate)
    attempts.issue(call)
    return attempts.ask()


def deltas(llm: LLM, line: Line, call: ChatCall) -> AsyncGenerator[str | Completion, None]:
    """Yield the deltas of a streamed call, the whole answer last; raises the same."""
    owner = current_owner()
    return _deltas(line, llm.timeout, line.with_defaults(call)) if owner is None else owner.deltas(llm, call)


async def _deltas(line: Line, timeout: float | None, call: ChatCall) -> AsyncGenerator[str | Completion, None]:
    attempts = StreamedAttempts(line, timeout)
    whole: Completion | None = None
    try:
        attempts.issue(call)
        async with aclosing(attempts.deltas()) as pieces:
            async for piece in pieces:
                whole = piece if isinstance(piece, Completion) else None
                yield piece
    except BaseException as error:
        _trace(attempts, None, error)
        raise
    finally:
        attempts.leave()
    _trace(attempts, whole, None)


def _trace(attempts: Attempts, completion: Completion | None, error: BaseException | None) -> None:
    if not tracing.listening():
        return
    endpoint = attempts.line.endpoint
    tracing.event(
        "llm.call",
        lineage=current_lineage() or None,
        role=current_role(),
        provider=endpoint.provider,
        model=endpoint.model,
        attempts=attempts.count,
        finish_reason=completion.finish_reason if completion is not None else None,
        replayed=completion.replayed if completion is not None else None,
        ms=round(attempts.milliseconds(), 3),
        error=type(error).__name__ if error is not None else None,
        status=getattr(error, "status", None),
        request_id=getattr(error if completion is None else completion, "request_id", None),
        **tracing.usage_facts(completion.usage if completion is not None else None),
    )
