"""What tokens cost."""

from __future__ import annotations

import pytest

from aggregator import Price
from aggregator.errors import ConfigError
from aggregator.llm.ledger import find_price, kept_price, need_price
from aggregator.records import Usage


def test_cached_input_has_its_own_price() -> None:
    """`input_tokens` includes the cached ones, which cost what `cached` says, else like the others."""
    usage = Usage(input_tokens=1000, cached_tokens=400, output_tokens=100)
    assert Price(input=10, output=20, cached=1).cost(usage) == pytest.approx((600 * 10 + 400 * 1 + 100 * 20) / 1e6)
    assert Price(input=10, output=20).cost(usage) == pytest.approx((1000 * 10 + 100 * 20) / 1e6)


def test_unknown_tokens_have_no_cost() -> None:
    """None is not 0."""
    assert Price(input=1, output=1).cost(Usage(input_tokens=5)) is None


@pytest.mark.requirement("client 11: the user's prices")
@pytest.mark.parametrize("name", ["openai/gpt-4o-mini", "openai:gpt-4o-mini", "gpt-4o-mini"])
def test_every_spelling_of_a_name_is_found(name: str) -> None:
    """A table written with either convention works."""
    assert find_price("openai", "gpt-4o-mini", {name: Price(input=1, output=2)}) is not None


@pytest.mark.parametrize("price", [{"input": -1, "output": 1}, {"input": 1, "output": float("nan")}])
def test_impossible_prices_are_refused(price: dict[str, float]) -> None:
    """A negative or missing price is a slip, not a discount."""
    with pytest.raises(ConfigError, match=r"at Price\."):
        Price(**price)


def test_a_missing_price_names_the_nearest() -> None:
    """A misspelt name in the table is found out before spending."""
    with pytest.raises(ConfigError, match=r"nearest in the table: 'openai/gtp-zero'"):
        need_price("openai", "gpt-zero", {"openai/gtp-zero": Price(input=1, output=1)})


@pytest.mark.requirement("client 11: genai-prices")
def test_the_kept_table_knows_common_models() -> None:
    """genai-prices, where installed, prices what the user's table does not; the dearest tier counts."""
    pytest.importorskip("genai_prices")
    assert kept_price("openai", "gpt-4o-mini") == Price(input=0.15, output=0.6, cached=0.075)
    tiered = kept_price("gemini", "gemini-2.5-pro")
    assert tiered is not None
    assert tiered.input == 2.5
    assert kept_price("openai", "no-such-model") is None
    assert kept_price("gemini", "models/gemini-2.5-flash") == kept_price("vertex", "gemini-2.5-flash")


def test_openrouters_free_models_are_free() -> None:
    """What `:free` says is known without any table; other endings are other prices, and unknown."""
    assert kept_price("openrouter", "vendor/model:free") == Price(input=0, output=0)
    assert kept_price("ollama", "vendor/model:free") is None
