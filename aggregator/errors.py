"""Every exception and warning of the library.

An error message has four parts: expected, got, where, and the remedy.
A failed sample is data; a failed run is one of these.

    AggregatorError
    ├── ConfigError(ValueError)          a wrong argument, name, data set, key
    ├── ParameterError                   a value that cannot become the parameter's type
    ├── SuggestionError                  a reply that cannot be read
    ├── AgentReplyError                  a reply that the agent's framework cannot read; another value may mend it
    ├── SandboxError                     trained code that went beyond its sandbox
    ├── GuideError                       a guide that gave no verdict; never a score of 0
    ├── CassetteError
    │   ├── CassetteMissError            no recorded exchange answers; `except Exception` cannot hide it
    │   ├── CassetteDamagedError         cut, edited or otherwise not what was written
    │   ├── CassetteRefusedError         hostile or of an unknown format
    │   ├── CassetteLockedError          another process records this file
    │   └── SecretLeakError              a secret that could not be redacted
    ├── InstanceTimeoutError(TimeoutError)  an agent or a guide that took longer than instance_timeout
    ├── BudgetExceededError              carries the partial result
    ├── TrainingError                    too many failures, a run_dir of another run; carries the partial result
    └── LLMError
        ├── APIConnectionError
        │   └── APITimeoutError
        ├── APIStatusError
        │   ├── BadRequestError          400, 413, 422
        │   │   └── ContextLengthError
        │   ├── AuthenticationError      401
        │   ├── PermissionDeniedError    403
        │   ├── NotFoundError            404
        │   ├── RateLimitError           429
        │   │   └── QuotaError           no more of it by waiting
        │   └── ServerError              408, 409, 5xx
        └── ResponseError                the status was fine, the answer was not
            ├── DecodeError
            │   └── TooLargeError        longer than any answer
            ├── EmptyResponseError
            ├── BrokenResponseError      the provider itself calls it broken; carries the partial text
            ├── ContentFilterError
            └── TruncatedError           carries the partial text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aggregator.records import TrainingResult

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AgentReplyError",
    "AggregatorError",
    "AggregatorWarning",
    "AuthenticationError",
    "BadRequestError",
    "BrokenResponseError",
    "BudgetExceededError",
    "CassetteDamagedError",
    "CassetteError",
    "CassetteLockedError",
    "CassetteMissError",
    "CassetteRefusedError",
    "CassetteWarning",
    "ConfigError",
    "ContentFilterError",
    "ContextLengthError",
    "DecodeError",
    "EmptyResponseError",
    "GuideError",
    "InstanceTimeoutError",
    "LLMError",
    "ModelWarning",
    "NotFoundError",
    "ParameterError",
    "PermissionDeniedError",
    "QuotaError",
    "RateLimitError",
    "ResponseError",
    "SandboxError",
    "SandboxWarning",
    "SecretLeakError",
    "ServerError",
    "SuggestionError",
    "TooLargeError",
    "TrainingError",
    "TrainingWarning",
    "TruncatedError",
]


# ---- the library


class AggregatorError(Exception):
    """The root of the tree: every error that the library raises on purpose."""


class ConfigError(AggregatorError, ValueError):
    """An invalid argument, name, data set or key."""


class ParameterError(AggregatorError, ValueError):
    """A value that cannot become the parameter's type."""


class SuggestionError(AggregatorError, ValueError):
    """A reply that cannot be read without guessing."""


class AgentReplyError(AggregatorError, ValueError):
    """A model's reply that the agent's framework cannot read: feedback on its texts, not a bug of its code."""


class GuideError(AggregatorError):
    """A guide gave no usable verdict: no number, NaN, or a judge whose reply cannot be read. Never a score of 0."""


class SandboxError(AggregatorError):
    """Trained code broke a rule of its sandbox, or failed there; the message becomes feedback."""


class InstanceTimeoutError(AggregatorError, TimeoutError):
    """An agent or a guide took longer for one instance than `train(instance_timeout=...)` allows."""


# ---- cassettes


class CassetteError(AggregatorError):
    """The root of errors about cassettes."""


class CassetteMissError(CassetteError):
    """No recorded exchange answers this request.

    The tape also remembers the miss and raises it again when the cassette closes, so that an
    `except Exception` in agent code cannot hide it.
    """


class CassetteDamagedError(CassetteError):
    """The file was cut or edited, or its content differs from what it states."""


class CassetteRefusedError(CassetteError):
    """The file is hostile, too large to expand, or of an unknown format."""


class CassetteLockedError(CassetteError):
    """Another process is recording this file."""


class SecretLeakError(CassetteError):
    """A secret is in a place that cannot be redacted; nothing was written, the answer stays usable in memory."""


# ---- runs


class _EndedRunError(AggregatorError):
    """An error that ends a run and keeps the partial result (`.result`, None before the first step)."""

    def __init__(self, message: str, result: TrainingResult | None = None) -> None:
        super().__init__(message)
        self.result = result


class BudgetExceededError(_EndedRunError):
    """The next call could exceed the budget; nothing was sent for it."""


class TrainingError(_EndedRunError):
    """Too many failures, or a run that does not match its run_dir."""


# ---- calls to models


class LLMError(AggregatorError):
    """A call to a model failed.

    `status` is the HTTP status (None without an answer), `code` the provider's own, `request_id` for the provider's
    support, `retry_after` in seconds, `attempts` the number of requests sent for this call.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        attempts: int = 1,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.request_id = request_id
        self.retry_after = retry_after
        self.attempts = attempts

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.__dict__))


def _rebuild(kind: type[LLMError], state: dict[str, Any]) -> LLMError:
    """Rebuild an error after it crossed a process border."""
    error = kind(state["message"])
    error.__dict__.update(state)
    return error


class APIConnectionError(LLMError):
    """The connection was refused, reset, or cut before the reply was complete."""


class APITimeoutError(APIConnectionError):
    """No complete answer arrived before the deadline."""


class APIStatusError(LLMError):
    """The server answered with an error status."""


class BadRequestError(APIStatusError):
    """The request is invalid, and retrying does not help (400, 413, 422)."""


class ContextLengthError(BadRequestError):
    """The prompt does not fit the model's context."""


class AuthenticationError(APIStatusError):
    """The key is missing, wrong or expired (401)."""


class PermissionDeniedError(APIStatusError):
    """The key lacks the permission (403)."""


class NotFoundError(APIStatusError):
    """There is no such model or path (404)."""


class RateLimitError(APIStatusError):
    """Too many requests or tokens for now (429)."""


class QuotaError(RateLimitError):
    """The account's quota is used up; waiting does not help."""


class ServerError(APIStatusError):
    """The server failed or is overloaded (408, 409, 5xx)."""


class ResponseError(LLMError):
    """The status was fine, but the answer was not."""


class DecodeError(ResponseError):
    """The body is not this API's JSON."""


class TooLargeError(DecodeError):
    """The body is longer, compressed or decompressed, than any answer of a model."""


class EmptyResponseError(ResponseError):
    """The answer holds no message."""


class BrokenResponseError(ResponseError):
    """The provider ended the answer for a reason that is not known to be good; `text` is the partial text."""

    def __init__(self, message: str, *, text: str = "", **facts: Any) -> None:
        super().__init__(message, **facts)
        self.text = text


class ContentFilterError(ResponseError):
    """The provider withheld the answer, or the model refused."""


class TruncatedError(ResponseError):
    """The answer was cut at the token limit; `text` is the partial one, `thought` is True if the model was thinking."""

    def __init__(self, message: str, *, text: str = "", thought: bool = False, **facts: Any) -> None:
        super().__init__(message, **facts)
        self.text = text
        self.thought = thought


# ---- warnings


class AggregatorWarning(UserWarning):
    """The root of the library's warnings."""


class SandboxWarning(AggregatorWarning):
    """Code that training changes is not contained: the kernel lacks a feature, or another framework runs the code."""


class CassetteWarning(AggregatorWarning):
    """A repair, a fallback or exchanges left unplayed; also in `tape.report`."""


class ModelWarning(AggregatorWarning):
    """A model or its server did not follow the request, without reporting an error."""


class TrainingWarning(AggregatorWarning):
    """Not an error, such as instances that `evaluate` could not score; a run's own are in `result.warnings`."""


_TRANSIENT = (APIConnectionError, RateLimitError, ServerError, ResponseError)


_OWN = (ContextLengthError, ContentFilterError, TruncatedError)

_OF_EVERY_REQUEST = (
    r"api[_ -]?key|credit balance|billing|quota|model_not_found|unknown_model|model identifier is invalid"
    r"|model \S+ (?:(?:was |is )?not found|does not exist|is not supported)|(?:not a valid|invalid|unknown) model"
)
"""Texts of a 400 that every request gets: some providers send one for a wrong key, no credit, or an unknown model."""

_OF_ONE_REQUEST = r"moderat|flagged|content[ _-]?(?:filter|policy|management)|responsible ?ai|safety|usage polic|violat"
"""Texts of a 400 or 403 that only this request gets, although the text may quote any word of the prompt."""

_MISSING_PART = (
    r"(?:file|image|audio|video|document|response|message|item|thread|conversation|cache|container|store)\b.{0,80}"
    r"not (?:be )?(?:found|exist)|support (?:image|audio|video|file|tool|document)"
)
"""Texts of a 404 for a part that one request names, or for an input that the model does not support."""


# ---- what an error means for a run


def ends_run(error: BaseException) -> bool:
    """Return True if no further call can succeed: a cassette's miss, the budget, authentication, an unknown model.

    A refusal of one request (content filter, flagged prompt, invalid image, too long) does not end the run.
    """
    import re  # imported here, because production code that only loads parameters needs none of it

    if isinstance(error, _OWN):
        return False
    if isinstance(error, QuotaError | CassetteError | BudgetExceededError | ConfigError):
        return True
    if isinstance(error, BadRequestError | PermissionDeniedError | NotFoundError):
        text = f"{error.code} {error.message}"
        if isinstance(error, NotFoundError):
            return re.search(_MISSING_PART, text, re.IGNORECASE) is None
        if re.search(_OF_ONE_REQUEST, text, re.IGNORECASE) is not None:
            return False
        return isinstance(error, PermissionDeniedError) or re.search(_OF_EVERY_REQUEST, text, re.IGNORECASE) is not None
    return isinstance(error, LLMError) and not isinstance(error, _TRANSIENT)


def is_infrastructure(error: BaseException) -> bool:
    """Return True if a call was lost without the agent's fault."""
    return isinstance(error, LLMError) and not isinstance(error, _OWN)


def is_own(error: BaseException) -> bool:
    """Return True if an error comes from the code just run; False for a request that this task end.

    Code that calls `sys.exit()`, or awaits a task that it cancelled itself, has failed like any other.
    """
    import asyncio  # imported here, because production code that only loads parameters needs no event loop

    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return isinstance(error, Exception | SystemExit)
