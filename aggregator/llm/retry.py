"""Pure decisions about a server's reply: whether it is an answer, and whether and when a failed attempt is retried.

Sources of the numbers: the SDKs of OpenAI and Anthropic (0.5 s doubling to 8 s, the retried statuses); the maximum
Retry-After is OpenAI's, because some servers ask for minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from aggregator.errors import (
    APIConnectionError,
    BrokenResponseError,
    ContentFilterError,
    EmptyResponseError,
    LLMError,
    QuotaError,
    RateLimitError,
    ResponseError,
    ServerError,
    TooLargeError,
    TruncatedError,
)
from aggregator.llm.codecs.failures import should_retry
from aggregator.records import Completion

NOT_SENT = "Nothing was sent: "
"""The prefix of a failure's message if no byte of the request was sent."""

_TRANSIENT = (APIConnectionError, RateLimitError, ServerError, ResponseError)
_LASTING = (QuotaError, ContentFilterError, TruncatedError, TooLargeError)


class RetryPolicy(Struct, frozen=True, kw_only=True):
    """Number of attempts and waiting times. Seconds everywhere; `max_attempts` counts the first one."""

    max_attempts: int = 3
    first_delay: float = 0.5
    max_delay: float = 8.0
    max_retry_after: float = 120.0

    def delay(
        self, error: LLMError, attempt: int, *, remaining: float, random: float, headers: Mapping[str, str] = {}
    ) -> float | None:
        """Return the seconds to wait before the next attempt, None to give up.

        `attempt` counts from 1, `remaining` is the time until the call's deadline, `random` is in [0, 1).

        >>> RetryPolicy().delay(ServerError("", status=500), 2, remaining=600, random=0)
        1.0
        """
        if attempt >= self.max_attempts or not is_transient(error, headers):
            return None
        if error.retry_after:
            wait = error.retry_after
            return wait if wait <= self.max_retry_after and wait < remaining else None
        backoff = min(self.first_delay * 2 ** (attempt - 1), self.max_delay) * (1 - 0.25 * random)
        return backoff if backoff < remaining else None


def is_transient(error: LLMError, headers: Mapping[str, str] = {}) -> bool:
    """Return True if the same request may succeed later; `x-should-retry` decides if present.

    >>> is_transient(RateLimitError("")), is_transient(QuotaError(""))
    (True, False)
    """
    wanted = should_retry(headers) if error.status is not None else None
    if wanted is not None and not isinstance(error, QuotaError):
        return wanted
    return isinstance(error, _TRANSIENT) and not isinstance(error, _LASTING)


def check_answer(completion: Completion, provider: str, *, may_be_empty: bool = False) -> None:
    """Raise unless every choice is an answer: a status of 200 and JSON of the right shape are not enough.

    ContentFilterError for a refusal and for withheld content, BrokenResponseError for a finish reason that is not known
    to be good, EmptyResponseError for a stop without any content. `may_be_empty` allows the last, as a call with stop
    sequences can end at its first token.
    """
    for choice in completion.choices:
        message, word, reason = choice.message, choice.raw_finish_reason, choice.finish_reason
        calls = message.tool_calls
        is_empty = not (message.content or calls or message.other)
        lacks_name = calls and not all(call.name for call in calls)
        if not (is_empty or reason == "error" or message.refusal or lacks_name):
            continue  # nearly always
        facts: dict[str, Any] = {"status": 200, "code": word, "request_id": completion.request_id}
        if message.refusal:
            raise ContentFilterError(
                f"Expected an answer from {provider}, got a refusal: {message.refusal}; change the prompt", **facts
            )
        if reason == "error":
            raise BrokenResponseError(
                f"Expected a whole answer from {provider}, got one that ended with {word!r} after "
                f"{len(message.content or '')} characters",
                text=message.content or "",
                **facts,
            )
        if calls and reason != "length":
            raise BrokenResponseError(
                f"Expected tool calls with a name from {provider}, got one without", text=message.content or "", **facts
            )
        if reason == "content_filter" and is_empty:
            raise ContentFilterError(
                f"Expected an answer from {provider}, got one withheld ({word}); change the prompt or the filter",
                **facts,
            )
        if reason != "length" and is_empty and not may_be_empty:
            thought = f", only {len(message.reasoning)} characters of thinking" if message.reasoning else ""
            raise EmptyResponseError(
                f"Expected an answer from {provider}, got neither text nor a tool call{thought} "
                f"(finish reason {word!r})",
                **facts,
            )


def was_sent(error: LLMError) -> bool:
    """Return True if the server may have worked on, and billed, an attempt without an answer.

    The message decides, because a replayed failure has nothing else.
    """
    return not error.message.startswith(NOT_SENT)
