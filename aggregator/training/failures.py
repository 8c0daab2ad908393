"""What an error means for a run: the agent's own doing, a lost call, or the end."""

from __future__ import annotations

import asyncio

from aggregator.agents.showing import show_error
from aggregator.errors import (
    APIConnectionError,
    BudgetExceededError,
    CassetteError,
    ConfigError,
    ContentFilterError,
    ContextLengthError,
    LLMError,
    QuotaError,
    RateLimitError,
    ResponseError,
    ServerError,
    SuggestionError,
    TruncatedError,
)
from aggregator.records import Failure, Stage

MESSAGE_LIMIT = 4_000
"""How many characters of an error's message a record keeps."""

_TRANSIENT = (APIConnectionError, RateLimitError, ServerError, ResponseError)
_OWN = (ContextLengthError, ContentFilterError, TruncatedError)


def ends_run(error: BaseException) -> bool:
    """Tell whether no further call can succeed: a cassette's miss, the budget, authentication, a wrong request.

    A prompt that is too long, filtered or cut is the doing of the parameters on this one instance, so it ends nothing.
    """
    if isinstance(error, _OWN):
        return False
    if isinstance(error, QuotaError | CassetteError | BudgetExceededError | ConfigError):
        return True
    return isinstance(error, LLMError) and not isinstance(error, _TRANSIENT)


def is_infrastructure(error: BaseException) -> bool:
    """Tell whether a call was lost through no fault of the agent."""
    return isinstance(error, LLMError) and not isinstance(error, _OWN)


def is_own(error: BaseException) -> bool:
    """Tell whether an error is that of the code just run, and no order to this task to end.

    Code that calls `sys.exit()`, or awaits a task that it cancelled itself, has failed like any other.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return isinstance(error, Exception | SystemExit)


def is_lost(record: Failure) -> bool:
    """Tell whether an instance was lost: a call failed, or guide or optimizer did, which says nothing of the agent."""
    return record.infrastructure or (record.stage != "agent" and record.error != SuggestionError.__name__)


def root_of(error: BaseException) -> BaseException:
    """Return what a group of errors comes down to: what ends the run, else a lost call, else the first by name.

    An agent that fans out in a TaskGroup raises groups, whose order is that of completion.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [root_of(inner) for inner in error.exceptions]
    return min(leaves, key=lambda leaf: (not ends_run(leaf), not is_infrastructure(leaf), show_error(leaf)))


def failure(stage: Stage, error: BaseException, *, sample_id: int | None = None) -> Failure:
    """Record an error: class and message, never a traceback with addresses."""
    cause = root_of(error)
    name = type(cause).__name__
    message = show_error(cause, MESSAGE_LIMIT).removeprefix(name).removeprefix(": ") or name
    return Failure(
        stage=stage,
        error=name,
        message=message.encode(errors="backslashreplace").decode(),  # a lone surrogate fits neither file nor prompt
        sample_id=sample_id,
        infrastructure=is_infrastructure(cause),
    )
