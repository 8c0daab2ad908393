"""Calls of an agent's own clients, counted like our client's: transcript, usage, budget, lost calls.

The patches of `cassettes/patches` show each request and its answer to a `Part`, with or without a cassette. A run
watches through one `Observed`; each rollout, each guide and each proposal through a part, which records its own lost
calls. Calls of our own client are ignored, because it counts itself.

A budget's refusal is raised inside an SDK, which may retry it or wrap it. So the run remembers it, and raises it again
when the rollout ends.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import ceil
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from aggregator.agents.transcripts import LLMCall, current_transcript
from aggregator.cassettes.clients import families
from aggregator.cassettes.lineage import WATCH, current_role, tape_here, watcher_here
from aggregator.cassettes.patches import patched
from aggregator.cassettes.rules import IGNORED_HOSTS, is_ignored
from aggregator.cassettes.traffic import Answered, Noted, observing
from aggregator.errors import (
    AggregatorError,
    APIConnectionError,
    APITimeoutError,
    BudgetExceededError,
    ConfigError,
    LLMError,
    RateLimitError,
    ServerError,
)
from aggregator.llm.budget import NOTHING, Amount, Budget, assumed_output, budgets_of, pico, spent_by, upper_tokens
from aggregator.llm.ledger import Ledger, Price, Prices, current_ledger, find_price, kept_price, need_price
from aggregator.llm.models import as_error
from aggregator.llm.reading import Question, is_stream, read_answer, read_failure, read_question
from aggregator.records import HTTPReply, HTTPRequest, Role, Usage

_BYTES_A_TOKEN = 4  # of English text, by OpenAI's rule of thumb
_NOT_SENT = re.compile(
    r"Connect(?:Error|Timeout|TimeoutError)$|PoolTimeout$|New\w*ConnectionError$|NameResolution|ClientConnector"
    r"|gaierror|ConnectionRefused|EndpointConnection|ProxyError"
)
"""Types of failures before which no request was sent."""


class Observed:
    """The calls of other clients in one run. `prices` are USD of models that genai-prices does not list.

    `budget` counts them in addition to the budget of their context. `refusal` is the error of the first refused
    request; none is sent after it.
    """

    def __init__(
        self, clients: str | Iterable[str], prices: Prices | None = None, budget: Budget | None = None
    ) -> None:
        self.clients = families(clients)
        self.prices = prices
        self.budget = budget
        self.refusal: AggregatorError | None = None

    @contextmanager
    def watching(self) -> Iterator[Part]:
        """Observe the calls made inside, also in tasks and threads.

        Raises the run's refusal, even if code inside has hidden it; for an error caused by a lost call, that call's
        error.
        """
        part = Part(self)
        with patched() if self.clients else nullcontext(), observing(part, self.clients):
            try:
                yield part
            except Exception as error:
                cause = part.explain(error)
                if cause is error:
                    raise
                raise cause from error
            finally:
                part.close()
            part.check()

    def price(self, asked: Question) -> Price | None:
        """Return the price of a question's model, or None if it is unknown."""
        return find_price(asked.provider, asked.model, self.prices) or kept_price(asked.provider, asked.model)


Clients = str | Sequence[str] | None
"""Names as in `cassette(clients=)`, "all", or () for none; None for those of the open cassette."""


def observed(clients: Clients, prices: Prices | None = None) -> AbstractContextManager[Part | None]:
    """Observe these clients' calls inside, as one run; None changes nothing."""
    return nullcontext() if clients is None else Observed(clients, prices).watching()


def part_here() -> Part | None:
    """Return the observer of this context's calls, or None."""
    watcher = watcher_here()
    return watcher if isinstance(watcher, Part) else None


def apart() -> AbstractContextManager[Part | None]:
    """Observe the calls inside as a part with its own lost calls. None if this context is not observed.

    An open cassette that records other clients is enough: their calls are counted. So is a `transport()`.
    """
    if WATCH.get() is not None and (here := part_here()) is not None:
        return here.run.watching()
    tape = tape_here()
    clients = () if tape is None else tape.rules.clients
    return Observed(clients).watching() if clients or "aggregator.llm.bridge" in sys.modules else _UNWATCHED


_UNWATCHED: AbstractContextManager[None] = nullcontext()


class _Call(Struct, kw_only=True):
    """One pending request and the objects to update when it ends, which may be in another context."""

    request: HTTPRequest
    asked: Question
    role: Role
    ledger: Ledger | None
    budgets: tuple[Budget, ...]
    held: Amount
    shown: LLMCall | None

    @property
    def key(self) -> tuple[str, str, bytes]:
        """The fields that a retry shares with the failed request."""
        return self.request.method, self.request.url, self.request.body


class Losses(Struct, kw_only=True):
    """The lost calls of one part: requests without a successful retry, and the latest loss, if any."""

    lost: dict[tuple[str, str, bytes], LLMError] = {}
    retried: dict[tuple[str, str, bytes], LLMCall] = {}
    last: LLMError | None = None


class Part:
    """Observes other clients' calls in one part of a run: implements `cassettes.traffic.Exchanges`.

    With `shared`, losses and refusals count in that part too.
    """

    def __init__(self, run: Observed, *, shared: Part | None = None) -> None:
        self.run = run
        self._open: dict[int, _Call] = {}  # by the request's id, which the call keeps alive
        self.losses: Losses = Losses() if shared is None else shared.losses
        self._runs = (run,) if shared is None else (run, shared.run)

    # Called by the patches

    def before(self, request: HTTPRequest, /) -> None:
        """Reserve the maximum cost of a request; raises BudgetExceededError, or ConfigError for an unknown price."""
        asked = read_question(request)
        if asked.is_free or self._is_ignored(request.url):
            return
        for run in self._runs:
            if run.refusal is not None:
                raise run.refusal
        budgets = budgets_of(self.run.budget)
        held = self._reserve(asked, request, budgets) if budgets else NOTHING
        role = current_role()
        call = _Call(
            request=request,
            asked=asked,
            role=role,
            ledger=current_ledger(),
            budgets=budgets,
            held=held,
            shown=None,
        )
        transcript = current_transcript() if role == "agent" else None
        if transcript is not None:
            again = self.losses.retried.pop(call.key, None)
            call.shown = again or transcript.llm_call(asked.messages, title=_title(asked, request))
        self._open[id(request)] = call

    def after(self, exchange: Answered, /) -> Noted | None:
        """Count an answer, or note how it was lost."""
        call = self._open.pop(id(exchange.request), None)
        if call is None:
            return None
        reply = exchange.reply
        if reply is None:
            self._lose(call, *(exchange.failure or ("", "")))
            return None
        if reply.status >= 400:
            self._refuse(call, reply)
            return None
        if reply.status >= 300:  # a redirect: the next request is the one that counts
            _settle(call, NOTHING)
            return None
        answer = read_answer(call.asked, reply)
        usage = answer.usage
        if call.asked.api and usage.input_tokens is None and usage.output_tokens is None and is_stream(reply):
            usage = estimate_usage(call.asked, answer.text)
        if usage.cost is None and (price := self.run.price(call.asked)) is not None:
            usage = replace(usage, cost=price.cost(usage, answer.service_tier))
        _settle(call, spent_by(usage, call.held))
        if call.ledger is not None:
            call.ledger.add(call.role, usage, exchange.milliseconds)
        if call.shown is not None:
            call.shown.finish(answer)
        self.losses.lost.pop(call.key, None)
        self.losses.last = None
        return Noted(model=call.asked.model or answer.model, usage=usage) if call.asked.api else None

    def dropped(self, request: HTTPRequest, /, *, was_sent: bool) -> None:
        """Record a request without an answer: a miss, or a cancelled one."""
        call = self._open.pop(id(request), None)
        if call is None:
            return
        _settle(call, call.held if was_sent else NOTHING)
        if was_sent:
            error = APITimeoutError("Expected a whole answer, got a cancelled call")
            self.losses.lost[call.key] = error  # if the agent's own deadline ended it, a TimeoutError follows
            if call.shown is not None:
                call.shown.fail(error)

    # Called by the run

    def check(self) -> None:
        """Raise the run's refusal, if there was one."""
        if self.run.refusal is not None:
            raise self.run.refusal

    def explain(self, error: Exception) -> Exception:
        """Return the cause of an error that was raised in this part.

        That is the run's refusal; else the lost call, if nothing was answered since, or if the error or one of its
        causes is an SDK's for a lost call; else the error.
        """
        if isinstance(error, AggregatorError) and not isinstance(error, LLMError):
            return error
        if self.run.refusal is not None:
            return self.run.refusal
        if not self.losses.lost or isinstance(error, LLMError):
            return error
        if self.losses.last is not None:
            return self.losses.last
        for behind in _chain(error):
            if isinstance(behind, AggregatorError):
                return error
            if isinstance(behind, Exception) and as_error(behind) is not None:
                return next(reversed(self.losses.lost.values()))
        return error

    def close(self) -> None:
        """Settle requests that were not read to their end: they were sent, so they are charged as reserved."""
        for call in list(self._open.values()):
            self._open.pop(id(call.request), None)
            _settle(call, call.held)
            if call.ledger is not None:
                call.ledger.add(call.role, Usage())

    # Parts of the above

    def _is_ignored(self, url: str) -> bool:
        tape = tape_here()
        return is_ignored(url, IGNORED_HOSTS) or (tape is not None and tape.leaves_out(url))

    def _reserve(self, asked: Question, request: HTTPRequest, budgets: tuple[Budget, ...]) -> Amount:
        taken: list[Budget] = []
        amount = NOTHING
        try:
            amount = self._most(asked, request, budgets)
            for budget in budgets:
                budget.take_now(amount)
                taken.append(budget)
        except (BudgetExceededError, ConfigError) as refusal:
            for budget in taken:
                budget.settle(amount, NOTHING)
            for run in self._runs:
                run.refusal = run.refusal or refusal
            raise
        return amount

    def _most(self, asked: Question, request: HTTPRequest, budgets: tuple[Budget, ...]) -> Amount:
        """Return the maximum cost of a request: by its own token limit, else by the default one."""
        if not asked.api or not any(budget.needs_tokens for budget in budgets):
            return Amount(calls=1)
        limits = asked.limits
        if limits.tokens is None:
            limits = replace(limits, tokens=0 if asked.api == "embeddings" else assumed_output(asked.model))
        given, answered = upper_tokens(request.body, asked.messages, limits)
        if all(budget.usd is None for budget in budgets):
            return Amount(0, given + answered, 1)
        price = self.run.price(asked) or need_price(
            asked.provider, asked.model, self.run.prices, where="to the trainer, with clients="
        )
        return Amount(pico(price.most(given, answered)), given + answered, 1)

    def _lose(self, call: _Call, kind: str, message: str) -> None:
        cls = APITimeoutError if "timeout" in kind.lower() else APIConnectionError
        error = cls(f"{kind.rpartition('.')[2]}: {message}")
        _settle(call, NOTHING if _NOT_SENT.search(kind) else call.held)
        self._note_lost(call, error)

    def _refuse(self, call: _Call, reply: HTTPReply) -> None:
        error = read_failure(call.asked, reply)
        _settle(call, Amount(calls=1))
        if call.asked.api or isinstance(error, RateLimitError | ServerError):
            self._note_lost(call, error)
        elif call.shown is not None:  # an unknown API, and its server's answer: nothing is lost
            call.shown.fail(error)

    def _note_lost(self, call: _Call, error: LLMError) -> None:
        self.losses.lost[call.key] = self.losses.last = error
        if call.shown is not None:
            call.shown.fail(error)
            self.losses.retried[call.key] = call.shown


def _settle(call: _Call, spent: Amount) -> None:
    for budget in call.budgets:
        budget.settle(call.held, spent)


def estimate_usage(asked: Question, answer: str) -> Usage:
    """Return the tokens of a question and its answer by their length, marked as an estimate.

    >>> estimate_usage(Question(messages=({"role": "user", "content": "12345678"},)), "1234").total_tokens
    3
    """
    given = sum(len(str(message.get("content") or "").encode()) for message in asked.messages)
    answered = len(answer.encode())
    return Usage(
        input_tokens=ceil(given / _BYTES_A_TOKEN), output_tokens=ceil(answered / _BYTES_A_TOKEN), estimated_calls=1
    )


def _title(asked: Question, request: HTTPRequest) -> str:
    """Return a call's name in a transcript, without the query of its address, which may hold a key."""
    return "LLM call" if asked.api else f"{request.method} {request.url.partition('?')[0]}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, those of a group, and all their causes and contexts."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__cause__, one.__context__]
        waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
