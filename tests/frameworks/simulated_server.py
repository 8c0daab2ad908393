"""The simulated model on loopback, for frameworks: Chat Completions with streams, Responses, and counts by role."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from aggregator.simulation.model import complete, role_of, stream_events

Messages = list[dict[str, Any]]


class SimulatedServer(ThreadingHTTPServer):
    """`calls` counts the requests by role: agent, optimizer and aggregator. Proposals do not err."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.calls: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """`http://127.0.0.1:<port>/v1`."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SimulatedServer

    def do_POST(self) -> None:
        """Answer a request of one of the two APIs."""
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)))
        is_responses = self.path.endswith("/responses")
        messages = [without_template(one) for one in (messages_of(body) if is_responses else body["messages"])]
        with self.server.lock:
            self.server.calls[role_of(messages)] += 1
        completion = complete({**body, "messages": messages}, seed=1, wrong_rate=0.0)
        if is_responses:
            self._send(json.dumps(as_response(completion)).encode(), "application/json")
        elif body.get("stream"):
            self._send(b"".join(b"data: %s\n\n" % one for one in stream_events(completion)), "text/event-stream")
        else:
            self._send(json.dumps(completion).encode(), "application/json")

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Write nothing."""


_CREWAI = re.compile(
    r"Current Task: (.*?)\n\s*\n *This is the expected criteria for .*?Provide your complete response:", re.DOTALL
)


def without_template(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the question alone where CrewAI puts its own sentences around it, in transcripts too.

    The simulated model takes the words of a question for what it is about; a language model knows such a template.
    """
    content = message.get("content")
    return {**message, "content": _CREWAI.sub(r"\1", content)} if isinstance(content, str) else message


def messages_of(body: Mapping[str, Any]) -> Messages:
    """Return a request of the Responses API as the messages of a chat.

    >>> messages_of({"instructions": "Route.", "input": "where is it"})
    [{'role': 'system', 'content': 'Route.'}, {'role': 'user', 'content': 'where is it'}]
    """
    system: Messages = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
    given = body["input"]
    if isinstance(given, str):
        return [*system, {"role": "user", "content": given}]
    return [*system, *({"role": one["role"], "content": _text(one["content"])} for one in given if "role" in one)]


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def as_response(completion: Mapping[str, Any]) -> dict[str, Any]:
    """Return a chat completion as a response of the Responses API."""
    usage = completion["usage"]
    text = {"type": "output_text", "text": completion["choices"][0]["message"]["content"], "annotations": []}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
    return {
        "id": completion["id"].replace("chatcmpl-", "resp_"),
        "object": "response",
        "created_at": 0,
        "status": "completed",
        "model": completion["model"],
        "output": [message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }
