"""The Responses API against real recordings, compared with a plain parse of the same JSON."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from random import Random
from typing import Any, NamedTuple

import pytest
from test_conformance import JUNK, RECORDINGS, STATUS_CLASSES, places

from aggregator.errors import APIConnectionError, LLMError
from aggregator.llm.calls import ChatCall, Codec, Target
from aggregator.llm.codecs.responses import OpenAIResponses
from aggregator.llm.messages import normalise
from aggregator.records import Completion, HTTPReply

FILE = RECORDINGS / "openai_responses.jsonl.gz"

pytestmark = pytest.mark.skipif(
    not FILE.is_file(),
    reason="needs the recordings in ../shared/data/real_exchanges, which are not part of the project",
)

CALL = ChatCall(model="recorded", messages=({"role": "user", "content": "?"},))


class Reading(NamedTuple):
    """What a plain parse of a response finds."""

    text: str
    finish: str
    usage: tuple[int | None, int | None, int | None, int | None]
    tools: list[tuple[str, str]]
    refused: bool


@cache
def rows(kind: str) -> list[dict[str, Any]]:
    with gzip.open(FILE, "rt", encoding="utf-8") as lines:
        return [row for line in lines if (row := json.loads(line))["kind"] == kind]


def codec() -> Codec:
    return OpenAIResponses(Target(provider="openai", model="recorded", base_url="https://api.openai.com/v1"))


def reply(row: dict[str, Any]) -> HTTPReply:
    headers = {name.lower(): str(value) for name, value in row["response_headers"].items()}
    return HTTPReply(status=row["status"], body=row["response_body"].encode(), headers=headers)


def events(row: dict[str, Any]) -> list[dict[str, Any]]:
    data = [line[5:].strip() for line in row["response_body"].splitlines() if line.startswith("data:")]
    return [json.loads(text) for text in data if text != "[DONE]"]


def final(row: dict[str, Any]) -> dict[str, Any]:
    """Return the last event's response, with the items of the earlier events if it has none."""
    found = events(row)
    response: dict[str, Any] = found[-1]["response"]
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    return {**response, "output": response["output"] or done}


def plain(body: dict[str, Any]) -> Reading:
    parts = [part for item in body["output"] if item["type"] == "message" for part in item["content"]]
    tools = [(item["name"], item["arguments"]) for item in body["output"] if item["type"] == "function_call"]
    reason: str | None = (body.get("incomplete_details") or {}).get("reason")
    finish = (
        ("tool_calls" if tools else "stop") if reason is None else {"max_output_tokens": "length"}.get(reason, reason)
    )
    usage = body["usage"]
    return Reading(
        "".join(part["text"] for part in parts if part["type"] == "output_text"),
        finish,
        (
            usage["input_tokens"],
            usage["output_tokens"],
            usage.get("input_tokens_details", {}).get("cached_tokens"),
            usage.get("output_tokens_details", {}).get("reasoning_tokens"),
        ),
        tools,
        any(part["type"] == "refusal" for part in parts),
    )


def reading(ours: Completion) -> Reading:
    usage = ours.usage
    return Reading(
        text=ours.text,
        finish=ours.finish_reason,
        usage=(usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens),
        tools=[(call.name, call.arguments) for call in ours.tool_calls],
        refused=bool(ours.choices[0].message.refusal),
    )


def compare(found: Completion | LLMError, expected: Reading) -> Any:
    """Return None if the two agree."""
    if isinstance(found, LLMError):
        return (expected, found)
    return None if reading(found) == expected else (expected, reading(found))


def test_every_recorded_response_is_read_correctly() -> None:
    """Text, finish reason, usage, calls and refusal equal those of a plain parse."""
    wrong = []
    for row in rows("ok"):
        try:
            ours: Completion | LLMError = codec().decode(reply(row), CALL)
        except LLMError as error:
            ours = error
        wrong.append(compare(ours, plain(json.loads(row["response_body"]))))
    assert [difference for difference in wrong if difference] == []
    assert len(wrong) >= 100


@pytest.mark.parametrize("step", [0, 1000, 7])
def test_every_recorded_stream_is_read_correctly(step: int) -> None:
    """Wherever the bytes are cut, deltas and whole answer equal those of a plain parse of the events."""
    wrong = []
    for row in rows("stream"):
        body = row["response_body"].encode()
        pieces = [body[i : i + step] for i in range(0, len(body), step)] if step else [body]
        reader = codec().stream(CALL)
        deltas = "".join(text for piece in pieces for text in reader.feed(piece))
        try:
            ours: Completion | LLMError = reader.finish(reply(row))
        except LLMError as error:
            ours = error
        expected = plain(final(row))
        wrong += [compare(ours, expected), None if deltas == expected.text else (expected.text, deltas)]
    assert [difference for difference in wrong if difference] == []
    assert len(wrong) >= 100


def test_a_recorded_stream_that_is_decoded_in_one_piece() -> None:
    """A stored stream, decoded as a whole body, gives the same answer as event by event."""
    for row in rows("stream")[:20]:
        reader = codec().stream(CALL)
        list(reader.feed(row["response_body"].encode()))
        assert codec().decode(reply(row), CALL) == reader.finish(reply(row))


def test_a_recorded_stream_cut_anywhere_is_a_lost_connection() -> None:
    """A stream without its last event is never an answer."""
    for row in rows("stream")[:30]:
        body = row["response_body"].encode()
        end = body.rindex(b"data:")
        for cut in (end // 3, end // 2, end - 1, end + 20):
            reader = codec().stream(CALL)
            list(reader.feed(body[:cut]))
            with pytest.raises(APIConnectionError):
                reader.finish(HTTPReply(status=200, body=body[:cut], headers={}))


def answers() -> Iterator[tuple[Completion, list[dict[str, Any]]]]:
    """Return every recorded answer with its output items."""
    for row in (*rows("ok"), *rows("stream")):
        body = final(row) if row["kind"] == "stream" else json.loads(row["response_body"])
        yield codec().decode(reply(row), CALL), body["output"]


def test_recorded_items_are_sent_back_unchanged() -> None:
    """Reasoning, calls and searches are sent with the next turn in order; a text without them is sent as a string."""
    count = 0
    for answer, output in answers():
        messages = normalise([{"role": "user", "content": "?"}, answer, {"role": "user", "content": "Go on."}])
        sent = json.loads(codec().encode(ChatCall(model="gpt-5", messages=messages)).body)["input"][1:-1]
        if len(output) == 1 and output[0]["type"] == "message" and not output[0].get("phase") and answer.text:
            assert sent == [{"role": "assistant", "content": answer.text}]
        else:
            assert sent == output
            count += 1
    assert count >= 50


VITAL = {"output", "content", "usage", "status", "error", "incomplete_details", "reason"}  # cannot be lost unnoticed


def test_one_damaged_field_loses_at_most_that_field() -> None:
    """If any field of a recorded response is null, without its type or invalid, the answer is still read."""
    random = Random(7)
    for row in rows("ok")[:60]:
        if len(row["response_body"]) > 20_000:
            continue
        whole = codec().decode(reply(row), CALL)
        for path in list(places(json.loads(row["response_body"]))):
            body = json.loads(row["response_body"])
            node = body
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = deepcopy(random.choice(JUNK))
            last = next(key for key in reversed(path) if isinstance(key, str))
            try:
                found = codec().decode(HTTPReply(status=200, body=json.dumps(body).encode(), headers={}), CALL)
            except LLMError:
                assert last in VITAL, path
                continue
            if last not in VITAL | {"text", "type", "refusal"}:
                assert found.text == whole.text, path
            if last not in VITAL and "oken" not in last:
                assert found.usage.input_tokens == whole.usage.input_tokens, path


def test_every_recorded_error_of_this_api_has_its_class() -> None:
    """The class follows from the status, and the message is never empty."""
    for row in rows("error"):
        error = codec().error(reply(row))
        assert isinstance(error, STATUS_CLASSES[row["status"]])
        assert error.message
