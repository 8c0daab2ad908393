"""The client: `await llm.complete(messages)`, `llm(messages=...)`, `async for delta in llm.stream(messages)`."""

from __future__ import annotations

import asyncio
import os
import random as random_module
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Self
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary, ref

from msgspec.structs import replace

from aggregator import portal
from aggregator.agents.transcripts import current_transcript
from aggregator.cassettes.current import adopted
from aggregator.cassettes.lineage import current_lineage, current_role
from aggregator.errors import ConfigError
from aggregator.llm import tracing
from aggregator.llm.attempts import Attempts, Line
from aggregator.llm.budget import Budget
from aggregator.llm.calls import ApiKey, ChatCall
from aggregator.llm.ledger import Prices, find_price
from aggregator.llm.limiter import Limiter, check_limits, shared_limiter
from aggregator.llm.messages import normalise
from aggregator.llm.owner import current_owner
from aggregator.llm.providers import resolve
from aggregator.llm.retry import RetryPolicy
from aggregator.llm.streams import Stream, StreamedAttempts, read_stream
from aggregator.llm.structured import Validate, as_response_format, ask_structured
from aggregator.protocols import Transport
from aggregator.records import Completion


class LLM:
    """A model by name: `LLM("openai/gpt-4o-mini")`. Nothing has to be closed; one object serves every loop and thread.

    `model` is `provider/model`; None reads Trace's variables (TRACE_LITELLM_MODEL and its kin). A `base_url` of one's
    own gets `api_key`, no default key. `max_attempts` counts all requests of one call, `timeout` all its seconds,
    waiting and other response formats included. `max_concurrency`, `rpm` and `tpm` (requests, tokens a minute) hold for
    all clients of the same (base_url, key, model) in an event loop, the strictest of them. `budget` may be shared.
    `prices` maps model names to `Price`s. `transport`, `retry`, `env`, `clock`, `sleep` and `random` are for tests.

    Calls raise LLMError (see `aggregator.errors`), BudgetExceededError, CassetteError or ConfigError.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        api_key: ApiKey | None = None,
        max_attempts: int = 3,
        timeout: float | None = 600.0,
        max_concurrency: int = 64,
        rpm: float | None = None,
        tpm: float | None = None,
        budget: Budget | None = None,
        prices: Prices | None = None,
        transport: Transport | None = None,
        retry: RetryPolicy | None = None,
        env: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: random_module.Random | None = None,
    ) -> None:
        _check(max_attempts=max_attempts, timeout=timeout)
        check_limits(max_concurrency=max_concurrency, rpm=rpm, tpm=tpm)
        endpoint = resolve(model, base_url=base_url, api_key=api_key, env=os.environ if env is None else env)
        self._given = {"model": model, "base_url": base_url, "api_key": api_key}
        self._injected = {"transport": transport, "env": env, "random": random}
        self._name = endpoint.model
        self.model = f"{endpoint.provider}/{endpoint.model}"
        self.endpoint = endpoint
        self.timeout = timeout
        self.prices = prices
        self.budget = budget
        self._limits = {"max_concurrency": max_concurrency, "rpm": rpm, "tpm": tpm}
        self._limiters: WeakKeyDictionary[asyncio.AbstractEventLoop, Limiter] = WeakKeyDictionary()
        self._latest: tuple[ref[asyncio.AbstractEventLoop], Limiter] | None = None
        self._is_virtual = clock is not time.monotonic or sleep is not asyncio.sleep
        self._host = urlsplit(endpoint.base_url).hostname or ""
        self._line = Line(
            endpoint=endpoint,
            transport=_default_transport() if transport is None else transport,
            limiter=self._limiter,
            policy=replace(retry or RetryPolicy(), max_attempts=max_attempts),
            budget=budget,
            prices=prices,
            clock=clock,
            sleep=sleep,
            random=random or random_module.Random(),  # noqa: S311 - jitter, no secret
            known_price=find_price(endpoint.provider, endpoint.model, prices),
        )

    def __repr__(self) -> str:
        return f"LLM({self.model!r})"

    def __copy__(self) -> LLM:
        return self  # agents are copied; the account behind a client is not

    def __deepcopy__(self, memo: dict[int, Any]) -> LLM:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings; raises ConfigError if an argument holds a secret or cannot leave this process."""
        line = self._line
        injected = {**self._injected, "clock": line.clock, "sleep": line.sleep, "budget": line.budget}
        _check_settings(self.model, injected, **self._given)
        settings = {
            **self._given,
            **self._limits,
            "max_attempts": line.policy.max_attempts,
            "timeout": self.timeout,
            "prices": line.prices,
            "retry": line.policy,
        }
        return _from_settings, (type(self), settings), self._added()

    def _added(self) -> dict[str, Any]:
        """Return the attributes that a subclass or a user added."""
        return {name: value for name, value in vars(self).items() if name not in _ATTRIBUTES}

    async def complete(
        self,
        messages: Any,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | list[str] | tuple[str, ...] | None = None,
        n: int | None = None,
        response_format: Any = None,
        tools: Any = None,
        tool_choice: Any = None,
        extra: Mapping[str, Any] | None = None,
        validate: Validate | None = None,
    ) -> Completion:
        """Ask the model once and return its answer.

        `messages` is a text or messages in OpenAI's shape. `response_format` is OpenAI's dict, a JSON schema or a type;
        the answer is then checked against it, or by `validate` (raises ValueError for a text that will not do).
        `extra` is merged into the request's body. The call is shown in the current transcript if the agent makes it.
        """
        call = ChatCall(
            model=self._name,
            messages=normalise(messages),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop) if isinstance(stop, list) else stop,
            n=n,
            response_format=as_response_format(response_format),
            tools=None if tools is None else tuple(tools),
            tool_choice=tool_choice,
            extra=extra or {},
        )
        transcript = current_transcript()
        shown = transcript.llm_call(call.messages) if transcript is not None and current_role() == "agent" else None
        try:
            completion = await self.answer(call, validate)
        except BaseException as error:
            if shown is not None:
                shown.fail(error)
            raise
        if shown is not None:
            shown.finish(completion)
        return completion

    async def answer(self, call: ChatCall, validate: Validate | None = None) -> Completion:
        """Answer one call, which `complete` makes and shows in the transcript. A worker process asks its owner."""
        if (owner := current_owner()) is not None:
            return await owner.answer(self, call, validate)
        attempts = Attempts(self._line, self.timeout)
        try:
            if tracing.has_spans():
                with tracing.span(self._line.endpoint.provider, call, self._host) as span:
                    completion = await _ask(attempts, call, validate)
                    span.answered(completion, attempts.count)
            else:
                completion = await _ask(attempts, call, validate)
        except BaseException as error:
            self._trace(attempts, None, error)
            raise
        finally:
            attempts.leave()
        self._trace(attempts, completion, None)
        return completion

    def __call__(self, messages: Any = None, **options: Any) -> Completion:
        """Ask from synchronous code, as Trace's models are called: `llm(messages=[...], max_tokens=...)`."""
        if messages is None:
            raise ConfigError("expected messages, got none: llm(messages=[{'role': 'user', 'content': '…'}])")
        with adopted():
            return portal.call(self.complete, messages, **options)

    def stream(
        self,
        messages: Any,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | list[str] | tuple[str, ...] | None = None,
        tools: Any = None,
        tool_choice: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Stream:
        """Ask and read the answer as it comes: `async for delta in llm.stream(...)`; `.completion` once it ended.

        Errors are those of `complete`. After the first delta nothing is tried again, since it has been used already.
        """
        call = ChatCall(
            model=self._name,
            messages=normalise(messages),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop) if isinstance(stop, list) else stop,
            tools=None if tools is None else tuple(tools),
            tool_choice=tool_choice,
            extra=extra or {},
            stream=True,
        )
        return Stream(call, self.deltas)

    def deltas(self, call: ChatCall) -> AsyncGenerator[str | Completion, None]:
        """Yield the deltas of a streamed call, the whole answer last; `stream` shows them in the transcript."""
        if (owner := current_owner()) is not None:
            return owner.deltas(self, call)
        return read_stream(StreamedAttempts(self._line, self.timeout), call, self._trace)

    def _limiter(self) -> Limiter:
        """This loop's limiter, shared with the other clients of the same account and model."""
        loop = asyncio.get_running_loop()
        latest = self._latest
        if latest is not None and latest[0]() is loop:
            return latest[1]
        limiter = self._limiters.get(loop)
        if limiter is None:
            limiter = self._limiters[loop] = self._new_limiter()
        self._latest = (ref(loop), limiter)
        return limiter

    def _new_limiter(self) -> Limiter:
        line = self._line
        if self._is_virtual:
            return Limiter(clock=line.clock, sleep=line.sleep, **self._limits)  # type: ignore[arg-type]
        key = line.endpoint.api_key
        account = str(key) if not callable(key) else f"key of {id(key)}"
        return shared_limiter((line.endpoint.base_url, account, line.endpoint.model), **self._limits)  # type: ignore[arg-type]

    def _trace(self, attempts: Attempts, completion: Completion | None, error: BaseException | None) -> None:
        if not tracing.listening():
            return
        tracing.event(
            "llm.call",
            lineage=current_lineage() or None,
            role=current_role(),
            provider=self._line.endpoint.provider,
            model=self._line.endpoint.model,
            attempts=attempts.count,
            finish_reason=completion.finish_reason if completion is not None else None,
            replayed=completion.replayed if completion is not None else None,
            ms=round(attempts.milliseconds(), 3),
            error=type(error).__name__ if error is not None else None,
            status=getattr(error, "status", None),
            request_id=getattr(error if completion is None else completion, "request_id", None),
            **tracing.usage_facts(completion.usage if completion is not None else None),
        )

    async def aclose(self) -> None:
        """Close this loop's connections now; not needed, the loop's end closes them too."""
        if current_owner() is not None:
            return
        close = getattr(self._line.transport, "aclose", None)
        if close is not None:
            await close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


_INJECTED = {"clock": time.monotonic, "sleep": asyncio.sleep}
_ATTRIBUTES = {"model", "endpoint", "timeout", "prices", "budget"} | {
    f"_{name}" for name in ("given", "host", "injected", "is_virtual", "latest", "limiters", "limits", "line", "name")
}


def _check_settings(name: str, injected: Mapping[str, Any], model: Any, base_url: Any, api_key: Any) -> None:
    """Raise ConfigError that names an argument which a pickle cannot keep."""
    from aggregator.cassettes.redaction import redact_url

    problem = next((key for key, value in injected.items() if value is not _INJECTED.get(key)), "")
    remedy = "leave it out and give it to the client where the pickle is loaded"
    if isinstance(api_key, str) and api_key:
        problem, remedy = "api_key", "set the provider's environment variable, or give an importable function"
    elif callable(api_key) and not _is_importable(api_key):
        problem, remedy = "api_key", "give a function that is defined at the top level of a module"
    elif base_url and redact_url(base_url) != base_url:
        problem, remedy = "base_url", "leave the secret out of the address and give api_key"
    if problem:
        raise ConfigError(
            f"Expected LLM({name!r}) to hold only settings when it is pickled, got one with {problem}=...; {remedy} "
            f"- at LLM.{problem}"
        )


def _is_importable(function: Any) -> bool:
    """Return True if a function is found under its own name in its module."""
    found: Any = sys.modules.get(getattr(function, "__module__", None) or "")
    for name in getattr(function, "__qualname__", "<none>").split("."):
        found = getattr(found, name, None)
    return found is function


def _from_settings(kind: type[LLM], settings: Mapping[str, Any]) -> LLM:
    """Make a client again from its pickled settings."""
    llm = kind.__new__(kind)
    LLM.__init__(llm, **settings)
    return llm


def _check(*, max_attempts: int, timeout: float | None) -> None:
    if max_attempts < 1:
        raise ConfigError(f"expected max_attempts >= 1 (the first try counts), got {max_attempts!r}")
    if timeout is not None and not timeout > 0:
        raise ConfigError(f"expected timeout > 0 seconds or None, got {timeout!r}")


def _ask(attempts: Attempts, call: ChatCall, validate: Validate | None) -> Awaitable[Completion]:
    if call.response_format is not None and call.response_format["type"] != "text":
        return ask_structured(attempts, call, validate)
    attempts.issue(call)
    return attempts.ask()


def _default_transport() -> Transport:
    """The process's own; aiohttp is imported here, not with the package."""
    from aggregator.llm.transport import shared_transport

    return shared_transport()
