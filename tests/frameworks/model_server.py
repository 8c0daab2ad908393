"""A loopback server that speaks the APIs of many providers, and answers each request with a number of its own."""

from __future__ import annotations

import json
import struct
import threading
import time
from binascii import crc32
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any, Self

SLOWEST = 0.03
"""The maximum seconds of an answer: each takes a random part of it, so that concurrent answers arrive in any order."""


class ModelServer(ThreadingHTTPServer):
    """`hits` counts the requests. With a `status` other than 200 each one is refused with it."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hits = 0
        self.status = 200
        self.random = Random(7)
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if "chunked" in (self.headers.get("transfer-encoding") or ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        server = self.server
        with server.lock:
            server.hits += 1
            text, pause = f"answer {server.hits}", server.random.uniform(0, SLOWEST)
        time.sleep(pause)
        try:
            asked = json.loads(body)
        except ValueError:
            asked = {}
        kind, data = answer(self.path, asked if isinstance(asked, dict) else {}, text)
        if server.status != 200:
            kind, data = _json({"error": {"message": "slow down", "type": "refused"}, "message": "slow down"})
        self.send_response(server.status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST  # noqa: N815 - the base class's names

    def log_message(self, *_: object) -> None:
        pass


_USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def answer(path: str, asked: dict[str, Any], text: str) -> tuple[str, bytes]:
    """Return content type and body of the answer to a request of any API."""
    path = path.partition("?")[0]
    if asked.get("stream") or path.endswith((":streamGenerateContent", "/converse-stream")):
        return next(make(text) for end, make in _STREAMED.items() if path.endswith(end))
    return _json(next((make(text) for end, make in _PLAIN.items() if path.endswith(end)), {"text": text}))


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json", json.dumps(value).encode()


def _sse(events: list[dict[str, Any]], *, named: bool = False, ends: bool = True) -> tuple[str, bytes]:
    lines = [
        (f"event: {event['type']}\n" if named or "sequence_number" in event else "") + f"data: {json.dumps(event)}\n\n"
        for event in events
    ]
    return "text/event-stream", ("".join(lines) + ("data: [DONE]\n\n" if ends else "")).encode()


def _chat(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": _USAGE}


def _chat_events(text: str) -> list[dict[str, Any]]:
    known = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    pieces = [{"role": "assistant", "content": ""}, *({"content": part} for part in (text[:4], text[4:]))]
    choices = [{"index": 0, "delta": piece, "finish_reason": None} for piece in pieces]
    return [known | {"choices": [one]} for one in [*choices, {"index": 0, "delta": {}, "finish_reason": "stop"}]]


def _response(text: str, status: str = "completed") -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    output = [{"type": "message", "id": "m1", "status": "completed", "role": "assistant", "content": content}]
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    return {
        "id": "r",
        "object": "response",
        "created_at": 1,
        "status": status,
        "model": "m",
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5, **details},
    }


def _response_events(text: str) -> list[dict[str, Any]]:
    place = {"item_id": "m1", "output_index": 0, "content_index": 0, "logprobs": []}
    return [
        {"type": "response.created", "sequence_number": 0, "response": _response("", "in_progress") | {"output": []}},
        {"type": "response.output_text.delta", "sequence_number": 1, "delta": text, **place},
        {"type": "response.completed", "sequence_number": 2, "response": _response(text)},
    ]


def _message(text: str) -> dict[str, Any]:
    return {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }


def _message_events(text: str) -> list[dict[str, Any]]:
    return [
        {"type": "message_start", "message": _message("") | {"content": [], "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
    ]


def _gemini(text: str) -> dict[str, Any]:
    content = {"role": "model", "parts": [{"text": text}]}
    usage = {"promptTokenCount": 3, "candidatesTokenCount": 2, "totalTokenCount": 5}
    return {"candidates": [{"content": content, "finishReason": "STOP", "index": 0}], "usageMetadata": usage}


def _bedrock_events(text: str) -> Iterator[bytes]:
    """Yield the binary frames of an AWS event stream."""
    events = [
        ("messageStart", {"role": "assistant"}),
        ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": text}}),
        ("contentBlockStop", {"contentBlockIndex": 0}),
        ("messageStop", {"stopReason": "end_turn"}),
    ]
    for name, payload in events:
        headers = b""
        named = {":event-type": name, ":content-type": "application/json", ":message-type": "event"}
        for header, value in named.items():
            headers += bytes([len(header)]) + header.encode() + b"\x07" + struct.pack(">H", len(value)) + value.encode()
        body = json.dumps(payload).encode()
        prelude = struct.pack(">II", len(headers) + len(body) + 16, len(headers))
        frame = prelude + struct.pack(">I", crc32(prelude)) + headers + body
        yield frame + struct.pack(">I", crc32(frame))


def _embedding(text: str) -> dict[str, Any]:
    data = [{"object": "embedding", "index": 0, "embedding": [float(text.rpartition(" ")[2]), 0.5]}]
    return {"object": "list", "model": "m", "data": data, "usage": _USAGE}


def _converse(text: str) -> dict[str, Any]:
    return {
        "output": {"message": {"role": "assistant", "content": [{"text": text}]}},
        "stopReason": "end_turn",
        "usage": {"inputTokens": 3, "outputTokens": 2, "totalTokens": 5},
        "metrics": {"latencyMs": 1},
    }


def _cohere(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    return {"id": "c", "finish_reason": "COMPLETE", "message": message}


_PLAIN: dict[str, Callable[[str], dict[str, Any]]] = {
    "/chat/completions": _chat,
    "/responses": _response,
    "/messages": _message,
    ":generateContent": _gemini,
    "/converse": _converse,
    "/v2/chat": _cohere,
    "/api/chat": lambda text: {"model": "m", "message": {"role": "assistant", "content": text}, "done": True},
    "/embeddings": _embedding,
}
_STREAMED: dict[str, Callable[[str], tuple[str, bytes]]] = {
    "/chat/completions": lambda text: _sse(_chat_events(text)),
    "/responses": lambda text: _sse(_response_events(text)),
    "/messages": lambda text: _sse(_message_events(text), named=True, ends=False),
    ":streamGenerateContent": lambda text: _sse([_gemini(text)], ends=False),
    "/converse-stream": lambda text: ("application/vnd.amazon.eventstream", b"".join(_bedrock_events(text))),
}
