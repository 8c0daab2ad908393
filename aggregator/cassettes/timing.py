"""Replay with time and faults: how long a recorded answer takes, and what goes wrong before it comes.

Both are pure functions of the tape: the same seed and cassette give the same delays and faults, whatever
the order in which calls finish.
"""

from __future__ import annotations

import math
from hashlib import sha256
from typing import Literal

from msgspec import Struct

from aggregator.errors import APIConnectionError, APITimeoutError, ConfigError
from aggregator.records import HTTPReply

Latency = Literal["off", "recorded"] | float
FaultKind = Literal["rate_limit", "server_error", "timeout", "cut", "malformed"]
KINDS: tuple[FaultKind, ...] = ("rate_limit", "server_error", "timeout", "cut", "malformed")
_JSON = {"content-type": "application/json"}


def latency_scale(latency: Latency | str) -> float:
    """Return by what a recorded time is multiplied.

    >>> latency_scale("off"), latency_scale("recorded"), latency_scale(0.01)
    (0.0, 1.0, 0.01)
    """
    if latency == "off":
        return 0.0
    if latency == "recorded":
        return 1.0
    if isinstance(latency, str) or not 0 <= latency < math.inf:  # a wrong word, or a wrong number
        raise ConfigError(f'Expected latency "off", "recorded" or a number >= 0 to scale by, got {latency!r}')
    return float(latency)


class Faults(Struct, frozen=True, kw_only=True):
    """How often a call meets which fault before its recorded answer, as probabilities of each attempt.

    A fault uses up no recorded answer: a client that tries again gets it. A `malformed` reply stands in the
    place of the answer, status 200. At most `most` faults meet one call, so that a patient client gets through.
    """

    rate_limit: float = 0.0
    server_error: float = 0.0
    timeout: float = 0.0
    cut: float = 0.0
    malformed: float = 0.0
    seed: int = 0
    most: int = 1
    retry_after: float = 1.0

    def __post_init__(self) -> None:
        """Check that the probabilities are ones."""
        rates = [getattr(self, kind) for kind in KINDS]
        if any(not 0 <= rate <= 1 for rate in rates) or sum(rates) > 1 + 1e-9:
            raise ConfigError(f"Expected fault rates in [0, 1] that sum to at most 1, got {rates!r}")

    def choose(self, key: bytes, lineage: str, ticket: int, attempt: int) -> FaultKind | None:
        """Return the fault of one attempt, None for none."""
        if attempt >= self.most:
            return None
        place = f"{self.seed}/{lineage}/{ticket}/{attempt}/".encode()
        draw = int.from_bytes(sha256(place + key).digest()[:8], "big") / 2**64
        for kind in KINDS:
            draw -= getattr(self, kind)
            if draw < 0:
                return kind
        return None

    def answer(self, kind: FaultKind) -> HTTPReply:
        """Return the reply of a fault, or raise what the transport would."""
        if kind == "timeout":
            raise APITimeoutError("injected fault: no answer within the deadline")
        if kind == "cut":
            raise APIConnectionError("injected fault: the connection was cut before the answer was whole")
        if kind == "rate_limit":
            body = b'{"error":{"message":"injected fault: rate limit","code":"rate_limit_exceeded"}}'
            headers = {**_JSON, "retry-after": f"{self.retry_after:g}"}
            return HTTPReply(status=429, reason="Too Many Requests", body=body, headers=headers, replayed=True)
        if kind == "server_error":
            body = b'{"error":{"message":"injected fault: internal error","type":"server_error"}}'
            return HTTPReply(status=500, reason="Internal Server Error", body=body, headers=_JSON, replayed=True)
        return HTTPReply(
            status=200, reason="OK", body=b'{"id": "injected fault", "choices": [', headers=_JSON, replayed=True
        )
