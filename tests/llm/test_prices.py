"""What tokens cost."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from llm_fakes import BASE_URL, QUESTION, ScriptedTransport, answer

from aggregator import LLM, Budget, Price
from aggregator.errors import ConfigError
from aggregator.llm.calls import ChatCall
from aggregator.llm.ledger import Tier, believed, find_price, kept_price, need_price
from aggregator.llm.messages import normalise
from aggregator.llm.names import resolve
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, Usage


def test_cached_input_has_its_own_price() -> None:
    """`input_tokens` includes cached tokens, which cost `cached`, or the input price by default."""
    usage = Usage(input_tokens=1000, cached_tokens=400, output_tokens=100)
    assert Price(input=10, output=20, cached=1).cost(usage) == pytest.approx((600 * 10 + 400 * 1 + 100 * 20) / 1e6)
    assert Price(input=10, output=20).cost(usage) == pytest.approx((1000 * 10 + 100 * 20) / 1e6)


def test_unknown_tokens_have_no_cost() -> None:
    """Missing usage is not 0."""
    assert Price(input=1, output=1).cost(Usage(input_tokens=5)) is None


@pytest.mark.requirement("client 11: the user's prices")
@pytest.mark.parametrize("name", ["openai/gpt-4o-mini", "openai:gpt-4o-mini", "gpt-4o-mini"])
def test_every_spelling_of_a_name_is_found(name: str) -> None:
    """A table in either naming convention works."""
    assert find_price("openai", "gpt-4o-mini", {name: Price(input=1, output=2)}) is not None


@pytest.mark.parametrize(
    "price",
    [
        {"input": -1, "output": 1},
        {"input": 1, "output": float("nan")},
        {"input": 1, "output": 1, "tiers": (Tier(above=5, input=-1, output=1),)},
        {"input": 1, "output": 1, "service": {"flex": -0.5}},
    ],
)
def test_invalid_prices_are_refused(price: dict[str, Any]) -> None:
    """A negative or missing price is an error."""
    with pytest.raises(ConfigError, match=r"at Price\."):
        Price(**price)


def test_a_missing_price_names_the_nearest() -> None:
    """A misspelt name in the table is reported before anything is spent."""
    with pytest.raises(ConfigError, match=r"nearest in the table: 'openai/gtp-zero'"):
        need_price("openai", "gpt-zero", {"openai/gtp-zero": Price(input=1, output=1)})


@pytest.mark.requirement("client 11: genai-prices")
def test_the_kept_table_knows_common_models() -> None:
    """genai-prices, if installed, prices what the user's table lacks, including tiers."""
    pytest.importorskip("genai_prices")
    small = kept_price("openai", "gpt-4o-mini")
    assert small is not None
    assert (small.input, small.output, small.cached, small.tiers) == (0.15, 0.6, 0.075, ())
    tiered = kept_price("gemini", "gemini-2.5-pro")
    assert tiered is not None
    assert (tiered.input, tiered.tiers[0].above, tiered.tiers[0].input) == (1.25, 200_000, 2.5)
    assert kept_price("openai", "no-such-model") is None
    assert kept_price("gemini", "models/gemini-2.5-flash") == kept_price("vertex", "gemini-2.5-flash")


def test_openrouters_free_models_are_free() -> None:
    """`:free` is free without a table; any other suffix has its own, unknown price."""
    assert kept_price("openrouter", "vendor/model:free") == Price(input=0, output=0)
    assert kept_price("ollama", "vendor/model:free") is None


LONG = Price(
    input=3,
    output=15,
    cached=0.3,
    tiers=(Tier(above=200_000, input=6, output=22.5, cached=0.6), Tier(above=500_000, input=9, output=30)),
    service={"flex": 0.5, "priority": 2},
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1_000, (1_000 * 3 + 1_000 * 15) / 1e6),
        (200_000, (200_000 * 3 + 1_000 * 15) / 1e6),
        (200_001, (200_001 * 6 + 1_000 * 22.5) / 1e6),
        (600_000, (600_000 * 9 + 1_000 * 30) / 1e6),
    ],
)
def test_the_highest_tier_was_billed(given: int, expected: float) -> None:
    """The prompt's length decides the tier for all its tokens; the highest possible tier is reserved."""
    assert LONG.cost(Usage(input_tokens=given, output_tokens=1_000)) == pytest.approx(expected)
    assert LONG.most(given, 1_000, service_tier="default") >= expected
    assert LONG.most(100_000, 0, service_tier="default") == pytest.approx(0.3)
    assert LONG.most(1_000_000, 0, service_tier="default") == pytest.approx(9.0)


def test_service_tiers_by_their_factor() -> None:
    """The service tier of the answer decides; if the request leaves it open, the highest factor is reserved."""
    usage = Usage(input_tokens=1_000, output_tokens=1_000)
    usual = LONG.cost(usage)
    assert usual is not None
    assert [LONG.cost(usage, tier) for tier in ("default", "flex", "priority", None)] == pytest.approx(
        [usual, usual / 2, usual * 2, usual]
    )
    asked = (None, "auto", "default", "flex", "priority")
    assert [LONG.most(1_000, 1_000, service_tier=tier) for tier in asked] == pytest.approx(
        [usual * 2, usual * 2, usual, usual, usual * 2]
    )


def test_cache_writes_cost_as_much_as_other_input() -> None:
    """By default a write for five minutes costs 1.25 times the input price, for an hour twice."""
    usage = Usage(
        input_tokens=1_000_000,
        output_tokens=0,
        cached_tokens=100_000,
        cache_write_tokens=500_000,
        cache_write_1h_tokens=200_000,
    )
    rest = 400_000 * 3 + 100_000 * 0.3
    assert LONG.cost(usage) is not None
    price = Price(input=3, output=15, cached=0.3)
    assert price.cost(usage) == pytest.approx((rest + 300_000 * 3.75 + 200_000 * 6) / 1e6)
    own = Price(input=3, output=15, cached=0.3, cache_write=4, cache_write_1h=7)
    assert own.cost(usage) == pytest.approx((rest + 300_000 * 4 + 200_000 * 7) / 1e6)
    assert price.most(1_000_000, 0, writes=2.0) == pytest.approx(6.0)


def test_the_kept_tables_cache_writes_and_service_tiers() -> None:
    """genai-prices' figures for a model are used."""
    pytest.importorskip("genai_prices")
    claude = kept_price("anthropic", "claude-sonnet-4-5")
    assert claude is not None
    assert (claude.cache_write, claude.cache_write_1h) == (3.75, 6.0)
    assert claude.cost(Usage(input_tokens=1_000, output_tokens=1_000)) == pytest.approx(0.018)


@pytest.mark.parametrize(
    "usage",
    [
        Usage(input_tokens=-5, output_tokens=5, cost=0.1),
        Usage(input_tokens=5, output_tokens=10**12, cost=0.1),
        Usage(input_tokens=0, output_tokens=0),
        Usage(input_tokens=5, output_tokens=5, cost=-1.0),
        Usage(input_tokens=5, output_tokens=5, cost=float("nan")),
        Usage(input_tokens=5, output_tokens=5, cost=1e9),
    ],
)
def test_impossible_figures_were_believed(usage: Usage) -> None:
    """Negative, absurd and missing figures are unknown; the others are kept."""
    choices = (Choice(message=Message(content="x")),)
    found = believed(Completion(choices=choices, usage=usage))
    assert None in (found.input_tokens, found.output_tokens, found.cost if usage.cost is not None else None)
    good = Usage(input_tokens=5, output_tokens=0, cost=0.0)
    assert believed(Completion(choices=choices, usage=good)) is good


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (Usage(input_tokens=10, output_tokens=5, cached_tokens=50), Usage(input_tokens=10, output_tokens=5)),
        (Usage(input_tokens=10, output_tokens=5, cached_tokens=-50), Usage(input_tokens=10, output_tokens=5)),
        (Usage(input_tokens=10, output_tokens=5, cache_write_tokens=11), Usage(input_tokens=10, output_tokens=5)),
        (Usage(input_tokens=10, output_tokens=5, cache_write_1h_tokens=-1), Usage(input_tokens=10, output_tokens=5)),
        (Usage(input_tokens=10, output_tokens=5, reasoning_tokens=-1), Usage(input_tokens=10, output_tokens=5)),
        (Usage(input_tokens=0, output_tokens=0, cost=0.0), Usage()),
        (
            Usage(input_tokens=10, output_tokens=5, reasoning_tokens=94),
            Usage(input_tokens=10, output_tokens=99, reasoning_tokens=94),
        ),
    ],
)
def test_parts_larger_than_the_whole_were_believed(usage: Usage, expected: Usage) -> None:
    """Cached tokens are part of the input; reasoning beyond the output was added to it."""
    assert believed(Completion(choices=(Choice(message=Message(content="x")),), usage=usage)) == expected


NEGATIVE = {
    "anthropic/c": {"input_tokens": 1000, "cache_creation_input_tokens": -900, "output_tokens": 100},
    "bedrock/c": {"inputTokens": 1000, "cacheReadInputTokens": -900, "outputTokens": 100},
    "gemini/c": {"promptTokenCount": 1000, "toolUsePromptTokenCount": -900, "candidatesTokenCount": 100},
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_a_negative_part_made_a_call_cheaper(name: str) -> None:
    """A negative count of cached or tool tokens does not reduce the input."""
    codec = resolve(name, api_key="k", env={"AWS_REGION": "eu-central-1"}).codec
    body = {
        "anthropic/c": {"content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn", "usage": NEGATIVE[name]},
        "bedrock/c": {
            "output": {"message": {"role": "assistant", "content": [{"text": "x"}]}},
            "stopReason": "end_turn",
            "usage": NEGATIVE[name],
        },
        "gemini/c": {
            "candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": "STOP"}],
            "usageMetadata": NEGATIVE[name],
        },
    }[name]
    reply = HTTPReply(status=200, body=msgspec.json.encode(body), headers={})
    usage = believed(codec.decode(reply, ChatCall(model="c", messages=())))
    assert (usage.input_tokens, usage.output_tokens) == (1000, 100)


@pytest.mark.parametrize("cost", [True, "nan", {"total_cost": False}])
async def test_a_cost_that_is_not_a_number_was_billed(cost: object) -> None:
    """`true` is not one dollar."""
    transport = ScriptedTransport(answer(usage={"prompt_tokens": 10, "completion_tokens": 5, "cost": cost}))
    llm = LLM("m", base_url=BASE_URL, transport=transport, prices={"m": Price(input=1, output=10)})
    assert (await llm.complete(QUESTION)).usage.cost == pytest.approx(6e-5)


def test_the_total_of_the_responses_api_was_not_read() -> None:
    """Tokens that only the total contains are output."""
    body = {
        "status": "completed",
        "output": [{"type": "message", "content": [{"type": "output_text", "text": "x"}]}],
        "usage": {"input_tokens": 32, "output_tokens": 9, "total_tokens": 135},
    }
    codec = resolve("xai/grok-4", api_key="k", env={}, api="responses").codec
    reply = HTTPReply(status=200, body=msgspec.json.encode(body), headers={})
    assert codec.decode(reply, ChatCall(model="grok-4", messages=())).usage.output_tokens == 103


async def test_a_negative_cost_returned_money() -> None:
    """An impossible figure is charged as reserved."""
    for usage in (
        {"prompt_tokens": 5, "completion_tokens": 5, "cost": -5.0},
        {"prompt_tokens": 0, "completion_tokens": 0},
    ):
        transport, budget = ScriptedTransport(answer(usage=usage)), Budget(usd=1)
        llm = LLM("m", base_url=BASE_URL, transport=transport, budget=budget, prices={"m": Price(input=10, output=10)})
        await llm.complete(QUESTION, max_tokens=100)
        assert budget.spent.usd > 0


@pytest.mark.parametrize(
    ("marked", "writes"), [({}, 1.0), ({"cache_control": {"type": "ephemeral"}}, 1.25),
                           ({"cache_control": {"type": "ephemeral", "ttl": "1h"}}, 2.0)],
)  # fmt: skip
async def test_a_budget_did_not_reserve_for_cache_writes(marked: dict[str, object], writes: float) -> None:
    """A request that marks a prefix for the cache reserves the price of writing it."""
    body = {"content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn",
            "usage": {"input_tokens": 10, "cache_creation_input_tokens": 1000, "output_tokens": 5,
                      "cache_creation": {"ephemeral_1h_input_tokens": 1000 if writes == 2.0 else 0}}}  # fmt: skip
    reply = HTTPReply(status=200, body=msgspec.json.encode(body), headers={})
    reserved: list[float] = []

    def respond(request: HTTPRequest) -> HTTPReply:
        reserved.append(budget.reserved.usd)
        return reply

    budget = Budget(usd=100)
    price = Price(input=3, output=0)
    llm = LLM(
        "anthropic/c", api_key="k", env={}, transport=ScriptedTransport(respond), budget=budget, prices={"c": price}
    )
    question = [{"role": "user", "content": [{"type": "text", "text": "q" * 2000, **marked}]}]
    usage = (await llm.complete(question, max_tokens=10)).usage
    assert usage.cost == pytest.approx((10 * 3 + 1000 * 3 * (2.0 if writes == 2.0 else 1.25)) / 1e6)
    length = len(llm.endpoint.codec.encode(ChatCall(model="c", messages=normalise(question), max_tokens=10)).body)
    assert reserved == [pytest.approx(length * 3 * writes / 1e6)]
