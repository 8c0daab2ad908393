"""What an error means for a run: the agent's own doing, a lost call, or the end."""

from __future__ import annotations

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
    TruncatedError,
)
from aggregator.records import Failure, Stage

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


def failure(
    stage: Stage,
    error: BaseException,
    *,
    sample_id: int | None = None,
) -> Failure:
    """Record an error: class and message, never a traceback with addresses."""
    return Failure(
        stage=stage,
        error=type(error).__name__,
        message=str(error) or type(error).__name__,
        sample_id=sample_id,
        infrastructure=is_infrastructure(error),
    )
