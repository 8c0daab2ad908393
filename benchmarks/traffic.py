"""Chat traffic to record and replay: about 4.7 KB an exchange on disk, the same bytes in every process and run.

Standard library only: peers' interpreters load it too.
"""

from __future__ import annotations

import json
import random
from typing import Any

URL = "http://127.0.0.1:9/v1/chat/completions"  # nothing listens there: a miss of the cassette fails
MODEL = "benchmark"
WORDS = (  # noqa: SIM905 - words are read as words
    "agent batch claim delay error field guide hint index judge label model note order prompt query route score "
    "ticket update value weight answer below check detail every first given however input known later more next"
).split()


def text(seed: int, words: int) -> str:
    """Return so many words, about six bytes each."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def messages(i: int) -> list[dict[str, str]]:
    """Return what the i-th call asks: 1.7 KB, no two alike."""
    return [
        {"role": "system", "content": text(0, 60)},
        {"role": "user", "content": f"Ticket {i}: {text(2 * i + 1, 220)}"},
    ]


def body(i: int) -> bytes:
    """Return the i-th request's body as clients send it."""
    return json.dumps({"model": MODEL, "messages": messages(i)}, separators=(",", ":")).encode()


def answer(i: int) -> bytes:
    """Return the i-th answer's body: 2 KB."""
    reply: dict[str, Any] = {
        "id": f"chatcmpl-{i:08d}",
        "object": "chat.completion",
        "created": 1700000000 + i,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text(2 * i + 2, 330)},
            }
        ],
        "usage": {"prompt_tokens": 310, "completion_tokens": 360, "total_tokens": 670},
    }
    return json.dumps(reply).encode()


REPLY_HEADERS = {"content-type": "application/json", "x-request-id": "req_0123456789"}
REQUEST_HEADERS = {"content-type": "application/json"}
