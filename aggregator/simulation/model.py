"""A simulated model: an OpenAI-compatible server on 127.0.0.1 that plays the model behind all three roles.

It is a small rule-based program, not a language model. It reads only the prompts, not the agent, the data set or the
expected answers, and every answer is a pure function of its seed and the request body, so that order and concurrency do
not matter. Some of its proposals are wrong on purpose, at `wrong_rate`.

The role is recognised by the headings of the user message (aggregator/training/prompts.py documents them):
`#CurrentValue` makes it an aggregator, `#Parameters` with `#Feedback` an optimizer, anything else a student.

    with SimulatedModel(seed=0) as server:
        llm = LLM("openai/simulated-1", base_url=server.base_url, api_key="simulated")

Usage is counted as four tokens for three words, rounded up.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import msgspec
from aiohttp import web

from aggregator import portal
from aggregator.checks import is_number
from aggregator.errors import ConfigError
from aggregator.simulation.language import answer_as_student, split_prompt
from aggregator.simulation.optimizer import Block, Case, Parameter, Proposed, aggregate, bounds, choose, propose
from aggregator.text import show_call

# ---- reading prompts, and formatting replies

Role = Literal["agent", "optimizer", "aggregator"]

TERMINATE = "TERMINATE"
UNCHANGED = "No change is needed."

_HEADING = re.compile(r"^#([A-Z]\w*)[ \t]*$", re.MULTILINE)
_FACT = re.compile(r"(confidence|support|score|feedback): (.*)")
_CUT = re.compile(r"\s*(?:…|\.\.\.|\[cut\])\s*$")


class MalformedError(ValueError):
    """A request that this API would refuse."""


def text_of(message: Mapping[str, Any]) -> str:
    """Return a message's text; content parts are joined without a separator."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))


def role_of(messages: Sequence[Mapping[str, Any]]) -> Role:
    """Return the role that the headings of the first user message indicate."""
    headings = set(sections_of(_question(messages)))
    if "CurrentValue" in headings:
        return "aggregator"
    return "optimizer" if {"Parameters", "Feedback"} <= headings else "agent"


def sections_of(text: str) -> dict[str, str]:
    r"""Split a user message at its heading lines.

    >>> sections_of("#Score\n0.5\n\n#Feedback\nToo short.")
    {'Score': '0.5', 'Feedback': 'Too short.'}
    """
    _, *rest = _HEADING.split(text)
    return {heading: body.strip() for heading, body in zip(rest[::2], rest[1::2], strict=True)}


def case_of(messages: Sequence[Mapping[str, Any]]) -> Case:
    """Read an optimizer's example."""
    sections = sections_of(_question(messages))
    seen = shown_text(sections.get("Transcript", ""))
    return Case(
        parameters={name: _parameter(name, facts) for name, facts in _object(sections["Parameters"]).items()},
        seen=_CUT.sub("", seen),
        cut=bool(_CUT.search(seen)),
        output=sections.get("Output", ""),
        score=_float(sections.get("Score", "")),
        feedback=sections["Feedback"],
    )


def blocks_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Block, list[Block]]:
    """Read an aggregator's current value and suggestions."""
    sections = sections_of(_question(messages))
    suggested = [_block(body) for heading, body in sections.items() if heading.startswith("SuggestedValue")]
    return _block(sections["CurrentValue"]), suggested


_QUESTIONS = ("user: ", "Inputs: ")  # of a call to a model; of a GEPA record


def shown_text(transcript: str) -> str:
    r"""Return the question of a transcript: its last user message, or the last paragraph of a single-message prompt.

    >>> shown_text("LLM call\n  system: Be kind.\n  user: My parcel is lost.\n  reply: sales")
    'My parcel is lost.'
    """
    lines = transcript.split("\n")
    at = max((i for i, line in enumerate(lines) if line.lstrip().startswith(_QUESTIONS)), default=None)
    if at is None:
        return ""
    first = lines[at].lstrip()
    indent = len(lines[at]) - len(first)
    if not first.endswith(": |"):
        return first.partition(": ")[2]
    block = []
    for line in lines[at + 1 :]:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        block.append(line.strip())
    text = "\n".join(block)
    return text if any(line.lstrip().startswith("system: ") for line in lines[:at]) else split_prompt(text)[1]


def reply_text(proposed: Proposed, response_format: Any = None) -> str:
    """Format new values with their reasons as a reply of both roles, or TERMINATE if nothing should change.

    A `response_format` makes it JSON in every case. A schema is respected as by constrained decoding: every required
    key is there, null for no change, and numbers stay within the schema's limits.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if not proposed and kind not in {"json_object", "json_schema"}:
        return TERMINATE
    reply: dict[str, Any] = {f"reasoning_{name}": why for name, (_, why) in proposed.items()}
    reply["suggestion"] = {name: value for name, (value, _) in proposed.items()}
    if kind == "json_schema":
        reply = _fit_to_schema(reply, response_format["json_schema"].get("schema", {}))
    return json.dumps(reply, indent=2)


def is_choice(response_format: Any) -> bool:
    """Return True if a schema requires the number of a suggestion instead of new values."""
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind != "json_schema":
        return False
    suggestion = response_format["json_schema"].get("schema", {}).get("properties", {}).get("suggestion", {})
    return list(suggestion.get("properties", {})) == ["choice"]


def _fit_to_schema(reply: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties", {})
    inner = properties.get("suggestion", {})
    limits = inner.get("properties", {})
    suggestion = {name: _limited(value, limits.get(name, {})) for name, value in reply["suggestion"].items()}
    unchanged = {name: None for name in inner.get("required", ()) if name not in suggestion}
    needed = [name for name in schema.get("required", ()) if name != "suggestion" and name not in reply]
    reasons = {name: reply[name] for name in reply if name != "suggestion"} | dict.fromkeys(needed, UNCHANGED)
    return {**reasons, "suggestion": suggestion | unchanged}


def _limited(value: Any, schema: Mapping[str, Any]) -> Any:
    """Keep a number within the schema's limits."""
    if not is_number(value):
        return value
    for option in schema.get("anyOf", [schema]):
        value = min(max(value, option.get("minimum", value)), option.get("maximum", value))
    return value


def _question(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the first user message; later ones repeat the question."""
    return next((text_of(message) for message in messages if message["role"] == "user"), "")


def _parameter(name: str, facts: Any) -> Parameter:
    if not isinstance(facts, Mapping) or "value" not in facts:
        return Parameter(name, facts)
    kind = facts.get("type", "")
    minimum, maximum = bounds(kind if isinstance(kind, str) else json.dumps(kind))
    about = f"{facts.get('description', '')} {facts.get('constraint', '')}"
    return Parameter(name, facts["value"], about, minimum, maximum)


def _block(body: str) -> Block:
    facts: dict[str, str] = {}
    while found := _FACT.match(body):
        facts[found[1]] = found[2]
        body = body[found.end() :].lstrip("\n")
    weight = _float(facts.get("confidence", "")) or 0.0
    return Block(weight * (_float(facts.get("support", "")) or 1.0), _object(body))


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise MalformedError(f"Expected a JSON object in a section, got {text[:80]!r}: {error}") from error
    if not isinstance(found, dict):
        raise MalformedError(f"Expected a JSON object in a section, got {text[:80]!r}")
    return found


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


MODEL = "simulated-1"
WRONG_RATE = 0.15


# ---- the server and its answers


class SimulatedModel:
    """The simulated model as a server on 127.0.0.1; a context manager, sync and async.

    `wrong_rate` is the share of wrong proposals, `latency` the seconds each answer takes. `calls` counts the answered
    requests by role; `base_url` is known once the server has started.
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
    """Answer one chat completion request; pure. Raises MalformedError for a body that the API would refuse."""
    messages = body.get("messages") if isinstance(body, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise MalformedError("'messages' is a required property and must not be empty")
    if not all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages):
        raise MalformedError("each of 'messages' must be an object with a 'role'")
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
    """Return the simulated model's answer, in the role given by the messages."""
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
