"""What an agent's own clients ask, counted as our client's calls are: transcript, usage, budget, lost calls.

The patches of `cassettes/patches` show each request and its answer to a `Part`, with or without a cassette. A run
watches through one `Observed`; each rollout, each guide and each proposal through a part, which knows the calls that
were lost in it. What our own client asks passes unseen, since it counts itself.

A budget's refusal is raised inside an SDK, which may retry it or wrap it. So the run remembers it, and it is raised
again where the rollout ends.
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
"""Kinds of failures before which no request was sent."""


class Observed:
    """The calls of other clients in one run. `prices` are USD of models that genai-prices does not list.

    `budget` counts them in addition to the budget of their context. `refusal` is the error of the first request that
    was refused; none is sent after it.
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
        """Watch the calls made inside, in tasks and threads too.

        Raises what the run was refused, also if code inside has hidden it; for an error that comes down to a lost call,
        that call's error.
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
        """Return the price of a question's model; None if it is not known."""
        return find_price(asked.provider, asked.model, self.prices) or kept_price(asked.provider, asked.model)


Clients = str | Sequence[str] | None
"""Names as `cassette(clients=)` takes them, "all", () for none; None for those of the cassette that is open."""


def observed(clients: Clients, prices: Prices | None = None) -> AbstractContextManager[Part | None]:
    """Watch what these clients ask inside, as one run; None leaves it as it is."""
    return nullcontext() if clients is None else Observed(clients, prices).watching()


def part_here() -> Part | None:
    """Return what watches this context's calls; None if nothing does."""
    watcher = watcher_here()
    return watcher if isinstance(watcher, Part) else None


def apart() -> AbstractContextManager[Part | None]:
    """Watch what is asked inside as a part: its lost calls are no other's. None if nothing watches this context.

    An open cassette that serves other clients is enough: what it serves is counted. So is a `transport()`.
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
        """What a retry has in common with the request that failed."""
        return self.request.method, self.request.url, self.request.body


class Losses(Struct, kw_only=True):
    """The lost calls of one part: requests whose retries have not succeeded, and how the latest one was lost, if so."""

    lost: dict[tuple[str, str, bytes], LLMError] = {}
    retried: dict[tuple[str, str, bytes], LLMCall] = {}
    last: LLMError | None = None


class Part:
    """Sees the calls of other clients in one part of a run: implements `cassettes.traffic.Exchanges`.

    With `shared`, what is lost or refused is so in that part too.
    """

    def __init__(self, run: Observed, *, shared: Part | None = None) -> None:
        self.run = run
        self._open: dict[int, _Call] = {}  # by the request's id, which the call keeps alive
        self.losses: Losses = Losses() if shared is None else shared.losses
        self._runs = (run,) if shared is None else (run, shared.run)

    # What the patches call

    def before(self, request: HTTPRequest, /) -> None:
        """Reserve what a request may cost; raises BudgetExceededError, or ConfigError for an unknown price."""
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
        """Take note of a request that gets no answer: a miss, or one that was cancelled."""
        call = self._open.pop(id(request), None)
        if call is None:
            return
        _settle(call, call.held if was_sent else NOTHING)
        if was_sent:
            error = APITimeoutError("the call was cancelled before its answer was whole")
            self.losses.lost[call.key] = error  # if the agent's own deadline ended it, a TimeoutError follows
            if call.shown is not None:
                call.shown.fail(error)

    # What the run asks

    def check(self) -> None:
        """Raise what the run was refused, if it was."""
        if self.run.refusal is not None:
            raise self.run.refusal

    def explain(self, error: Exception) -> Exception:
        """Return what an error that was raised in this part comes down to.

        That is the run's refusal; else the lost call, if nothing was answered since, or if the error or one behind it
        is what an SDK raises for a lost call; else the error.
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
        """Settle what nobody has read to its end: it was sent, so it counts as it was reserved."""
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
        """Return the most that a request can cost: by its own limit on tokens, else by the usual one."""
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
        elif call.shown is not None:  # no known API, and its server's answer: nothing is lost
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
    """Return how a transcript names a call; the query of an address may hold a key."""
    return "LLM call" if asked.api else f"{request.method} {request.url.partition('?')[0]}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, those of a group, and all that it was raised from or while handling."""
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
