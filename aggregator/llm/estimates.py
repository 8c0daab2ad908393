"""What calls are likely to cost, and at most, before any is made."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from aggregator.errors import ConfigError
from aggregator.llm.budget import ASSUMED_OUTPUT, IMAGE_TOKENS, upper_tokens
from aggregator.llm.calls import ChatCall
from aggregator.llm.client import LLM
from aggregator.llm.fallback import FallbackLLM
from aggregator.llm.ledger import find_price, kept_price
from aggregator.llm.messages import normalise
from aggregator.records import Usage

_BYTES_A_TOKEN = 4  # of English text, by OpenAI's rule of thumb
_LIKELY_IMAGE = 1_000
_LIKELY_ANSWER = 400


class Estimate(Struct, frozen=True, kw_only=True):
    """Calls, tokens and USD: what is likely, and the most that can come of it. USD are None where a price is unknown.

    Estimates of the parts of a run add up.
    """

    calls: int
    input_tokens: int
    output_tokens: int
    usd: float | None
    most_tokens: int
    most_usd: float | None

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            calls=self.calls + other.calls,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            usd=None if self.usd is None or other.usd is None else self.usd + other.usd,
            most_tokens=self.most_tokens + other.most_tokens,
            most_usd=None if self.most_usd is None or other.most_usd is None else self.most_usd + other.most_usd,
        )


def estimate(
    llm: LLM,
    messages: Any,
    *,
    calls: int = 1,
    max_tokens: int | None = None,
    answer_tokens: int | None = None,
    max_attempts: int = 1,
) -> Estimate:
    """Estimate `calls` calls like this one; nothing is sent.

    `answer_tokens` is the usual length of an answer (default: 400, or `max_tokens` if that is less). The most counts
    `max_tokens` (4,096 if not given) for every answer and `max_attempts` requests a call. Of several models the first
    is the likely one, and all may be asked.
    """
    if calls < 0 or max_attempts < 1:
        raise ConfigError(f"Expected calls >= 0 and max_attempts >= 1, got {calls!r} and {max_attempts!r}")
    if isinstance(llm, FallbackLLM):
        each = [
            estimate(
                model,
                messages,
                calls=calls,
                max_tokens=max_tokens,
                answer_tokens=answer_tokens,
                max_attempts=max_attempts,
            )
            for model in llm.models
        ]
        most = [one.most_usd for one in each]
        return replace(
            each[0],
            most_tokens=sum(one.most_tokens for one in each),
            most_usd=None if None in most else sum(usd for usd in most if usd is not None),
        )
    endpoint = llm.endpoint
    call = ChatCall(model=endpoint.model, messages=normalise(messages), max_tokens=max_tokens)
    most_given, most_answered = upper_tokens(
        endpoint.codec.encode(call).body, call.messages, endpoint.codec.limits(call)
    )
    images = most_given // IMAGE_TOKENS
    given = (most_given - images * IMAGE_TOKENS) // _BYTES_A_TOKEN + images * _LIKELY_IMAGE
    answered = min(answer_tokens or _LIKELY_ANSWER, max_tokens or ASSUMED_OUTPUT)
    price = find_price(endpoint.provider, endpoint.model, llm.prices) or kept_price(endpoint.provider, endpoint.model)
    requests = calls * max_attempts
    return Estimate(
        calls=calls,
        input_tokens=given * calls,
        output_tokens=answered * calls,
        usd=None if price is None else (price.cost(Usage(input_tokens=given, output_tokens=answered)) or 0.0) * calls,
        most_tokens=(most_given + most_answered) * requests,
        most_usd=None if price is None else price.most(most_given, most_answered) * requests,
    )
