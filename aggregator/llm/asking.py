"""One call from its options to its answer: its response format, and its attempts in a transcript, span and event.

Structured output falls back from json_schema to json_object to the prompt alone. Servers refuse a `response_format`
with 400, 422 or a 500 that names it, or ignore it silently, so the text is always checked. A refused schema is
remembered for that schema, per (base_url, model), and retried later. An invalid answer does not change the form of the
next call.
"""

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
from aggregator.llm.codecs.base import to_json
from aggregator.llm.owner import current_owner
from aggregator.llm.schemas import Validate, as_response_format
from aggregator.llm.streams import StreamedAttempts
from aggregator.records import Completion

if TYPE_CHECKING:
    from aggregator.llm.client import LLM
import re
from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

from aggregator.errors import (
    BadRequestError,
    ContextLengthError,
    DecodeError,
    LLMError,
    ServerError,
    TruncatedError,
)
from aggregator.llm.schemas import checker

_OPTIONS = ("max_tokens", "temperature", "top_p", "seed", "stop", "n", "tools", "tool_choice")
_JSON_OBJECT = {"type": "json_object"}
_NAMES_FORMAT = re.compile(
    r"response.?format|json.?schema|json.?object|guided|grammar|structured.?output|\bschema\b", re.IGNORECASE
)

_ASKED_AGAIN = 600.0  # seconds after which a refused form is retried, since servers are updated

_Key = tuple[str, str, bytes]
_remembered: WeakKeyDictionary[object, dict[_Key, tuple[int, float]]] = WeakKeyDictionary()
# Kept by transport, since it is a trait of servers; an open tape keeps it instead, so that a replay begins like its
# recording.


async def ask_structured(attempts: Attempts, call: ChatCall, validate: Validate | None) -> Completion:
    """Ask in the best form that the server accepts; raises DecodeError if the answer does not fit the format.

    A lower form is tried if this one is refused or ignored, within the call's attempts and deadline.
    """
    wanted = call.response_format or _JSON_OBJECT
    check = validate or checker(wanted)
    forms = list(_forms(call))
    tape = attempts.tape
    known = _remembered.setdefault(attempts.line.transport, {}) if tape is None else tape.learned
    key = (attempts.line.endpoint.base_url, call.model, sha256(to_json(wanted)).digest())
    level, until = known.get(key, (0, 0.0))
    now = attempts.line.clock()
    if until <= now:
        level = 0
    refused = level = _first_recorded(attempts, forms, level)
    after = partial(_next_level, call=call, levels=len(forms))
    while True:
        try:
            completion = await attempts.ask(unless=partial(after, level=level))
            await _check(completion, check)
        except LLMError as error:
            next_level = after(error, level=level)
            if next_level is None or not attempts.may_go_on():
                error.attempts = attempts.count
                raise
            level = next_level
            if not isinstance(error, IgnoredFormatError):
                refused = level
            attempts.issue(forms[level])
            if not attempts.is_answerable():  # the recorded call ended here, with fewer attempts
                error.attempts = attempts.count
                raise
            continue
        if refused and (refused, until) != known.get(key):
            known[key] = (refused, now + _ASKED_AGAIN)
        return completion


def _forms(call: ChatCall) -> Iterator[ChatCall]:
    """Return the same question in each form, the best first."""
    wanted: Mapping[str, Any] = call.response_format or _JSON_OBJECT
    yield call
    if wanted["type"] == "json_schema":
        schema = wanted["json_schema"].get("schema", {})
        stated = _stated(call, schema)
        if schema.get("type", "object") == "object":  # json_object accepts nothing else
            yield replace(stated, response_format=_JSON_OBJECT)
        yield replace(stated, response_format=None)
    else:
        yield replace(_stated(call, None), response_format=None)


def _stated(call: ChatCall, schema: Any) -> ChatCall:
    """State the format in the system message if the server does not enforce it."""
    is_object = schema is None or schema.get("type", "object") == "object"
    words = f"Answer with one JSON {'object' if is_object else 'value'} and nothing else."
    if schema is not None:
        words += f" It fits this JSON schema: {to_json(schema).decode()}"
    first, *rest = call.messages
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str):
        return replace(call, messages=({**first, "content": f"{first['content']}\n\n{words}"}, *rest))
    return replace(call, messages=({"role": "system", "content": words}, *call.messages))


def _first_recorded(attempts: Attempts, forms: list[ChatCall], level: int) -> int:
    """Issue the question in the first form; a tape that only plays chooses the form that it holds.

    At the time of the recording, another call may or may not have learned the form that this one starts with now.
    """
    if attempts.tape is not None and not attempts.tape.records:
        level = 0
    attempts.issue(forms[level])
    first = attempts.call, attempts.request, attempts.slot
    for lower in range(level, len(forms)):
        if lower != level:
            attempts.issue(forms[lower])
        if attempts.is_answerable():
            return lower
    attempts.call, attempts.request, attempts.slot = first  # nothing recorded: the miss names the original request
    return level


def _next_level(error: LLMError, *, call: ChatCall, level: int, levels: int) -> int | None:
    """Return the form to try after this error (never the first, 0); None if another form would not help."""
    if level + 1 >= levels:
        return None
    if isinstance(error, IgnoredFormatError):
        return levels - 1  # silently ignored: a weaker format would be ignored too
    if isinstance(error, BadRequestError) and not isinstance(error, ContextLengthError):
        return level + 1 if error.status in (400, 422) and not _names_other(error, call) else None
    named = isinstance(error, ServerError) and error.status == 500 and _NAMES_FORMAT.search(error.message)
    return level + 1 if named else None


def _names_other(error: LLMError, call: ChatCall) -> bool:
    """Return True if a refusal names another option of the call and no part of the format."""
    text = f"{error.message} {error.code}"
    given = [name for name in _OPTIONS if getattr(call, name) is not None] + list(call.extra)
    if "max_tokens" in given:
        given.append("max_completion_tokens")
    return not _NAMES_FORMAT.search(text) and any(re.search(rf"\b{re.escape(name)}\b", text) for name in given)


class IgnoredFormatError(DecodeError):
    """The answer does not fit the `response_format`; `text` is the answer."""

    def __init__(self, message: str, *, text: str = "", **facts: Any) -> None:
        super().__init__(message, **facts)
        self.text = text


async def _check(completion: Completion, check: Validate) -> None:
    for choice in completion.choices:
        if choice.message.tool_calls:
            continue
        text = choice.message.content or ""
        facts: dict[str, Any] = {"text": text, "status": 200, "request_id": completion.request_id}
        if choice.finish_reason == "length":
            raise TruncatedError(
                f"Expected a whole JSON answer, got one cut at the token limit after {len(text)} characters; "
                "raise max_tokens",
                thought=bool(choice.message.reasoning or completion.usage.reasoning_tokens),
                **facts,
            )
        try:
            if hasattr(checking := check(text), "__await__"):  # a worker process checks what its owner received
                await checking
        except ValueError as error:
            raise IgnoredFormatError(f"Expected the answer in the format asked for: {error}", **facts) from error


def complete(llm: LLM, call: ChatCall, validate: Validate | None) -> Awaitable[Completion]:
    """Answer one call, and show it in the current transcript if the agent makes it."""
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
    if line.extra:
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
        if attempts.is_traced:
            _trace(attempts, None, error)
        raise
    finally:
        attempts.leave()
    if attempts.is_traced:
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
        if attempts.is_traced:
            _trace(attempts, None, error)
        raise
    finally:
        attempts.leave()
    if attempts.is_traced:
        _trace(attempts, whole, None)


def _trace(attempts: Attempts, completion: Completion | None, error: BaseException | None) -> None:
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
