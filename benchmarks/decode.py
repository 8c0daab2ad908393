"""What reading an answer costs: recorded bodies of each family, against json, msgspec untyped and OpenAI's types."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Case, Options, call, measure
from benchmarks.report import Report, Target

DATA = ROOT.parent / "shared" / "data" / "real_exchanges"
FAMILIES = {
    "openai": "openai_compatible",
    "anthropic": "anthropic",
    "gemini": "gemini",
    "responses": "openai_responses",
}
NAMES = {
    "openai": "openai/gpt-4o-mini",
    "anthropic": "anthropic/claude-sonnet-4",
    "gemini": "gemini/gemini-2.5-flash",
    "responses": "openai/gpt-5-pro",
}
LARGEST = 100_000  # bodies with images inside measure memcpy


def recordings(file: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def bodies(family: str) -> list[bytes]:
    """The bodies of answers that are one JSON object, as a client receives them."""
    answers = [exchange for exchange in recordings(FAMILIES[family]) if exchange.get("kind", "ok") == "ok"]
    found = [exchange["response_body"].encode() for exchange in answers]
    return [body for body in found if body.lstrip().startswith(b"{") and len(body) <= LARGEST]


def decoder(family: str, way: str) -> Callable[[Any], Any]:
    """What reads a body in this way; ours reads it as the transport hands it over (see `arrived`)."""
    if way == "json":
        return json.loads
    if way == "msgspec untyped":
        import msgspec

        return msgspec.json.Decoder().decode
    if way == "openai's types":
        from openai.types.chat import ChatCompletion

        return ChatCompletion.model_validate_json
    from aggregator.llm.calls import ChatCall
    from aggregator.llm.names import resolve

    codec = resolve(NAMES[family], api_key="none", env={}).codec
    question = ChatCall(model="m", messages=())
    return lambda reply: codec.decode(reply, question)


def arrived(body: bytes) -> Any:
    from aggregator.records import HTTPReply

    return HTTPReply(status=200, body=body, headers={"content-type": "application/json", "x-request-id": "req_1"})


def speed(family: str, way: str, passes: int) -> dict[str, float]:
    """Mean microseconds a body over the best of several passes, and how many of the bodies could be read."""
    decode, usable = decoder(family, way), []
    everything: list[Any] = bodies(family)
    if way == "ours":
        everything = [arrived(body) for body in everything]
    for body in everything:
        try:
            decode(body)
        except Exception:  # noqa: BLE001 - a body that this way cannot read is counted, not timed
            continue
        usable.append(body)
    best = float("inf")
    for _ in range(passes):
        started = time.perf_counter()
        for body in usable:
            decode(body)
        best = min(best, time.perf_counter() - started)
    return {"us": best / len(usable) * 1e6, "bodies": len(everything), "read %": 100 * len(usable) / len(everything)}


def right(family: str) -> dict[str, float]:
    """How many of the OK bodies give their text, finish reason and usage."""
    decode = decoder(family, "ours")
    found = [(body, json.loads(body)) for body in bodies(family)]
    answers = [(body, plain) for body, plain in found if expected(family, plain) is not None]
    wrong = 0
    for body, plain in answers:
        completion = decode(arrived(body))
        usage = completion.usage
        got = (completion.text, completion.raw_finish_reason, usage.input_tokens, usage.output_tokens)
        wrong += got != expected(family, plain)
    return {"bodies": len(answers), "right %": 100 * (1 - wrong / len(answers))}


def expected(family: str, plain: dict[str, Any]) -> tuple[Any, ...] | None:
    """What a straightforward body says, read without our code; None for those that need interpretation."""
    try:
        if family == "openai":
            choice, usage = plain["choices"][0], plain["usage"]
            text = choice["message"].get("content") or ""
            odd = not isinstance(text, str) or "<think>" in text
            facts = (text, choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"])
            return None if odd else facts
        if family == "anthropic":
            usage = plain["usage"]
            cached = (usage.get("cache_read_input_tokens") or 0) + (usage.get("cache_creation_input_tokens") or 0)
            text = "".join(block["text"] for block in plain["content"] if block["type"] == "text")
            return text, plain["stop_reason"], usage["input_tokens"] + cached, usage["output_tokens"]
        if family == "responses":
            parts = [part for item in plain["output"] if item["type"] == "message" for part in item["content"]]
            text = "".join(part["text"] for part in parts if part["type"] == "output_text")
            word = (plain.get("incomplete_details") or {}).get("reason") or plain["status"]
            return text, word, plain["usage"]["input_tokens"], plain["usage"]["output_tokens"]
        candidate, usage = plain["candidates"][0], plain["usageMetadata"]
        if not isinstance(candidate["finishReason"], str) or "toolUsePromptTokenCount" in usage:
            return None
        text = "".join(part.get("text", "") for part in candidate["content"]["parts"] if not part.get("thought"))
        answered = usage["candidatesTokenCount"] + usage.get("thoughtsTokenCount", 0)
        return text, candidate["finishReason"], usage["promptTokenCount"], answered
    except (KeyError, TypeError, IndexError):
        return None


def streamed() -> dict[str, float]:
    """How many recorded streams of the Responses API give their text, deltas and usage."""
    from aggregator.llm.calls import ChatCall
    from aggregator.llm.names import resolve

    codec = resolve(NAMES["responses"], api_key="none", env={}).codec
    found = [exchange for exchange in recordings(FAMILIES["responses"]) if exchange["kind"] == "stream"]
    good = 0
    for exchange in found:
        body = exchange["response_body"].encode()
        events = [json.loads(line[5:]) for line in body.splitlines() if line.startswith(b"data: {")]
        text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
        usage = events[-1]["response"]["usage"]
        reader = codec.stream(ChatCall(model="m", messages=(), stream=True))
        deltas = "".join(reader.feed(body))
        whole = reader.finish(arrived(body))
        counts = (whole.usage.input_tokens, whole.usage.output_tokens)
        good += (deltas, whole.text, *counts) == (text, text, usage["input_tokens"], usage["output_tokens"])
    return {"bodies": len(found), "right %": 100 * good / len(found)}


def errors() -> dict[str, float]:
    """How many recorded error answers become an error of the right class with a message."""
    from aggregator import errors as tree
    from aggregator.llm.names import resolve
    from aggregator.records import HTTPReply

    classes = {
        401: tree.AuthenticationError, 403: tree.PermissionDeniedError, 404: tree.NotFoundError,
        402: tree.RateLimitError, 429: tree.RateLimitError, 408: tree.ServerError, 409: tree.ServerError,
    }  # fmt: skip
    codec, good = resolve("openai/gpt-4o-mini", api_key="none", env={}).codec, 0
    found = recordings("errors")
    for exchange in found:
        status = exchange["status"]
        headers = {name.lower(): str(value) for name, value in (exchange["response_headers"] or {}).items()}
        error = codec.error(HTTPReply(status=status, body=(exchange["response_body"] or "").encode(), headers=headers))
        kind = classes.get(status, tree.ServerError if status >= 500 else tree.BadRequestError)
        good += isinstance(error, kind) and bool(error.message)
    return {"bodies": len(found), "right %": 100 * good / len(found)}


def run(options: Options) -> Report:
    if not DATA.exists():
        return Report(
            notes=[f"not measured: the recordings are in ../shared/data, which is absent ({Path(*DATA.parts[-2:])})"]
        )
    passes = 3 if options.quick else 50
    ways: list[tuple[str, tuple[str, ...]]] = [("ours", ()), ("msgspec untyped", ()), ("json", ())]
    cases = [
        Case(f"{family}, {way}", call("decode", "speed", family=family, way=way, passes=passes), needs)
        for family in FAMILIES
        for way, needs in [*ways, *([("openai's types", ("openai",))] if family == "openai" else [])]
    ]
    cases += [Case(f"{family}, right", call("decode", "right", family=family)) for family in FAMILIES]
    cases += [Case("responses, streams", call("decode", "streamed")), Case("errors", call("decode", "errors"))]
    measured = measure(cases, options, repetitions=3)
    return Report(
        rows=measured.rows(),
        targets=[
            *[
                Target(f"{family}: mean of a body", measured.median(f"{family}, ours", "us"), 6, "us")
                for family in ("openai", "anthropic")
            ],
            *[
                Target(
                    f"{family}: text, finish reason, usage right",
                    measured.median(f"{family}, right", "right %"),
                    100,
                    "%",
                    at_least=True,
                )
                for family in FAMILIES
            ],
            Target(
                "responses: streams right",
                measured.median("responses, streams", "right %"),
                100,
                "%",
                at_least=True,
            ),
            Target(
                "errors: class right, message not empty", measured.median("errors", "right %"), 100, "%", at_least=True
            ),
        ],
        missing=measured.missing,
        versions=measured.versions,
        notes=[
            f"bodies up to {LARGEST:,} bytes; `ours` makes the whole Completion, the others only parse",
            "`read %` below 100 also counts answers that hold no message, which raise",
        ],
    )
