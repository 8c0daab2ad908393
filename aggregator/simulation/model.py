"""A simulated model: an OpenAI-compatible server on 127.0.0.1 that plays the model behind all three roles.

It is a small rule-based program, not a language model. It works from the prompts alone, without the agent, the data set
or the expected answers, and every answer is a pure function of its seed and the request body, so that order and
concurrency do not matter. Some of its proposals are wrong on purpose, at `wrong_rate`.

The role is recognised by the headings of the user message (aggregator/training/prompts.py documents them):
`#CurrentValue` makes it an aggregator, `#Parameters` with `#Feedback` an optimizer, anything else a student.

    with SimulatedModel(seed=0) as server:
        llm = LLM("openai/simulated-1", base_url=server.base_url, api_key="simulated")

Usage is counted as four tokens for three words, rounded up.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self

import msgspec
from aiohttp import web

from aggregator import portal
from aggregator.errors import ConfigError
from aggregator.simulation.aggregator import aggregate, choose
from aggregator.simulation.language import answer_as_student, split_prompt
from aggregator.simulation.optimizer import propose
from aggregator.simulation.prompts import (
    MalformedError,
    Role,
    blocks_of,
    case_of,
    is_choice,
    reply_text,
    role_of,
    text_of,
)
from aggregator.text import show_call

MODEL = "simulated-1"
WRONG_RATE = 0.15


class SimulatedModel:
    """The server; a context manager, sync and async.

    `wrong_rate` is the share of proposals that err, `latency` the seconds each answer takes. `calls` counts the
    answered requests by role; `base_url` is known once the server has started.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        wrong_rate: float = WRONG_RATE,
        latency: float = 0.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if not 0 <= wrong_rate <= 1:
            raise ConfigError(f"Expected wrong_rate in [0, 1], got {wrong_rate!r}")
        self.seed = seed
        self.wrong_rate = wrong_rate
        self.latency = latency
        self._sleep = sleep
        self.calls: dict[Role, int] = {"agent": 0, "optimizer": 0, "aggregator": 0}
        self._runner: web.AppRunner | None = None
        self._url = ""

    def __repr__(self) -> str:
        return show_call("SimulatedModel", seed=self.seed) if not self._url else f"<SimulatedModel at {self._url}>"

    @property
    def base_url(self) -> str:
        """`http://127.0.0.1:<port>/v1`."""
        if not self._url:
            raise ConfigError(
                "Expected a started server, got base_url before it; use it inside `with SimulatedModel()`"
            )
        return self._url

    async def start(self) -> None:
        """Listen on a free port of 127.0.0.1."""
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", _models)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self._url = f"http://{host}:{port}/v1"

    async def stop(self) -> None:
        """Close the server and its connections; safe to call twice."""
        runner, self._runner, self._url = self._runner, None, ""
        if runner is not None:
            await runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    def __enter__(self) -> Self:
        portal.call(self.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        portal.call(self.stop)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            body = msgspec.json.decode(await request.read())
            completion = complete(body, seed=self.seed, wrong_rate=self.wrong_rate)
        except (msgspec.DecodeError, MalformedError) as error:
            return _json({"error": {"message": str(error), "type": "invalid_request_error", "code": None}}, 400)
        self.calls[role_of(body["messages"])] += 1
        if self.latency:
            await self._sleep(self.latency)
        if body.get("stream"):
            return await _streamed(request, completion)
        return _json(completion)


def complete(body: Any, *, seed: int = 0, wrong_rate: float = WRONG_RATE) -> dict[str, Any]:
    """Answer one chat completion request; pure. Raises MalformedError for a body that this API would refuse."""
    messages = _checked(body)
    key = msgspec.json.encode({**body, "stream": False}, order="deterministic")
    digest = hashlib.sha256(b"%d:" % seed + key).hexdigest()
    draw = random.Random(digest)  # noqa: S311 - errs at a rate, guards no secret
    text = answer(messages, draw, wrong_rate=wrong_rate, response_format=body.get("response_format"))
    text, finish = _within(text, body.get("max_completion_tokens", body.get("max_tokens")))
    prompt, output = sum(count_tokens(text_of(message)) for message in messages), count_tokens(text)
    return {
        "id": f"chatcmpl-{digest[:24]}",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model", MODEL),
        "choices": [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": finish, "logprobs": None}
            for i in range(body.get("n") or 1)
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output},
    }


def answer(
    messages: list[dict[str, Any]], draw: random.Random, *, wrong_rate: float, response_format: Any = None
) -> str:
    """Return what the simulated model says, in the role that the messages put it in."""
    role = role_of(messages)
    if role == "agent":
        system = "\n".join(text_of(message) for message in messages if message["role"] in {"system", "developer"})
        user = next((text_of(message) for message in reversed(messages) if message["role"] == "user"), "")
        return answer_as_student(*((system, user) if system else split_prompt(user)))
    if role == "aggregator":
        current, suggested = blocks_of(messages)
        if is_choice(response_format):
            reason = f"Compared {len(suggested)} suggestions with the current value."
            return reply_text({"choice": (choose(current, suggested), reason)}, response_format)
        merged = aggregate(current, suggested)
        reason = f"Weighed {len(suggested)} suggestions against the current value."
        return reply_text({name: (value, reason) for name, value in merged.items()}, response_format)
    asked_again = sum(message["role"] == "user" for message in messages) > 1
    proposed = propose(case_of(messages), draw, wrong_rate=0.0 if asked_again else wrong_rate)
    return reply_text(proposed, response_format)


def count_tokens(text: str) -> int:
    """Count four tokens for three words, rounded up.

    >>> count_tokens("one two three four")
    6
    """
    return -(-len(text.split()) * 4 // 3)


def _checked(body: Any) -> list[dict[str, Any]]:
    messages = body.get("messages") if isinstance(body, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise MalformedError("'messages' is a required property and must not be empty")
    if not all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages):
        raise MalformedError("each of 'messages' must be an object with a 'role'")
    return messages


def _within(text: str, limit: int | None) -> tuple[str, str]:
    """Cut an answer at the token limit, as a provider does."""
    if limit is None or count_tokens(text) <= limit:
        return text, "stop"
    return " ".join(text.split()[: limit * 3 // 4]), "length"


async def _models(_: web.Request) -> web.Response:
    return _json({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "simulated"}]})


def _json(data: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(data), status=status, content_type="application/json")


async def _streamed(request: web.Request, completion: dict[str, Any]) -> web.StreamResponse:
    """Send the answer as server-sent events, a word at a time, usage last."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for event in stream_events(completion):
        await response.write(b"data: %s\n\n" % event)
    await response.write_eof()
    return response


def stream_events(completion: dict[str, Any]) -> list[bytes]:
    """Return the data of the events that stream a completion."""
    shared = {key: completion[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    text, finish = completion["choices"][0]["message"]["content"], completion["choices"][0]["finish_reason"]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": piece} for piece in text.replace(" ", " \0").split("\0")]
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    chunks.append({"choices": [], "usage": completion["usage"]})
    return [*(msgspec.json.encode(shared | chunk) for chunk in chunks), b"[DONE]"]
