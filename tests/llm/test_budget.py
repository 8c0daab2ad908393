"""A budget is never exceeded, whatever answers cost and however calls end."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from llm_fakes import BASE_URL, QUESTION, ScriptedTransport, VirtualLoop, VirtualTime, answer, failure

from aggregator import LLM, Budget, Price
from aggregator.errors import APIConnectionError, APITimeoutError, BudgetExceededError, ConfigError, ServerError
from aggregator.llm.budget import ASSUMED_OUTPUT, IMAGE_TOKENS, NOTHING, Amount, pico, spending, upper_tokens
from aggregator.llm.calls import ChatCall, Limits
from aggregator.llm.names import resolve
from aggregator.llm.retry import NOT_SENT
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest

PRICE = Price(input=1.0, output=10.0)


def client(transport: Any, budget: Budget | None, **options: Any) -> LLM:
    time = VirtualTime()
    return LLM(
        "gpt-4o-mini",
        base_url=BASE_URL,
        transport=transport,
        budget=budget,
        clock=time.clock,
        sleep=time.sleep,
        **{"prices": {"gpt-4o-mini": PRICE}, **options},
    )


class RandomCosts(Transport):
    """Answers after a random time with a random allowed usage, and adds up the real cost."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.usd = 0.0
        self.tokens = 0
        self.calls = 0

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        self.calls += 1
        given = self.random.randint(1, 20)
        answered = self.random.randint(0, 50)
        await asyncio.sleep(self.random.random())
        if self.random.random() < 0.1:
            return failure(500)
        self.tokens += given + answered
        self.usd += PRICE.most(given, answered)
        return answer(usage={"prompt_tokens": given, "completion_tokens": answered})


async def run_dry(seed: int, limits: dict[str, Any]) -> tuple[RandomCosts, Budget, int]:
    """Ask from 64 tasks until the budget refuses a call."""
    server, budget, refused = RandomCosts(seed), Budget(**limits), 0
    llm = client(server, budget)

    async def worker() -> None:
        nonlocal refused
        try:
            while True:
                try:
                    await llm.complete(QUESTION, max_tokens=50)
                except ServerError:
                    continue
        except BudgetExceededError:
            refused += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(64):
            tasks.create_task(worker())
    return server, budget, refused


def sweep(seeds: range) -> None:
    loop = VirtualLoop()
    for seed in seeds:
        rng = random.Random(seed)
        limits: dict[str, Any] = rng.choice(
            [{"usd": rng.uniform(0, 0.02)}, {"tokens": rng.randint(0, 3000)}, {"calls": rng.randint(0, 90)}]
        )
        server, budget, refused = loop.run_until_complete(run_dry(seed, limits))
        assert refused == 64
        assert server.usd <= limits.get("usd", float("inf"))
        assert server.tokens <= limits.get("tokens", float("inf"))
        assert server.calls <= limits.get("calls", float("inf"))
        assert budget.reserved == type(budget.reserved)()
        assert (budget.spent.tokens, budget.spent.calls) == (server.tokens, server.calls)
        assert budget.spent.usd == pytest.approx(server.usd)
    loop.close()


@pytest.mark.requirement(
    "built 6: reserved from the first wave on",
    "figure: budget overshoot in 1,000 runs at 64 in flight: 0",
)
def test_no_overshoot_with_64_in_flight() -> None:
    """Real spending stays within the limit, and the budget's count equals the server's."""
    sweep(range(40))


@pytest.mark.requirement("figure: budget overshoot in 1,000 runs at 64 in flight: 0")
@pytest.mark.long
def test_no_overshoot_in_a_thousand_runs() -> None:
    """A thousand random runs stay within the limit."""
    sweep(range(40, 1040))


async def test_a_budget_is_used_up_not_only_reserved() -> None:
    """A call that does not fit waits for those in flight, because they cost less than they reserved."""
    budget = Budget(tokens=1000)
    llm = client(ScriptedTransport(answer(), latency=lambda: asyncio.sleep(0)), budget)
    answered = 0

    async def ask() -> None:
        nonlocal answered
        await llm.complete(QUESTION, max_tokens=300)
        answered += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(30):
            tasks.create_task(ask())
    assert (answered, budget.spent.tokens) == (30, 450)


async def test_which_calls_are_refused_does_not_depend_on_the_order_of_answers() -> None:
    """The same calls fit in any order of answers, so a replay takes the same course."""

    async def course(delays: list[float]) -> list[bool]:
        budget = Budget(calls=3)
        left = iter(delays)
        llm = client(ScriptedTransport(answer(), latency=lambda: asyncio.sleep(next(left))), budget)
        outcome = [False] * len(delays)

        async def ask(number: int) -> None:
            try:
                await llm.complete(QUESTION)
                outcome[number] = True
            except BudgetExceededError:
                pass

        async with asyncio.TaskGroup() as tasks:
            for number in range(len(delays)):
                tasks.create_task(ask(number))
        return outcome

    expected = [True, True, True, False, False]
    assert await course([0.003, 0.002, 0.001, 0, 0]) == await course([0.0, 0.001, 0.002, 0, 0]) == expected


@pytest.mark.requirement("built 6: calls are attempts")
async def test_calls_count_every_attempt() -> None:
    """Each retry counts as a request."""
    budget = Budget(calls=10)
    await client(ScriptedTransport(failure(500), failure(500), answer()), budget).complete(QUESTION)
    assert budget.spent.calls == 3


@pytest.mark.parametrize("limits", [{"usd": 1.0}, {"tokens": 100_000}, {"calls": 5}])
async def test_no_answer_may_cost_more_than_was_reserved(limits: dict[str, Any]) -> None:
    """A call without a limit is sent the limit that its reservation assumed; a budget of calls needs none."""
    transport = ScriptedTransport(answer(), answer(), answer())
    prices = {"gpt-4o-mini": PRICE}
    llm = LLM("openai/gpt-4o-mini", api_key="k", env={}, transport=transport, budget=Budget(**limits), prices=prices)
    await llm.complete(QUESTION)
    await llm.complete(QUESTION, max_tokens=7)
    await llm.complete(QUESTION, extra={"max_completion_tokens": 9})
    sent = [(body.get("max_tokens"), body.get("max_completion_tokens")) for body in transport.bodies()]
    assert sent == [(None if "calls" in limits else ASSUMED_OUTPUT, None), (7, None), (None, 9)]


@pytest.mark.parametrize(
    ("options", "answered"),
    [
        ({"extra": {"max_completion_tokens": 9}}, 9),
        ({"extra": {"max_tokens": 9000}, "max_tokens": 10}, 9000),
        ({"extra": {"n": 5}, "max_tokens": 10}, 50),
        ({"extra": {"n": 5}, "max_tokens": 10, "n": 2}, 50),
        ({"extra": {"generationConfig": {"maxOutputTokens": 9000, "candidateCount": 2}}}, 18000),
        ({"extra": {"max_tokens": None}}, ASSUMED_OUTPUT),
        ({"extra": {"user": "me"}, "max_tokens": 10}, 10),
    ],
)
def test_a_limit_under_the_providers_own_name_counts(options: dict[str, Any], answered: int) -> None:
    """Limits in `extra` bound the answer as `max_tokens` and `n` do, and override them."""
    name = "gemini/m" if "generationConfig" in options["extra"] else "openai/m"
    codec = resolve(name, env={}).codec
    assert upper_tokens(b"", (), codec.limits(ChatCall(model="m", messages=(), **options))) == (0, answered)


@pytest.mark.parametrize("limit", [-1, None])
async def test_a_negative_limit_was_reserved_as_if_it_gave_tokens_back(limit: int | None) -> None:
    """Local servers read -1 as "no limit", so under a budget the assumed limit is sent instead."""
    transport, budget = ScriptedTransport(answer()), Budget(tokens=100_000)
    await client(transport, budget).complete(QUESTION, max_tokens=limit)
    assert [body["max_tokens"] for body in transport.bodies()] == [ASSUMED_OUTPUT]


async def test_an_exhausted_budget_names_the_remedy() -> None:
    """The error states the limit, what was spent, what the request may cost, and the remedy; nothing was sent."""
    transport = ScriptedTransport(answer())
    with pytest.raises(BudgetExceededError, match=r"budget of 100 tokens, got one .* with 0 spent.*lower max_tokens"):
        await client(transport, Budget(tokens=100)).complete(QUESTION, max_tokens=5000)
    assert transport.requests == []


@pytest.mark.requirement("built 6: an unknown price is an error before spending")
async def test_an_unknown_price_is_an_error_before_spending() -> None:
    """A budget in USD rejects a model without a price; the model does not count as free."""
    transport = ScriptedTransport(answer())
    with pytest.raises(ConfigError, match=r"Price\(input="):
        await client(transport, Budget(usd=1.0), prices={"gpt-4o": PRICE}).complete(QUESTION)
    assert transport.requests == []


@pytest.mark.requirement("client 11: the provider's cost")
async def test_the_providers_own_cost_is_used() -> None:
    """The cost stated in the reply is charged and reported."""
    budget = Budget(usd=1.0)
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "cost": 0.0125}
    completion = await client(ScriptedTransport(answer(usage=usage)), budget).complete(QUESTION)
    assert (completion.usage.cost, budget.spent.usd) == (0.0125, 0.0125)


@pytest.mark.requirement("client 11: the user's prices")
async def test_cost_from_the_table() -> None:
    """If the provider states no cost, it is computed from the price table, with or without a budget."""
    completion = await client(ScriptedTransport(answer()), None).complete(QUESTION)
    assert completion.usage.cost == pytest.approx((10 * 1.0 + 5 * 10.0) / 1e6)


UNANSWERED = [
    (APITimeoutError("no answer in time"), True),
    (APIConnectionError("cut"), True),
    (APIConnectionError(f"{NOT_SENT}refused"), False),
]


@pytest.mark.parametrize(("error", "charged"), UNANSWERED)
async def test_an_attempt_without_answer_is_charged_as_reserved(error: Any, charged: bool) -> None:
    """The provider may bill a request that failed, so it is charged in full; a request that was never sent is free."""
    budget = Budget(tokens=100_000)
    with pytest.raises(type(error)):
        await client(ScriptedTransport(error), budget, max_attempts=1).complete(QUESTION, max_tokens=50)
    assert (budget.spent.tokens > 50) is charged
    assert budget.reserved.tokens == 0


@pytest.mark.requirement("client 11: unknown usage costs what was reserved")
async def test_an_unknown_usage_is_charged_as_reserved() -> None:
    """A missing usage is not 0."""
    budget = Budget(tokens=100_000)
    await client(ScriptedTransport(answer(usage={})), budget).complete(QUESTION, max_tokens=50)
    assert budget.spent.tokens > 50


async def test_cancelled_calls_leave_nothing_reserved() -> None:
    """A cancelled call returns its reservation, whether it waits for the budget or is in flight."""
    budget = Budget(calls=1)
    forever = asyncio.Event()

    async def hang() -> None:
        await forever.wait()

    llm = client(ScriptedTransport(answer(), latency=hang), budget)
    async with asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(llm.complete(QUESTION)) for _ in range(5)]
        for _ in range(5):
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
    assert budget.reserved.calls == 0
    assert budget.spent.calls == 1


@pytest.mark.requirement("built 6: shared")
async def test_a_budget_of_the_context_counts_every_client() -> None:
    """`spending(budget)` counts the calls of every role of a run, in addition to a client's own budget."""
    own, run = Budget(calls=10), Budget(calls=2)
    first, second = client(ScriptedTransport(answer()), own), client(ScriptedTransport(answer()), None)
    with spending(run):
        await first.complete(QUESTION)
        await second.complete(QUESTION)
        with pytest.raises(BudgetExceededError):
            await first.complete(QUESTION)
    assert (own.spent.calls, run.spent.calls, own.reserved.calls) == (1, 2, 0)


async def test_one_budget_given_twice_counts_each_call_once() -> None:
    """A budget that is both the client's and the context's is charged once."""
    budget = Budget(calls=5)
    with spending(budget):
        await client(ScriptedTransport(answer()), budget).complete(QUESTION)
    assert budget.spent.calls == 1


@pytest.mark.requirement("built 6: shared")
async def test_threads_and_loops_share_a_budget() -> None:
    """A call that waits in another event loop is woken there."""
    budget = Budget(calls=100)
    amount = Amount(calls=60)
    await budget.reserve(amount)
    loop = asyncio.get_running_loop()

    def other_loop() -> int:
        with asyncio.Runner() as runner:
            runner.run(budget.reserve(amount))
        return budget.reserved.calls

    woken = loop.run_in_executor(None, other_loop)
    while not budget._waiting:  # noqa: ASYNC110 - of another thread
        await asyncio.sleep(0.001)
    budget.settle(amount, Amount(calls=1))
    assert await woken == 60


async def test_a_wait_for_the_budget_ends_with_the_deadline() -> None:
    """A call waits for the budget no longer than its timeout."""
    budget = Budget(calls=1)
    await budget.reserve(Amount(calls=1))
    with pytest.raises(APITimeoutError, match="room in the budget"):
        await budget.reserve(Amount(calls=1), 0.01)
    budget.settle(Amount(calls=1), NOTHING)
    await budget.reserve(Amount(calls=1))


def test_the_estimate_is_an_upper_bound() -> None:
    """Bytes bound the tokens of text; images are counted separately; each choice may reach the limit."""
    assert upper_tokens(b"x" * 100, [{"role": "user", "content": "hi"}], Limits(7, 3)) == (100, 21)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1000}}
    assert upper_tokens(b"x" * 1100, [{"role": "user", "content": [image]}], Limits(7))[0] == 1100 - 1022 + IMAGE_TOKENS


@pytest.mark.parametrize("limits", [{"usd": -1}, {"tokens": float("nan")}, {"calls": float("inf")}])
def test_invalid_limits_are_refused(limits: dict[str, Any]) -> None:
    """A limit is a number >= 0."""
    with pytest.raises(ConfigError, match=rf"Budget\.{next(iter(limits))}"):
        Budget(**limits)


def test_money_is_counted_in_whole_numbers() -> None:
    """Ten times ten cents is exactly one dollar."""
    assert sum(pico(0.1) for _ in range(10)) == pico(1.0)
