"""The client: `await llm.complete(messages)`, `llm(messages=...)`, `async for delta in llm.stream(messages)`.

This is the interface; a call runs in `asking.py` and the modules below it, which load with the first client.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from aggregator.errors import ConfigError
from aggregator.llm.calls import ApiKey, ChatCall, as_tools, check_choice_and_extra
from aggregator.llm.messages import normalise
from aggregator.records import Completion

if TYPE_CHECKING:
    from random import Random

    from aggregator.llm.budget import Budget
    from aggregator.llm.ledger import Prices
    from aggregator.llm.retry import RetryPolicy
    from aggregator.llm.schemas import Validate
    from aggregator.llm.streams import Stream
    from aggregator.protocols import Transport


class LLM:
    """A model by name: `LLM("openai/gpt-4o-mini")`. Nothing has to be closed; one object serves every loop and thread.

    `model` is `provider/model`, or a list of models to fall back on, one after the other; None reads Trace's variables
    (TRACE_LITELLM_MODEL and others). A custom `base_url` gets `api_key`, never a default key. `api="responses"` calls
    OpenAI's Responses API; models that have no other get it by default. `max_attempts` limits all requests of one call,
    `timeout` all its seconds, including waits and other response formats. `attempt_timeout` are the seconds of one
    attempt, of a stream those until its next piece; by default half of `timeout`, for the last attempt the rest.
    `max_concurrency`, `rpm` and `tpm` (requests, tokens a minute) hold for all clients of the same (base_url, key,
    model) in an event loop, the strictest of them; with `adaptive=False` a 429 does not slow down other calls. `extra`
    is merged into the body of every call (effort, service tier, routing, cache), `headers` go with every request.
    `budget` may be shared. `prices` maps model names to `Price`s. `transport`, `retry`, `env`, `clock`, `sleep` and
    `random` are for tests.

    Calls raise LLMError (see `aggregator.errors`), BudgetExceededError, CassetteError or ConfigError.

    >>> from aggregator.testing import FakeTransport
    >>> llm = LLM("openai/gpt-4o-mini", api_key="none", transport=FakeTransport("Hello."))
    >>> llm("Say hello.").text
    'Hello.'
    """

    owner_number: int | None = None
    """The number of this model in the process that started the worker; None outside of workers."""

    def __new__(cls, model: Any = None, **_: Any) -> Self:
        """Return an instance of the class for several models if a list is given."""
        if cls is not LLM or not isinstance(model, list | tuple):
            return super().__new__(cls)
        from aggregator.llm.fallback import FallbackLLM

        return super().__new__(FallbackLLM)  # type: ignore[return-value]

    def __init__(
        self,
        model: str | Sequence[str | LLM] | None = None,
        *,
        base_url: str | None = None,
        api_key: ApiKey | None = None,
        api: str | None = None,
        max_attempts: int = 3,
        timeout: float | None = 600.0,
        attempt_timeout: float | None = None,
        max_concurrency: int = 64,
        rpm: float | None = None,
        tpm: float | None = None,
        adaptive: bool = True,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        budget: Budget | None = None,
        prices: Prices | None = None,
        transport: Transport | None = None,
        retry: RetryPolicy | None = None,
        env: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] | None = None,
        random: Random | None = None,
    ) -> None:
        import os

        from aggregator.llm import asking
        from aggregator.llm.attempts import Line
        from aggregator.llm.names import resolve

        self._given: dict[str, Any] = {"model": model, "base_url": base_url, "api_key": api_key}
        self._given |= {"api": api, "headers": headers}
        self._options: dict[str, Any] = {
            "max_attempts": max_attempts,
            "timeout": timeout,
            "attempt_timeout": attempt_timeout,
            "max_concurrency": max_concurrency,
            "rpm": rpm,
            "tpm": tpm,
            "adaptive": adaptive,
            "extra": extra,
            "prices": prices,
            "retry": retry,
        }
        injected: dict[str, Any] = {"budget": budget, "transport": transport, "clock": clock, "sleep": sleep}
        injected["random"] = random
        self._injected = {**injected, "env": env}
        self.endpoint = resolve(**self._given, env=os.environ if env is None else env)
        self.model = f"{self.endpoint.provider}/{self.endpoint.model}"
        self._asking = asking
        self._line = Line(self.endpoint, **self._options, **injected)
        self.timeout, self.prices, self.budget, self.extra = timeout, prices, budget, self._line.extra
        self._limiters = self._line.limiter.by_loop

    def __repr__(self) -> str:
        return f"LLM({self.model!r})"

    def __copy__(self) -> LLM:
        return self  # agents are copied; the account behind a client is not

    def __deepcopy__(self, memo: dict[int, Any]) -> LLM:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings; raises ConfigError if an argument holds a secret or cannot leave this process."""
        from aggregator.llm.owner import reduce_client

        return reduce_client(self, self._given, self._injected, self._options)

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
        the answer is then checked against it, or by `validate` (which raises ValueError for an invalid text). `extra`
        is merged into the request's body. The call is shown in the current transcript if the agent makes it.
        """
        if tool_choice is not None or extra is not None:
            check_choice_and_extra(tool_choice, extra)
        if validate is not None and (response_format is None or not callable(validate)):
            raise ConfigError(
                f"Expected validate as the check of an answer in a response_format, got {validate!r} with "
                f"response_format={response_format!r}; give both, or check the text yourself"
            )
        call = ChatCall(
            model=self.endpoint.model,
            messages=normalise(messages),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop) if isinstance(stop, list) else stop,
            n=n,
            response_format=response_format,
            tools=None if tools is None else as_tools(tools),
            tool_choice=tool_choice,
            extra=extra or {},
        )
        return await self._asking.complete(self, call, validate)

    def answer(self, call: ChatCall, validate: Validate | None = None) -> Awaitable[Completion]:
        """Answer one call, which `complete` makes and shows in the transcript. A worker process asks its owner."""
        return self._asking.answer(self, self._line, call, validate)

    def __call__(self, messages: Any = None, **options: Any) -> Completion:
        """Ask from synchronous code, as Trace's models are called: `llm(messages=[...], max_tokens=...)`."""
        if messages is None:
            raise ConfigError("Expected messages, got none: llm(messages=[{'role': 'user', 'content': '…'}])")
        from aggregator import portal
        from aggregator.cassettes.lineage import adopted

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

        Errors are those of `complete`. After the first delta there is no retry, because the delta has been used.
        """
        check_choice_and_extra(tool_choice, extra)
        call = ChatCall(
            model=self.endpoint.model,
            messages=normalise(messages),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop) if isinstance(stop, list) else stop,
            tools=as_tools(tools),
            tool_choice=tool_choice,
            extra=extra or {},
            stream=True,
        )
        from aggregator.llm.streams import Stream

        return Stream(call, self.deltas)

    def deltas(self, call: ChatCall) -> AsyncGenerator[str | Completion, None]:
        """Yield the deltas of a streamed call, the whole answer last; `stream` shows them in the transcript."""
        return self._asking.deltas(self, self._line, call)

    async def aclose(self) -> None:
        """Close this loop's connections now; optional, since the end of the loop closes them too."""
        from aggregator.llm.owner import current_owner

        if current_owner() is not None:
            return
        close = getattr(self._line.transport, "aclose", None)
        if close is not None:
            await close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


# `inspect.signature(LLM)` shows the constructor's signature.
LLM.__new__.__wrapped__ = LLM.__init__  # type: ignore[attr-defined]
