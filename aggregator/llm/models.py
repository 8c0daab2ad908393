"""`as_model` makes one kind of model of our client, a model's name, a callable, litellm or OpenAI's clients."""

from __future__ import annotations

import asyncio
import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any

import msgspec
from msgspec.structs import replace

from aggregator import portal
from aggregator.agents.transcripts import current_transcript
from aggregator.cassettes.lineage import current_role, unwatched
from aggregator.checks import contain_stop, is_async
from aggregator.errors import (
    APIConnectionError,
    APITimeoutError,
    BadRequestError,
    ConfigError,
    LLMError,
    ModelWarning,
    TruncatedError,
)
from aggregator.llm.budget import THINKING_ROOM, Amount, Budget, current_budget, pico, spent_by, thinks, upper_tokens
from aggregator.llm.calls import ChatCall, Limits, Target
from aggregator.llm.codecs.failures import Fault, classify, retry_after
from aggregator.llm.codecs.openai import OpenAIChat
from aggregator.llm.ledger import Prices, believed, count, find_price, need_price
from aggregator.llm.messages import normalise
from aggregator.llm.names import split_name
from aggregator.llm.retry import check_answer
from aggregator.protocols import ChatModel
from aggregator.records import Choice, Completion, HTTPReply, Message

_THREADS = 64
_OURS = frozenset({"validate", "extra"})  # options of our client that other models do not know
_CODEC = OpenAIChat(Target(provider="callable", model="", base_url="http://localhost"))


def as_model(model: Any = None, *, name: str | None = None, prices: Prices | None = None) -> ChatModel:
    """Return something with `await complete(messages, ...)`.

    Takes a `ChatModel` such as `LLM` (returned as it is), a name, several names or None (makes an `LLM`), any callable
    `llm(messages=...)`, sync or async, that returns OpenAI's shape, a dict of it or a text, litellm (the module or a
    Router) and OpenAI's clients, sync or async; the last two need the model's `name`. A budget in USD finds the price
    of a `name` such as "openai/gpt-4o-mini" as `LLM` does, in `prices` first.

    >>> as_model(lambda messages: "hello")(messages="Hi").text
    'hello'
    """
    if model is None or isinstance(model, str | list | tuple):
        from aggregator.llm.client import LLM

        return LLM(model, prices=prices)
    create = _create_of(model)
    if create is not None:
        if name is None:
            raise ConfigError(f"Expected the model's name with {model!r}: as_model(client, name='gpt-4o-mini')")
        return CallableModel(partial(create, model=name), name=name, prices=prices)
    if callable(getattr(model, "complete", None)):
        return model  # type: ignore[no-any-return]
    if callable(model):
        shown = name or str(getattr(model, "__name__", type(model).__name__))
        return CallableModel(model, name=shown, prices=prices)
    raise ConfigError(
        f"Expected a model (LLM, its name, a callable llm(messages=...), litellm, an OpenAI client), got {model!r}"
    )


def _create_of(model: Any) -> Callable[..., Any] | None:
    """The completion function of an SDK's client."""
    create = getattr(getattr(getattr(model, "chat", None), "completions", None), "create", None)
    return create if callable(create) else getattr(model, "acompletion", None)


class CallableModel:
    """A callable `llm(messages=..., **options)` as a model. Sync ones run in separate threads."""

    def __init__(self, function: Callable[..., Any], *, name: str, prices: Prices | None = None) -> None:
        self.model = name
        self._priced_as = _provider_and_model(name)
        self._prices = prices
        self._price = find_price(*self._priced_as, prices)
        self._function = function
        self._accepted = _accepted(function)
        self._pool: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"as_model({self.model})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CallableModel:
        return self

    def __call__(self, messages: Any = None, **options: Any) -> Completion:
        """Ask from synchronous code."""
        return portal.call(self.complete, messages, **options)

    async def complete(self, messages: Any, **options: Any) -> Completion:
        """Ask once. An SDK's error with a status becomes ours; any other error passes through."""
        portal.refuse_strays("a call of a model")
        normal = normalise(messages)
        transcript = current_transcript()
        shown = transcript.llm_call(normal) if transcript is not None and current_role() == "agent" else None
        budget = current_budget()
        held = Amount(calls=1)
        if budget is not None:
            held = self._most(normal, options, budget) if budget.needs_tokens else held
            await budget.reserve(held)
        spent = held
        try:
            answer = await self._ask(list(normal), options)
            completion = self._with_cost(as_completion(answer))
            spent = spent_by(completion.usage, held)
            if not isinstance(answer, str | Completion):
                check_answer(completion, self.model, may_be_empty=options.get("stop") is not None)
        except Exception as error:
            if shown is not None:
                shown.fail(error)
            raise
        finally:
            if budget is not None:
                budget.settle(held, spent)
        count(current_role(), completion.usage, completion.milliseconds)
        if shown is not None:
            shown.finish(completion)
        return completion

    async def _ask(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> Any:
        given = {key: value for key, value in options.items() if value is not None and key not in _OURS}
        if self._accepted is not None:
            given = {key: value for key, value in given.items() if key in self._accepted}
        ask = partial(self._function, messages=messages, **given)
        try:
            with unwatched():  # counted here
                if is_async(self._function):
                    return await ask()
                result = await self._in_thread(ask)
                return await result if inspect.isawaitable(result) else result
        except Exception as error:
            ours = as_error(error)
            if ours is None:
                raise
            raise ours from error

    async def _in_thread(self, ask: Callable[[], Any]) -> Any:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="aggregator-model")
        context = copy_context()

        def run() -> Any:
            try:
                return context.run(ask)
            except StopIteration as error:
                raise contain_stop(error) from error

        return await asyncio.get_running_loop().run_in_executor(self._pool, run)

    def _most(self, messages: tuple[dict[str, Any], ...], options: Mapping[str, Any], budget: Budget) -> Amount:
        limits = Limits(options.get("max_tokens"), options.get("n") or 1)
        given, answered = upper_tokens(msgspec.json.encode(messages), messages, limits)
        if budget.usd is None:
            return Amount(0, given + answered, 1)
        self._price = self._price or need_price(*self._priced_as, self._prices)
        return Amount(pico(self._price.most(given, answered)), given + answered, 1)

    def _with_cost(self, completion: Completion) -> Completion:
        usage = believed(completion)
        if self._price is not None and usage.cost is None:
            usage = replace(usage, cost=self._price.cost(usage, completion.service_tier))
        return completion if usage is completion.usage else replace(completion, usage=usage)


async def complete_own(model: ChatModel, messages: Any, *, max_tokens: int, **options: Any) -> Completion:
    """Ask for a feature of the library itself (optimizer, merge, judge), without options that the provider lacks.

    Options that its API does not have are left out with a warning, and so are a seed and a temperature that the server
    refuses by their name. `max_tokens` is the room for the answer: a model
    that thinks gets more, as thinking counts there too. Such models are known by their name, or by the client's
    `extra`; another model whose answer is cut before its text or while it thinks is asked once more with that room.
    """
    options = _known_options(model, options)
    room = max_tokens + THINKING_ROOM
    try:
        if _is_thinker(model):
            return await model.complete(messages, max_tokens=room, **options)
        try:
            completion = await model.complete(messages, max_tokens=max_tokens, **options)
        except TruncatedError as error:
            if error.text and not error.thought:
                raise
        else:
            thought = completion.reasoning or completion.usage.reasoning_tokens
            if completion.finish_reason != "length" or (completion.text and not thought):
                return completion
        return await model.complete(messages, max_tokens=room, **options)
    except BadRequestError as error:
        said = f"{error.code} {error.message}"
        refused = [name for name in _OPTIONAL if options.get(name) is not None and re.search(rf"\b{name}\b", said)]
        if not refused:
            raise
        for name in refused:
            _warn_left_out(name, f"{model!r}")
    return await complete_own(model, messages, max_tokens=max_tokens, **{**options, **dict.fromkeys(refused)})


_OPTIONAL = ("seed", "temperature")


def _warn_left_out(name: str, by: str) -> None:
    warnings.warn(
        f"Expected {name} to be sent, which {by} does not have; it is left out, and answers differ by chance",
        ModelWarning,
        stacklevel=3,
    )


def _known_options(model: ChatModel, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that every API of the model has; the others cause a warning."""
    models: Sequence[Any] = getattr(model, "models", (model,))
    lacking = {}
    for found in models:
        endpoint: Any = getattr(found, "endpoint", None)
        for name in getattr(getattr(endpoint, "codec", None), "lacks", ()):
            if options.get(name) is not None:
                lacking[name] = endpoint.provider
    if not lacking:
        return options
    for name, provider in lacking.items():
        _warn_left_out(name, provider)
    return {name: value for name, value in options.items() if name not in lacking}


_THINKING_FIELDS = frozenset({"reasoning", "reasoning_effort", "thinking", "enable_thinking", "thinkingConfig"})


def _is_thinker(model: ChatModel) -> bool:
    name, extra = getattr(model, "model", None), getattr(model, "extra", None)
    if isinstance(name, str) and thinks(name):
        return True
    if not extra:
        return False
    inner = extra.get("generationConfig") if isinstance(extra, Mapping) else None
    asked = {*extra, *(inner if isinstance(inner, Mapping) else ())}
    return not _THINKING_FIELDS.isdisjoint(asked)


def _provider_and_model(name: str) -> tuple[str, str]:
    """Return the name by which a model's price is found; a function's own name belongs to no provider."""
    try:
        provider, model = split_name(name)
    except ConfigError:
        return "callable", name
    return provider.name, model


def _accepted(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the options that a callable takes; None for any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def as_completion(answer: Any) -> Completion:
    """Read an answer of OpenAI's shape, as object or dict, or a text; a list of one text is what a `dspy.LM` returns.

    >>> as_completion({"choices": [{"message": {"content": "hi"}}]}).text
    'hi'
    """
    if isinstance(answer, Completion):
        return answer
    match answer:
        case (str() as text) | [str() as text] | [{"text": str() as text}]:
            return Completion(choices=(Choice(message=Message(content=text)),))
    body = msgspec.json.encode(_plain(answer), enc_hook=str)
    return _CODEC.decode(HTTPReply(status=200, body=body, headers={}), ChatCall(model="", messages=()))


def _plain(value: Any) -> Any:
    """Return an SDK's object as dicts and lists."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__dict__") and not callable(value):
        return {key: _plain(item) for key, item in vars(value).items() if not key.startswith("_")}
    return value


def as_error(error: Exception) -> LLMError | None:
    """Return our error for an SDK's: by its status, or as a lost connection; None if it is neither."""
    if isinstance(error, LLMError):
        return None
    status = getattr(error, "status_code", None)
    message = f"{type(error).__name__}: {error}"
    if isinstance(status, int) and status >= 300:
        words = tuple(
            word for word in (getattr(error, "code", None), getattr(error, "type", None)) if isinstance(word, str)
        )
        kind = classify(status, Fault(message=str(error), words=words))
        headers = getattr(getattr(error, "response", None), "headers", None) or {}
        return kind(message, status=status, code=words[0] if words else None, retry_after=retry_after(headers))
    name = type(error).__name__
    if "Timeout" in name:
        return APITimeoutError(message)
    return APIConnectionError(message) if "Connection" in name else None
