"""Which failed attempts are retried, and when."""

from __future__ import annotations

import pytest

from aggregator.errors import (
    APIConnectionError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ContentFilterError,
    ContextLengthError,
    DecodeError,
    EmptyResponseError,
    LLMError,
    NotFoundError,
    PermissionDeniedError,
    QuotaError,
    RateLimitError,
    ServerError,
    TruncatedError,
)
from aggregator.llm.retry import NOT_SENT, RetryPolicy, is_transient, was_sent

POLICY = RetryPolicy(max_attempts=10)


@pytest.mark.requirement("client 3: 408, 409, 429, 5xx, lost connections are retried", "Trace: auto_retry")
@pytest.mark.parametrize(
    "kind",
    [APIConnectionError, APITimeoutError, RateLimitError, ServerError, DecodeError, EmptyResponseError],
)
def test_transient_errors_are_retried(kind: type[LLMError]) -> None:
    """Lost connections, rate limits, server errors and unreadable answers are retried."""
    assert is_transient(kind(""))


@pytest.mark.requirement("client 3: never quota, context overflow, auth, 400, 404, 413, 422")
@pytest.mark.parametrize(
    "kind",
    [
        BadRequestError, ContextLengthError, AuthenticationError, PermissionDeniedError, NotFoundError, QuotaError,
        ContentFilterError, TruncatedError,
    ],
)  # fmt: skip
def test_permanent_errors_are_not_retried(kind: type[LLMError]) -> None:
    """Invalid requests, refused keys, empty accounts and filtered or truncated answers are not retried."""
    assert not is_transient(kind("", status=400))


@pytest.mark.requirement("client 3: x-should-retry")
@pytest.mark.parametrize(
    ("error", "said", "expected"),
    [
        (ServerError("", status=500), "false", False),
        (BadRequestError("", status=400), "true", True),
        (QuotaError("", status=429), "true", False),
        (ServerError("", status=500), "maybe", True),
    ],
)
def test_x_should_retry_is_obeyed(error: LLMError, said: str, expected: bool) -> None:
    """The header decides, both ways; but an empty account is never retried."""
    assert is_transient(error, {"x-should-retry": said}) is expected


@pytest.mark.requirement("client 3: 0.5 s doubling to 8, with jitter")
def test_backoff_doubles_to_its_ceiling_with_jitter_downwards() -> None:
    """The backoff is 0.5 s, doubling to 8 s, reduced by up to a quarter."""
    error = ServerError("", status=500)
    full = [POLICY.delay(error, attempt, remaining=600, random=0.0) for attempt in range(1, 8)]
    assert full == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert POLICY.delay(error, 3, remaining=600, random=1.0) == 1.5


@pytest.mark.requirement("client 3: Retry-After is waited for")
def test_retry_after_replaces_the_backoff() -> None:
    """The server's wait is exact, without jitter."""
    assert POLICY.delay(RateLimitError("", status=429, retry_after=7.5), 1, remaining=600, random=0.9) == 7.5


@pytest.mark.requirement("client 3: capped, then failing fast with retry_after")
@pytest.mark.parametrize(("retry_after", "remaining"), [(120.1, 600.0), (30.0, 29.0)])
def test_a_wait_that_is_too_long_is_not_started(retry_after: float, remaining: float) -> None:
    """A wait beyond the maximum or the deadline is not started."""
    error = RateLimitError("", status=429, retry_after=retry_after)
    assert POLICY.delay(error, 1, remaining=remaining, random=0) is None


def test_the_last_attempt_is_the_last() -> None:
    """`max_attempts` counts the first one."""
    error = ServerError("", status=500)
    policy = RetryPolicy(max_attempts=2)
    assert policy.delay(error, 1, remaining=9, random=0) is not None
    assert policy.delay(error, 2, remaining=9, random=0) is None


def test_a_request_that_was_not_sent_is_free() -> None:
    """The message shows that it was not sent, so a replay shows it too."""
    assert not was_sent(APIConnectionError(f"{NOT_SENT}refused"))
    assert was_sent(APIConnectionError("cut"))
