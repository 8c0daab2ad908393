"""The likely and the maximum cost of calls."""

from __future__ import annotations

from typing import Any

import pytest
from llm_fakes import BASE_URL, QUESTION, ScriptedTransport, answer

from aggregator import LLM, Price
from aggregator.errors import ConfigError
from aggregator.llm import estimate
from aggregator.llm.messages import Image

PRICES = {"m": Price(input=1.0, output=2.0)}


def client(**options: Any) -> LLM:
    return LLM("m", base_url=BASE_URL, transport=ScriptedTransport(answer()), **options)


@pytest.mark.requirement("built 6: estimate")
async def test_the_likely_cost_is_below_the_maximum() -> None:
    """The real usage is below the maximum; the likely figure is smaller still."""
    llm = client(prices=PRICES)
    found = estimate(llm, "word " * 400, calls=10, max_tokens=1000)
    assert found.calls == 10
    assert found.usd is not None
    assert found.most_usd is not None
    assert 0 < found.usd < found.most_usd
    assert 10 * 450 < found.input_tokens < 10 * 700  # about 400 words, one token each, and the JSON around them
    assert found.most_tokens >= 10 * (400 + 1000)


def test_estimates_add_up() -> None:
    """A run's estimate is the sum of its parts; one unknown price makes the sum unknown."""
    known = estimate(client(prices=PRICES), QUESTION, calls=2)
    assert (known + known).usd == pytest.approx(2 * (known.usd or 0))
    assert (known + estimate(client(), QUESTION)).usd is None


def test_the_maximum_counts_all_attempts() -> None:
    """Retries may be billed, too."""
    once, thrice = (estimate(client(prices=PRICES), QUESTION, max_attempts=n) for n in (1, 3))
    assert thrice.most_tokens == 3 * once.most_tokens
    assert thrice.usd == once.usd


def test_images_count_by_their_number() -> None:
    """Images do not count by the bytes of their base64."""
    message = {"role": "user", "content": ["look", Image(b"\x89PNG" + b"0" * 100_000)]}
    assert estimate(client(), [message]).input_tokens < 2_000


def test_invalid_numbers_are_refused() -> None:
    """A negative number of calls is invalid."""
    with pytest.raises(ConfigError, match="calls >= 0"):
        estimate(client(), QUESTION, calls=-1)
