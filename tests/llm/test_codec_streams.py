"""Streams of every API: bytes cut anywhere, events as servers really send them, errors in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.errors import (
    APIConnectionError,
    BadRequestError,
    ContentFilterError,
    DecodeError,
    RateLimitError,
    ResponseError,
    ServerError,
)
from aggregator.llm.calls import ChatCall
from aggregator.llm.codecs.base import Event, EventParser
from aggregator.llm.codecs.wire import ThinkingFilter, split_thinking
from aggregator.llm.messages import normalise
from aggregator.llm.names import resolve
from aggregator.records import Completion, HTTPReply

CALL = ChatCall(model="m", messages=({"role": "user", "content": "Hi"},), stream=True)


def read(model: str, body: bytes, *, step: int = 0) -> tuple[list[str], Completion]:
    """Feed a body in pieces of `step` bytes (0: all at once); return the deltas and the whole answer."""
    reader = resolve(model, env={}).codec.stream(CALL)
    pieces = [body[i : i + step] for i in range(0, len(body), step)] if step else [body]
    deltas = [text for piece in pieces for text in reader.feed(piece)]
    return deltas, reader.finish(HTTPReply(status=200, body=body, headers={"x-request-id": "req_1"}))


def events(*chunks: Any, end: str = "\n\n", done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(chunk)}{end}" for chunk in chunks]
    return "".join([*lines, *([f"data: [DONE]{end}"] if done else [])]).encode()


def delta(content: Any = None, finish: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": content, **more}, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "cost": 0.5}}
PLAIN = events({"id": "c", "model": "m", **delta("He")}, delta("llo", "stop"), USAGE)


@pytest.mark.parametrize("step", [0, 1, 7])
def test_deltas_and_the_whole_answer(step: int) -> None:
    """Text arrives as deltas; usage, id, model and request id are on the whole answer, wherever the bytes are cut."""
    deltas, whole = read("openai/m", PLAIN, step=step)
    assert deltas == ["He", "llo"]
    assert (whole.text, whole.finish_reason, whole.id, whole.model, whole.request_id) == (
        "Hello",
        "stop",
        "c",
        "m",
        "req_1",
    )
    assert (whole.usage.input_tokens, whole.usage.output_tokens, whole.usage.cost) == (3, 2, 0.5)


@pytest.mark.parametrize(
    "body",
    [
        events(delta("x", "stop"), end="\r\n\r\n"),
        b": OPENROUTER PROCESSING\n\n" + events(delta("x", "stop")),
        events(delta("x", "stop"), done=False),
        events(delta("x"), delta(None, "stop"), done=False).rstrip(),
        b"event: message\n" + events(delta("x", "stop")),
        b"\xef\xbb\xbf" + events(delta("x", "stop")),
        events({"choices": [], "prompt_filter_results": []}, delta("x", "stop")),
        events(delta("x"), done=True),
        events({"choices": [{"delta": {"content": "x"}, "message": {"content": "x"}, "finish_reason": "stop"}]}),
        events({**delta("x"), "usage": None}, delta("", "stop")),
    ],
)  # fmt: skip
def test_streams_as_servers_send_them(body: bytes) -> None:
    """CRLF, comments, event names, no [DONE], no last empty line, no finish reason: the answer is the same."""
    deltas, whole = read("openai/m", body)
    assert ("".join(deltas), whole.text) == ("x", "x")


def test_usage_in_several_chunks() -> None:
    """Repeated usage is cumulative: the last value counts."""
    body = events(
        {**delta("a"), "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
        {**delta("b", "stop"), "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    )
    usage = read("openai/m", body)[1].usage
    assert (usage.input_tokens, usage.output_tokens) == (3, 2)


def test_no_usage_is_unknown_usage() -> None:
    """A missing usage is None, not 0."""
    assert read("openai/m", events(delta("a", "stop")))[1].usage.input_tokens is None


def test_tool_calls_in_pieces() -> None:
    """Arguments are joined by index; a piece without an index, or with another id, starts a new call."""
    body = events(
        delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x"'}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": ": 1}"}}]),
        delta(tool_calls=[{"index": 0, "id": "b", "function": {"name": "g", "arguments": "{}"}}]),
        delta(tool_calls=[{"id": "c", "function": {"name": "h", "arguments": "{}"}}]),
        delta(None, "tool_calls"),
    )
    whole = read("openai/m", body)[1]
    assert [(c.id, c.name, c.arguments) for c in whole.tool_calls] == [
        ("a", "f", '{"x": 1}'),
        ("b", "g", "{}"),
        ("c", "h", "{}"),
    ]
    assert (whole.choices[0].message.content, whole.finish_reason) == (None, "tool_calls")


def test_several_choices() -> None:
    """Deltas are the first choice's text; the answer has all choices."""
    body = events(delta("a", index=0), delta("b", index=1), delta("", "stop"), delta("", "length", index=1))
    deltas, whole = read("openai/m", body)
    assert deltas == ["a"]
    assert [(c.message.content, c.finish_reason) for c in whole.choices] == [("a", "stop"), ("b", "length")]


@pytest.mark.requirement("client 6: thinking is no part of the text")
@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thinking_is_not_a_delta(name: str) -> None:
    """Thinking under its own name is collected separately."""
    deltas, whole = read(
        "openai/m",
        events({"choices": [{"delta": {name: "h"}}]}, {"choices": [{"delta": {name: "m"}}]}, delta("4", "stop")),
    )
    assert (deltas, whole.text, whole.reasoning) == (["4"], "4", "hm")


def test_thinking_in_parts() -> None:
    """Mistral streams thinking as parts of the content."""
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
    deltas, whole = read("mistral/m", events(delta(parts), delta("4", "stop")))
    assert (deltas, whole.text, whole.reasoning) == (["4"], "4", "hm")


@given(st.sampled_from(["<think>hm</think>\n4 <think>", "  <thin", "<think>cut", "plain", "\n<b>x", "<"]), st.data())
def test_a_tag_cut_anywhere(content: str, data: st.DataObject) -> None:
    """Deltas join to the text of the whole answer, wherever the tag is cut."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
    pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    thinking = ThinkingFilter()
    shown = "".join([thinking.feed(piece) for piece in pieces]) + thinking.flush()
    assert shown == split_thinking(content)[0]


@pytest.mark.requirement("client 7: an error within a stream")
@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (events(delta("a"))[:-20], APIConnectionError),
        (events(delta("a"), done=False), APIConnectionError),
        (events({"error": {"code": 429, "message": "slow"}}, done=False), RateLimitError),
        (b'event: error\ndata: {"message": "upstream", "code": 502}\n\n', ServerError),
        (b'error: {"code": 500, "message": "slot"}\n\n', ServerError),
        (b"data: {cut\n\n", DecodeError),
        (b"", DecodeError),
        (events({"choices": [{"delta": {}, "error": {"code": 502, "message": "x"}}]}), ServerError),
    ],
)  # fmt: skip
def test_streams_that_fail(body: bytes, kind: type[Exception]) -> None:
    """A truncated stream, an error inside one, and a body that is not a stream raise typed errors."""
    with pytest.raises(kind):
        read("openai/m", body)


def test_a_server_that_does_not_stream() -> None:
    """A whole JSON answer to `stream=True` gives no delta; its text is on the completion."""
    body = json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}).encode()
    deltas, whole = read("openai/m", body, step=5)
    assert (deltas, whole.text) == ([], "x")


@pytest.mark.parametrize("model", ["openai/m"])
def test_a_recorded_stream_decodes_in_one_piece(model: str) -> None:
    """`decode` accepts a body of events, so a cassette may hold streams."""
    assert resolve(model, env={}).codec.decode(HTTPReply(status=200, body=PLAIN, headers={}), CALL).text == "Hello"


ANTHROPIC: list[dict[str, Any]] = [
    {"type": "message_start", "message": {"id": "msg", "model": "claude", "content": [], "usage": {"input_tokens": 3,
        "cache_read_input_tokens": 4, "cache_creation_input_tokens": 1, "output_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "x"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "ping"},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "He"}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "llo"}},
    {"type": "content_block_start", "index": 2, "content_block": {"type": "tool_use", "id": "t", "name": "f"}},
    {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"x"'}},
    {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": ": 1}"}},
    {"type": "content_block_start", "index": 3, "content_block":
        {"type": "tool_use", "id": "u", "name": "g", "input": {}}},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}},
    {"type": "message_stop"},
]  # fmt: skip


def named(chunks: list[dict[str, Any]]) -> bytes:
    return "".join([f"event: {chunk['type']}\ndata: {json.dumps(chunk)}\n\n" for chunk in chunks]).encode()


@pytest.mark.requirement("built 3: streams")
@pytest.mark.parametrize("step", [0, 3])
def test_anthropic_stream(step: int) -> None:
    """Blocks are joined; input includes caches, output is the last cumulative count."""
    deltas, whole = read("anthropic/m", named(ANTHROPIC), step=step)
    assert deltas == ["He", "llo"]
    assert (whole.text, whole.reasoning, whole.finish_reason, whole.id) == ("Hello", "hm", "tool_calls", "msg")
    assert [(c.id, c.name, c.arguments) for c in whole.tool_calls] == [("t", "f", '{"x": 1}'), ("u", "g", "{}")]
    assert (whole.usage.input_tokens, whole.usage.cached_tokens, whole.usage.output_tokens) == (8, 4, 9)


def block(index: int, start: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    more = [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
    return [{"type": "content_block_start", "index": index, "content_block": start}, *more]


@pytest.mark.requirement("built 3: an answer continues its conversation")
def test_a_streamed_answer_is_sent_back_unchanged() -> None:
    """Signatures, citations and the API's own blocks are collected too, in order."""
    chunks = [
        ANTHROPIC[0],
        *block(0, {"type": "thinking", "thinking": "", "signature": ""}, {"thinking": "h"}, {"thinking": "m"},
            {"signature": "si"}, {"signature": "g"}),
        *block(1, {"type": "redacted_thinking", "data": "enc"}),
        *block(2, {"type": "compaction", "content": None}, {"content": "so far"}),
        *block(3, {"type": "server_tool_use", "id": "s", "name": "q", "input": {}}, {"partial_json": '{"q": 1.0}'}),
        *block(4, {"type": "text", "text": ""}, {"citation": {"cited_text": "x"}}, {"text": "4"}),
        *block(5, {"type": "tool_use", "id": "t", "name": "f", "input": {}}, {"partial_json": '{"x"'},
            {"partial_json": ": 1}"}),
        *ANTHROPIC[-2:],
    ]  # fmt: skip
    whole = read("anthropic/m", named(chunks))[1]
    question = {"role": "user", "content": "Hi"}
    result = {"role": "tool", "tool_call_id": "t", "content": "1"}
    call = ChatCall(model="m", messages=normalise([question, whole, result]))
    sent = json.loads(resolve("anthropic/m", env={}).codec.encode(call).body)["messages"][1]["content"]
    assert sent == [
        {"type": "thinking", "thinking": "hm", "signature": "sig"},
        {"type": "redacted_thinking", "data": "enc"},
        {"type": "compaction", "content": "so far"},
        {"type": "server_tool_use", "id": "s", "name": "q", "input": {"q": 1.0}},
        {"type": "text", "text": "4", "citations": [{"cited_text": "x"}]},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}},
    ]


@pytest.mark.requirement("client 9: arguments that do not parse stay text")
def test_a_truncated_tool_input_is_kept() -> None:
    """The call holds the model's own text, even if it is not valid JSON; nothing is invented."""
    chunks = [
        ANTHROPIC[0],
        *block(0, {"type": "tool_use", "id": "t", "name": "f", "input": {}}, {"partial_json": '{"x": "Be'}),
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}},
    ]
    whole = read("anthropic/m", named(chunks))[1]
    assert [(call.arguments, whole.finish_reason) for call in whole.tool_calls] == [('{"x": "Be', "length")]


def test_anthropic_stream_that_fails() -> None:
    """An overloaded server reports an error in the middle, with status 200; a truncated stream has no stop reason."""
    fault = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    with pytest.raises(ServerError, match="Overloaded"):
        read("anthropic/m", named([ANTHROPIC[0], fault]))
    with pytest.raises(APIConnectionError):
        read("anthropic/m", named(ANTHROPIC[:9]))


def gemini(text: str | None = None, **more: Any) -> dict[str, Any]:
    parts = [{"text": text}] if text is not None else []
    return {"candidates": [{"content": {"role": "model", "parts": parts}, **more}], "modelVersion": "g"}


GEMINI: list[dict[str, Any]] = [
    {"candidates": [{"content": {"parts": [{"text": "hm", "thought": True}]}}]},
    gemini("He"),
    gemini("llo"),
    {"candidates": [{"content": {"parts": [
        {"functionCall": {"name": "f", "args": {"x": 1}}, "thoughtSignature": "s"}]}}]},
    {**gemini(finishReason="STOP"),
        "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 2, "thoughtsTokenCount": 4}},
]  # fmt: skip


@pytest.mark.requirement("built 3: streams")
@pytest.mark.parametrize("step", [0, 5])
def test_gemini_stream(step: int) -> None:
    """Parts are joined, thoughts are separate."""
    deltas, whole = read("gemini/m", events(*GEMINI, done=False), step=step)
    assert deltas == ["He", "llo"]
    assert (whole.text, whole.reasoning, whole.model) == ("Hello", "hm", "g")
    assert [(c.name, c.arguments, c.signature) for c in whole.tool_calls] == [("f", '{"x":1}', "s")]
    assert (whole.usage.input_tokens, whole.usage.output_tokens, whole.usage.reasoning_tokens) == (3, 6, 4)


def test_gemini_stream_as_an_array() -> None:
    """Without alt=sse the chunks are one JSON array."""
    assert read("gemini/m", json.dumps(GEMINI).encode())[1].text == "Hello"


def test_gemini_stream_that_fails() -> None:
    """A blocked prompt, an error in the middle and a truncated stream raise typed errors."""
    with pytest.raises(ContentFilterError, match="SAFETY"):
        read("gemini/m", events({"promptFeedback": {"blockReason": "SAFETY"}}, done=False))
    with pytest.raises(ServerError):
        read("gemini/m", events(gemini("a"), {"error": {"code": 503, "status": "UNAVAILABLE"}}, done=False))
    with pytest.raises(APIConnectionError):
        read("gemini/m", events(gemini("a"), done=False))


def test_events_follow_the_sse_rules() -> None:
    """Data lines are joined, unknown fields and comments are skipped, and the last event needs no empty line."""
    parser = EventParser()
    found = parser.feed(b"id: 1\nretry: 5\nevent: a\ndata: x\ndata:y\n\n:c\n\ndata: z")
    assert [*found, *parser.flush()] == [Event("a", b"x\ny"), Event("", b"z")]


ANTHROPIC_EVENTS = b"".join(
    b"event: " + str(data["type"]).encode() + b"\ndata: " + json.dumps(data).encode() + b"\n\n"
    for data in (
        {"type": "message_start", "message": {"id": "m", "content": []}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
    )
)
GEMINI_EVENTS = b'data: {"candidates": [{"content": {"parts": [{"text": "hi"}]}, "finishReason": "STOP"}]}\n\n'
OPENAI_EVENTS = b'data: {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}\n\n'
STREAMS = {"anthropic/m": ANTHROPIC_EVENTS, "gemini/m": GEMINI_EVENTS, "openai/m": OPENAI_EVENTS}


def read_whole(name: str, body: bytes, step: int = 7) -> Completion:
    reader = resolve(name, api_key="k", env={}).codec.stream(CALL)
    for start in range(0, len(body), step):
        reader.feed(body[start : start + step])
    return reader.finish(HTTPReply(status=200, body=body, headers={}))


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize(
    "change",
    [
        lambda body: body + b"data: [DONE]\n\n",
        lambda body: b"data:\n\n" + body.replace(b"\n\n", b"\n\ndata: \n\n", 1),
        lambda body: body.replace(b"\n", b"\r\n"),
        lambda body: body.replace(b"\n", b"\r"),
        lambda body: body.replace(b"\n\n", b"\n\n: ping\n\n"),
    ],
    ids=["[DONE]", "empty data", "CRLF", "CR", "comments"],
)
@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_streams_of_gateways(name: str, change: Callable[[bytes], bytes], step: int) -> None:
    """Any stream may end with [DONE], hold empty events and use any line ending, cut anywhere."""
    found = read_whole(name, change(STREAMS[name]), step)
    assert (found.text, found.finish_reason) == ("hi", "stop")


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_was_cut_in_its_first_bytes(name: str) -> None:
    """It raises a lost connection or a DecodeError, never a RecursionError."""
    for length in range(1, 40):
        with pytest.raises((APIConnectionError, DecodeError)):
            read_whole(name, STREAMS[name][:length])


def test_pieces_of_calls_under_wrong_indices_and_ids() -> None:
    """A piece without index and id continues the last call; a new id alone does not split a call."""
    pieces: list[dict[str, Any]] = [
        {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{"}},
        {"index": 0, "id": "other", "function": {"arguments": "}"}},
        {"index": 0, "id": "b", "function": {"name": "g", "arguments": '{"x"'}},
        {"index": 1, "function": {"arguments": ": 1}"}},
    ]
    chunks = [{"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    calls = read_whole("openai/m", body).tool_calls
    assert [(call.id, call.name, call.arguments) for call in calls] == [("a", "f", "{}"), ("b", "g", '{"x": 1}')]


@pytest.mark.parametrize(
    "pieces",
    [
        [("get_weather", ""), (None, "{"), (None, "}")],
        [("get_weather", ""), ("", "{"), ("", "}")],
        [("get_weather", "{"), ("get_weather", "}")],
        [("get_", ""), ("weather", ""), (None, "{}")],
        [("get_", ""), ("get_weather", ""), (None, "{}")],
    ],
    ids=["once", "empty", "again", "in pieces", "so far"],
)
def test_the_name_of_a_call_in_pieces_was_cut(pieces: list[tuple[str | None, str]]) -> None:
    """Before the arguments begin a name may come in pieces; later it may be repeated."""
    calls = [{"index": 0, "id": "a", "function": {"name": name, "arguments": text}} for name, text in pieces]
    body = events(*[delta(tool_calls=[call]) for call in calls], delta(finish="tool_calls"))
    (call,) = read("openai/m", body)[1].tool_calls
    assert (call.name, call.arguments) == ("get_weather", "{}")


def test_a_whole_message_after_its_deltas_was_added_to_them() -> None:
    """Some servers send deltas, and the message as a whole at the end; without deltas it is the answer."""
    whole = {"choices": [{"index": 0, "message": {"content": "Hello"}, "finish_reason": "stop"}]}
    assert read("openai/m", events(delta("He"), delta("llo"), whole))[0] == ["He", "llo"]
    assert read("openai/m", events(delta("He"), delta("llo"), whole))[1].text == "Hello"
    assert read("openai/m", events(whole))[1].text == "Hello"


def test_an_error_object_in_a_stream_was_a_lost_connection() -> None:
    """vLLM sends its error as an event of its own, without the field `error`."""
    error = {"object": "error", "message": "too many tokens", "type": "BadRequestError", "code": 400}
    with pytest.raises(BadRequestError, match="too many tokens"):
        read("openai/m", events(delta("He"), error))
    with pytest.raises(ResponseError, match="the upstream is gone"):
        read("openai/m", events({"detail": "the upstream is gone"}, done=False))


@pytest.mark.parametrize(
    ("content", "text", "reasoning"),
    [
        ("two and two</think>\n\n4", "4", "two and two"),
        ("</think>\n\n4", "4", None),
        ("<thinking>two and two</thinking>4", "4", "two and two"),
        ("[THINK]two and two[/THINK]4", "4", "two and two"),
        ("[1, 2]", "[1, 2]", None),
        (
            "<|channel|>analysis<|message|>two and two<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
            "4",
            "two and two",
        ),
        ("<|channel|>analysis<|message|>two and", "", "two and"),
        ("a < b", "a < b", None),
    ],
)
def test_thinking_stayed_in_the_text(content: str, text: str, reasoning: str | None) -> None:
    """Thinking is never part of the text, whatever tag encloses it."""
    body = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
    codec = resolve("openai/m", api_key="k", env={}).codec
    found = codec.decode(HTTPReply(status=200, body=json.dumps(body).encode(), headers={}), CALL)
    assert (found.text, found.reasoning) == (text, reasoning)
    chunk = {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": "stop"}]}
    streamed = read_whole("openai/m", b"data: " + json.dumps(chunk).encode() + b"\n\n")
    assert (streamed.text, streamed.reasoning) == (text, reasoning)
