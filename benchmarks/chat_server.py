"""A fast loopback server of chat completions: `python -m benchmarks.chat_server [--delay S] [--rate R --burst B]`.

A bare asyncio protocol, so that a client's own cost is what is seen. With `--rate` it is a token bucket that answers
429 with `retry-after: 1` and no rate-limit headers. `--refuse`, `--fail`, `--cut`, `--page` and `--stall` are the parts
of all requests that get, at random, a 429 without any header, a 500, a broken connection, a page of HTML under a 200
and no answer at all. GET returns how many requests came. Prints its base URL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from random import Random
from typing import ClassVar

TEXT = "The ticket names an invoice, so it belongs to billing. " * 24
ANSWER = json.dumps(
    {
        "id": "chatcmpl-benchmark",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "benchmark",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "logprobs": None,
                "message": {"role": "assistant", "content": TEXT, "refusal": None, "annotations": []},
            }
        ],
        "usage": {
            "prompt_tokens": 350,
            "completion_tokens": 300,
            "total_tokens": 650,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        },
        "service_tier": "default",
        "system_fingerprint": "fp_benchmark",
    }
).encode()
REFUSAL = json.dumps({"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}})


def packet(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "x-request-id: req_1", "", ""]).encode() + body


OK = packet("200 OK", ANSWER)
FAULTS = {
    "refuse": packet("429 Too Many Requests", REFUSAL.encode()),
    "fail": packet("500 Internal Server Error", b'{"error": {"message": "oops"}}'),
    "page": packet("200 OK", b"<html><title>Bad gateway</title></html>"),
    "cut": b"the connection ends",
    "stall": b"no answer",
}
LIMITED = packet("429 Too Many Requests", REFUSAL.encode(), "retry-after: 1")


class Bucket:
    """`burst` requests at once, then `rate` a second; rate 0 lets everything through."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst, self.level, self.at = rate, burst, burst, time.monotonic()

    def lets_in(self) -> bool:
        if not self.rate:
            return True
        now = time.monotonic()
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level < 1:
            return False
        self.level -= 1
        return True


class Chat(asyncio.Protocol):
    """One connection: requests in, the fixed answer out."""

    counts: ClassVar = {"requests": 0, "refused": 0, "closed_waiting": 0}
    delay = 0.0
    bucket = Bucket(0, 0)
    faults: ClassVar[dict[str, float]] = {}
    random = Random(3)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer = b""
        self.waiting: set[asyncio.TimerHandle] = set()

    def connection_lost(self, error: Exception | None) -> None:
        self.counts["closed_waiting"] += len(self.waiting)
        for handle in self.waiting:
            handle.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            start = head.find(b"content-length:")
            length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            self.answer(head.startswith(b"get"))

    def answer(self, wants_counts: bool) -> None:
        if wants_counts:
            self.write(packet("200 OK", json.dumps(self.counts).encode()))
            return
        self.counts["requests"] += 1
        reply = self.fault() or (OK if self.bucket.lets_in() else LIMITED)
        self.counts["refused"] += reply is LIMITED
        if reply is FAULTS["stall"]:
            return
        if not self.delay:
            self.write(reply)
            return

        def late() -> None:
            self.waiting.discard(handle)
            self.write(reply)

        handle = asyncio.get_running_loop().call_later(self.delay, late)
        self.waiting.add(handle)

    def fault(self) -> bytes | None:
        chance = self.random.random() if self.faults else 1.0
        for name, part in self.faults.items():
            if chance < part:
                return FAULTS[name]
            chance -= part
        return None

    def write(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if data is FAULTS["cut"]:
            self.transport.abort()  # type: ignore[attr-defined]
        else:
            self.transport.write(data)  # type: ignore[attr-defined]


async def serve(delay: float, rate: float, burst: float, **faults: float) -> None:
    Chat.delay, Chat.bucket = delay, Bucket(rate, burst)
    Chat.faults = {name: part for name, part in faults.items() if part}
    server = await asyncio.get_running_loop().create_server(Chat, "127.0.0.1", 0, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("delay", "rate", "burst", *FAULTS):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    with asyncio.Runner() as runner:
        runner.run(serve(**vars(parser.parse_args())))
