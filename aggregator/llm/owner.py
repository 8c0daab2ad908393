"""The owner of a worker's calls: the process that has the keys, the cassette, the budget and the limits.

In the process that runs the training, an `Owner` holds the models that workers refer to by number. In a worker, every
`LLM` passes its calls to the one `RemoteOwner` of the process. Calls go as `Call`s: the question and its place in the
run, without address and without authentication.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from aggregator.agents.transcripts import transcript
from aggregator.cassettes.lineage import lineage_at
from aggregator.errors import ConfigError
from aggregator.llm.calls import ChatCall, Target
from aggregator.records import Completion, Role

if TYPE_CHECKING:
    from aggregator.llm.client import LLM

Validate = Callable[[str], Any]


class Call(Struct, frozen=True, kw_only=True):
    """One call of a worker. `chat` is for an `LLM`, `messages` and `options` for any other model.

    `model` is the owner's number of the model.
    """

    model: int
    lineage: str
    role: Role
    chat: ChatCall | None = None
    messages: Any = None
    options: Mapping[str, Any] = {}


class Owner:
    """The models of this process, called for workers: keys, cassette, budget, limits and ledger stay here.

    `answer` and `deltas` run in the context of their caller: its tape, its budget and its ledger are used. The lineage
    and the role are those of the call.
    """

    def __init__(self) -> None:
        self._models: list[Any] = []
        self._lock = threading.Lock()

    def number_of(self, model: Any) -> int:
        """Return the number of a model, a new one for an unknown model."""
        with self._lock:
            for number, known in enumerate(self._models):
                if known is model:
                    return number
            self._models.append(model)
            return len(self._models) - 1

    def model(self, number: int) -> Any:
        """Return a model by its number."""
        return self._models[number]

    async def answer(self, call: Call, validate: Validate | None = None) -> Completion:
        """Answer a call; raises the model's exception. `validate` may be async."""
        model = self._models[call.model]
        with lineage_at(call.lineage, call.role):
            if call.chat is not None:
                return await model.answer(call.chat, validate)  # type: ignore[no-any-return]
            with transcript():  # the worker has shown the call in its own
                return await model.complete(call.messages, **call.options)  # type: ignore[no-any-return]

    async def deltas(self, call: Call) -> AsyncGenerator[str | Completion, None]:
        """Yield the deltas of a streamed call, the whole answer last."""
        if call.chat is None:
            raise ConfigError(f"Expected a streamed call of an LLM, got one of {self._models[call.model]!r}")
        with lineage_at(call.lineage, call.role):
            pieces = self._models[call.model].deltas(call.chat)
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece


class RemoteOwner(Protocol):
    """A worker process's interface to its owner."""

    async def answer(self, llm: LLM, call: ChatCall, validate: Validate | None) -> Completion:
        """Have a call answered by the owner."""
        ...

    def deltas(self, llm: LLM, call: ChatCall) -> AsyncGenerator[str | Completion, None]:
        """Have a streamed call answered by the owner: its deltas, the whole answer last."""
        ...


_owner: RemoteOwner | None = None


def current_owner() -> RemoteOwner | None:
    """Return the owner of this process's calls; None in every process that is not a worker."""
    return _owner


def pass_calls_to(owner: RemoteOwner) -> None:
    """Pass every call of an `LLM` in this process to `owner`. A worker process does so once, at its start."""
    global _owner  # noqa: PLW0603 - a fact about the process, like its number
    _owner = owner


# How a client is sent to a worker: as its settings.

_DEFAULTS = {"clock": time.monotonic}
ATTRIBUTES = {"model", "endpoint", "timeout", "prices", "budget", "extra"} | {
    f"_{name}" for name in ("given", "injected", "options", "limiters", "line", "asking", "models")
}


def reduce_client(
    llm: LLM, given: Mapping[str, Any], injected: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return the result of `__reduce__`: the settings, and the attributes that a subclass or a user added.

    `given` identifies the model, `injected` are the budget and the arguments for tests, `options` all others. Raises
    ConfigError if an argument holds a secret or cannot leave this process.
    """
    _check_settings(llm.model, injected, given)
    return from_settings, (type(llm), {**given, **options, "timeout": llm.timeout}), _added(llm)


def _added(llm: LLM) -> dict[str, Any]:
    return {name: value for name, value in vars(llm).items() if name not in ATTRIBUTES}


def from_settings(kind: type[LLM], settings: Mapping[str, Any]) -> LLM:
    """Rebuild a client from its settings."""
    from aggregator.llm.client import LLM

    llm = kind.__new__(kind)
    LLM.__init__(llm, **settings)
    return llm


def stand_in_for(llm: LLM) -> tuple[type[LLM], dict[str, Any]]:
    """Return class and attributes of a client's replacement in a worker process: no key, no address."""
    target = Target(provider=llm.endpoint.provider, model=llm.endpoint.model, base_url="")
    state = {"model": llm.model, "endpoint": target, "timeout": llm.timeout, "prices": llm.prices, "budget": None}
    state["extra"] = llm.extra
    return type(llm), {**_added(llm), **state}


def make_stand_in(kind: type[LLM], state: Mapping[str, Any], number: int) -> LLM:
    """Build a client's replacement: a client that passes its calls to the owner, by `number`."""
    from aggregator.llm import asking

    llm = kind.__new__(kind)
    vars(llm).update(state, owner_number=number, _asking=asking, _line=None)
    return llm


def _check_settings(name: str, injected: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ConfigError with the name of an argument that cannot be pickled."""
    from aggregator.cassettes.redaction import redact_url
    from aggregator.llm.codecs.base import is_secret_header
    from aggregator.llm.names import CloudToken

    base_url, api_key = given["base_url"], given["api_key"]
    problem = next((key for key, value in injected.items() if value is not _DEFAULTS.get(key)), "")
    remedy = "leave it out and give it to the client where the pickle is loaded"
    if isinstance(api_key, str) and api_key:
        problem, remedy = "api_key", "set the provider's environment variable, or give an importable function"
    elif callable(api_key) and not isinstance(api_key, CloudToken) and not _is_importable(api_key):
        problem, remedy = "api_key", "give a function that is defined at the top level of a module"
    elif base_url and redact_url(base_url) != base_url:
        problem, remedy = "base_url", "leave the secret out of the address and give api_key"
    if any(is_secret_header(header) for header in given["headers"] or ()):
        problem, remedy = "headers", "leave out those that authenticate"
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
