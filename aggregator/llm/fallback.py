"""Fallback models: `LLM(["openai/gpt-5", "anthropic/claude-sonnet-4-5"])` asks the next one if a model does not answer.

Each model has its own attempts, deadline, limits and response formats. A cassette records the requests of all of them,
so a replay falls back as its recording did.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from msgspec.structs import replace

from aggregator.cassettes.lineage import current_lineage, current_role
from aggregator.errors import (
    APIConnectionError,
    BadRequestError,
    ConfigError,
    ContentFilterError,
    ContextLengthError,
    LLMError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ResponseError,
    ServerError,
    TruncatedError,
)
from aggregator.llm import tracing
from aggregator.llm.calls import ChatCall
from aggregator.llm.client import LLM
from aggregator.llm.owner import current_owner
from aggregator.llm.schemas import Validate
from aggregator.records import Completion

_FALLS = (APIConnectionError, RateLimitError, ServerError, NotFoundError, ContextLengthError, ResponseError)
_STAYS = (ContentFilterError, TruncatedError)
_UNKNOWN_MODEL = re.compile(r"model_not_found|unknown_model|model identifier is invalid|model \S+ (?:was )?not found")
_OF_ONE_SERVER = ("base_url", "api_key", "api", "headers")  # any of them may hold a key


def fails_over(error: LLMError) -> bool:
    """Return True if another model may answer after this failure.

    This is so if the model, its server or its quota is at fault: no connection, too slow, rate limits and server errors
    after all attempts, a used-up quota, an unknown model, a prompt beyond its context, an unusable answer. It is not so
    for a refused key, an invalid request, a withheld or a truncated answer: another model would hide a mistake or
    answer a refused request.

    >>> fails_over(ServerError("")), fails_over(ContentFilterError(""))
    (True, False)
    """
    if isinstance(error, _STAYS):
        return False
    if isinstance(error, _FALLS):
        return True
    named = isinstance(error, BadRequestError | PermissionDeniedError)
    return named and _UNKNOWN_MODEL.search(f"{error.code} {error.message}") is not None


class FallbackLLM(LLM):
    """Several models in the order in which they are called; the class of `LLM([...])`.

    The options apply to each model given by name, including its attempts and timeout; an `LLM` in the list keeps its
    own. `model`, `endpoint`, `prices` and `timeout` are the first model's.
    """

    def __init__(self, models: Sequence[str | LLM], **options: Any) -> None:
        given = [name for name in _OF_ONE_SERVER if options.get(name) is not None]
        if given:
            raise ConfigError(
                f"Expected no {given[0]} with a list of models, since it belongs to one server; "
                f"give LLM(…, {given[0]}=…) in the list"
            )
        if not models or not all(isinstance(model, str | LLM) for model in models):
            raise ConfigError(f"Expected a list of models, each a name or an LLM, got {list(models)!r}")
        self._models = tuple(model if isinstance(model, LLM) else LLM(model, **options) for model in models)
        first = self._models[0]
        self.model, self.endpoint = first.model, first.endpoint
        self.timeout, self.prices, self.budget, self.extra = first.timeout, first.prices, first.budget, first.extra
        from aggregator.llm import asking

        self._asking = asking

    @property
    def models(self) -> tuple[LLM, ...]:
        """The models, the first one first."""
        return self._models

    def __repr__(self) -> str:
        return f"LLM({[model.model for model in self._models]!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._models,)

    async def answer(self, call: ChatCall, validate: Validate | None = None) -> Completion:
        """Answer one call by the first model that succeeds; raises the error of the last one called."""
        if (owner := current_owner()) is not None:
            return await owner.answer(self, call, validate)
        failed = _Failed()
        for model in self._models:
            try:
                completion = await model.answer(replace(call, model=model.endpoint.model), validate)
            except LLMError as error:
                failed.take(model, error, is_last=model is self._models[-1])
            else:
                return failed.counted(completion)
        raise AssertionError("the last model answers or raises")

    async def deltas(self, call: ChatCall) -> AsyncGenerator[str | Completion, None]:
        """Yield the deltas of the first model that answers; after the first delta no other one is called."""
        if (owner := current_owner()) is not None:
            async with aclosing(owner.deltas(self, call)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        failed = _Failed()
        for model in self._models:
            has_begun = False
            try:
                async with aclosing(model.deltas(replace(call, model=model.endpoint.model))) as pieces:
                    async for piece in pieces:
                        has_begun = True
                        yield piece if isinstance(piece, str) else failed.counted(piece)
            except LLMError as error:
                failed.take(model, error, is_last=has_begun or model is self._models[-1])
            else:
                return

    async def aclose(self) -> None:
        """Close this loop's connections of all models."""
        for model in self._models:
            await model.aclose()


class _Failed:
    """The models of one call that did not answer."""

    def __init__(self) -> None:
        self.attempts = 0
        self._errors: list[str] = []

    def counted(self, completion: Completion) -> Completion:
        """Return the answer with the attempts of all called models."""
        return replace(completion, attempts=self.attempts + completion.attempts) if self.attempts else completion

    def take(self, model: LLM, error: LLMError, *, is_last: bool) -> None:
        """Count a model's failure and report it; raises it if no other model is to be called."""
        self.attempts += error.attempts
        if is_last or not fails_over(error):
            error.attempts = self.attempts
            for line in self._errors:
                error.add_note(line)
            raise error
        self._errors.append(f"Before, {model.model} failed: {type(error).__name__}: {error}")
        if tracing.listening():
            tracing.event(
                "llm.fallback", lineage=current_lineage() or None, role=current_role(), **_facts(model, error)
            )


def _facts(model: LLM, error: LLMError) -> Mapping[str, Any]:
    return {
        "provider": model.endpoint.provider,
        "model": model.endpoint.model,
        "attempts": error.attempts,
        "error": type(error).__name__,
        "status": error.status,
        "code": error.code,
        "request_id": error.request_id,
    }
