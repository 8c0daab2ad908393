"""Messages as callers write them, in OpenAI's shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aggregator.errors import ConfigError
from aggregator.llm.messages import Image, as_data, normalise, text_of
from aggregator.records import Choice, Completion, Message, ToolCall

USER = {"role": "user", "content": "Hi"}


class Dumpable:
    """A message object with `model_dump`, like an SDK's."""

    def model_dump(self, *, exclude_none: bool) -> dict[str, Any]:
        return {"role": "assistant", "content": "Hi"}


@pytest.mark.parametrize("given", ["Hi", USER, [USER], ["Hi"], iter([USER])])
def test_a_text_or_one_message_is_a_conversation(given: Any) -> None:
    """A string is a user message; a single message need not be in a list."""
    assert normalise(given) == (USER,)


@pytest.mark.requirement("built 3: text and images")
def test_content_in_parts() -> None:
    """Texts, images by URL or bytes, and raw image bytes become OpenAI's parts."""
    content = ["Look", Image("https://x/y.png", detail="low"), b"\xff\xd8\xff", {"type": "image_url", "image_url": "u"}]
    (message,) = normalise([{"role": "user", "content": content}])
    assert message["content"] == [
        {"type": "text", "text": "Look"},
        {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/"}},
        {"type": "image_url", "image_url": {"url": "u"}},
    ]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x89PNG\r\n", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\x00\x00\x00\x00WEBP", "image/webp"),
    ],
)
def test_the_media_type_is_read_from_the_bytes(data: bytes, kind: str) -> None:
    """The first bytes determine the media type."""
    assert Image(data).url.startswith(f"data:{kind};base64,")


def test_an_unknown_image_needs_its_media_type() -> None:
    """Other bytes are refused unless their media type is given."""
    with pytest.raises(ConfigError, match="media_type"):
        normalise([{"role": "user", "content": [b"%PDF"]}])
    assert Image(b"%PDF", media_type="application/pdf").url == "data:application/pdf;base64,JVBERg=="


def test_answers_are_sent_back_unchanged() -> None:
    """A Completion, its message or an SDK's message continues the conversation, without its thinking."""
    message = Message(content="a", reasoning="hm", tool_calls=(ToolCall(id="t", name="f", arguments="{}"),))
    turn = {
        "role": "assistant",
        "content": "a",
        "tool_calls": [{"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    assert normalise([message, Completion(choices=(Choice(message=message),))]) == (turn, turn)
    assert normalise([Dumpable()]) == ({"role": "assistant", "content": "Hi"},)


def test_the_callers_messages_are_not_changed() -> None:
    """Normalising copies the messages that it changes."""
    given = [{"role": "user", "content": ["Look"]}]
    normalise(given)
    assert given == [{"role": "user", "content": ["Look"]}]


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ([], "at least one"),
        (5, "list of dicts"),
        (b"Hi", "list of dicts"),
        ([5], r"\$\.messages\[0\]"),
        ([USER, {"role": "robot", "content": "x"}], r"\$\.messages\[1\]\.role"),
        ([{"content": "x"}], r"\$\.messages\[0\]\.role"),
        ([{"role": "user", "content": 5}], r"\$\.messages\[0\]\.content"),
        ([{"role": "user", "content": ["a", 5]}], r"\$\.messages\[0\]\.content\[1\]"),
        ([{"role": "user", "content": [{"text": "a"}]}], r"\$\.messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], r"\$\.messages\[0\]\.content\[0\]\.text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"\$\.messages\[0\]\.content\[0\]\.image_url"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}], r"\.image_url"),
        ([USER, {"role": "assistant", "tool_calls": "f"}], r"\$\.messages\[1\]\.tool_calls"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": {"a": 1}}], r"\$\.messages\[1\]\.tool_calls"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": ["f"]}], r"\.tool_calls\[0\]"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": "f"}]}], r"\.tool_calls\[0\]"),
    ],
)
def test_an_invalid_message_is_refused_with_its_path(given: Any, where: str) -> None:
    """The error gives the path of the invalid part."""
    with pytest.raises(ConfigError, match=where):
        normalise(given)


def test_data_urls() -> None:
    """Only a base64 data: URL is decoded."""
    assert as_data("data:image/png;base64,AAAA") == ("image/png", "AAAA")
    assert as_data("https://x/data:y;base64,z") is None


def test_text_of_content() -> None:
    """The text alone is returned, without other parts."""
    assert text_of(["a", {"type": "image_url", "image_url": {"url": "u"}}, {"type": "text", "text": "b"}]) == "ab"
    assert text_of(None) == ""


def test_tool_calls_may_be_our_records_and_an_sdks() -> None:
    """All are sent in OpenAI's shape."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    sdk = SimpleNamespace(model_dump=lambda **_: call)
    for given in (call, sdk, ToolCall(id="1", name="f", arguments="{}")):
        (turn,) = normalise([{"role": "assistant", "content": "", "tool_calls": [given]}])
        assert turn["tool_calls"] == [call]
