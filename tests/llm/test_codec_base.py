"""What `JSONCodec` does for a custom provider, and what a codec declares for the rest of the client."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from aggregator.cassettes.exchanges import Exchange, Facts
from aggregator.cassettes.redaction import redact_line, redact_request
from aggregator.errors import ContextLengthError, DecodeError, EmptyResponseError
from aggregator.llm.calls import ChatCall, Limits, RateHeaders, Target
from aggregator.llm.codecs.base import JSONCodec, words
from aggregator.llm.codecs.failures import Headroom, headroom
from aggregator.llm.names import resolve
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, Usage

CALL = ChatCall(model="m", messages=({"role": "user", "content": "Hi"},))


class Reply(msgspec.Struct):
    text: str | None = None
    why: str | None = None


class Acme(JSONCodec[Reply]):
    """A codec of its own format, as a third party would write it."""

    decoder = msgspec.json.Decoder(Reply)
    finish_words = words(stop="DONE", length="CUT")
    requests = (RateHeaders("x-acme-left", "x-acme-limit"),)
    limit_fields = ("options.most",)
    kept_headers = ("x-acme-*",)

    def encode(self, call: ChatCall) -> HTTPRequest:
        return self.post(f"{self.target.base_url}/ask", {"q": call.messages[-1]["content"], **call.extra}, call)

    def completion(self, answer: Reply, reply: HTTPReply) -> Completion:
        if answer.text is None:
            raise self.empty("a text", reply)
        choice = Choice(message=Message(content=answer.text), finish_reason=self.finish_reason(answer.why))
        return self.completed(reply, [choice], usage=Usage())


def codec(key: Any = "acme-key-123456") -> Acme:
    return Acme(Target(provider="acme", model="m", base_url="https://acme.example", api_key=key))


def reply(body: Any, status: int = 200) -> HTTPReply:
    return HTTPReply(status=status, body=body if isinstance(body, bytes) else msgspec.json.encode(body), headers={})


@pytest.mark.parametrize(("word", "reason"), [("DONE", "stop"), ("done", "stop"), ("CUT", "length"), (None, "stop")])
def test_finish_words_of_a_codec(word: str | None, reason: str) -> None:
    """A codec declares its finish reasons, in any case; a missing one is `stop`."""
    assert codec().decode(reply({"text": "x", "why": word}), CALL).finish_reason == reason


@pytest.mark.parametrize("word", ["ERROR_TOXIC", "network_error", "insufficient_system_resource", "abort", "new"])
@pytest.mark.parametrize("name", ["openai/m", "anthropic/m", "gemini/m"])
def test_an_unknown_finish_word_was_read_as_stop(name: str, word: str) -> None:
    """An unknown finish reason is not a success."""
    bodies = {
        "openai/m": {"choices": [{"message": {"content": "x"}, "finish_reason": word}]},
        "anthropic/m": {"content": [{"type": "text", "text": "x"}], "stop_reason": word},
        "gemini/m": {"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": word}]},
    }
    found = resolve(name, api_key="k", env={}).codec.decode(reply(bodies[name]), CALL)
    assert (found.finish_reason, found.raw_finish_reason) == ("error", word)


def test_errors_and_odd_bodies_are_read_without_the_codecs_help() -> None:
    """Error statuses, HTML pages and empty answers get their class and message."""
    error = codec().error(reply({"error": {"message": "too long", "code": "context_length_exceeded"}}, 400))
    assert isinstance(error, ContextLengthError)
    assert "acme answered 400 (context_length_exceeded): too long" in str(error)
    with pytest.raises(DecodeError, match="Expected a JSON body, got '<html>"):
        codec().decode(reply(b"<html>Bad gateway</html>"), CALL)
    with pytest.raises(EmptyResponseError, match="Expected a text from acme, got none"):
        codec().decode(reply({}), CALL)


@pytest.mark.parametrize("key", ["acme-key-123456", lambda: "acme-key-123456"])
def test_a_page_that_quotes_the_key(key: Any) -> None:
    """The key is not in the excerpt of an unreadable answer, nor in a request's repr."""
    made = codec(key)
    assert "acme-key" not in repr(made.encode(CALL))
    for body in (b"<html>no such key: acme-key-123456</html>", b'{"note": "acme-key-123456"}'):
        with pytest.raises((DecodeError, EmptyResponseError)) as caught:
            made.decode(reply(body), CALL)
        assert "acme-key" not in str(caught.value)


def test_limits_in_extra_under_the_providers_own_names() -> None:
    """The budget reads the limit from the body that is sent."""
    limits = codec().limits
    assert limits(replace(CALL, max_tokens=7, n=2)) == Limits(7, 2)
    assert limits(replace(CALL, max_tokens=7, extra={"options": {"most": 100}})) == Limits(100, 1)
    assert limits(replace(CALL, max_tokens=-1, extra={"max_tokens": 100})) == Limits(None, 1)


def test_rate_limits_without_a_reset_count_per_minute() -> None:
    """A server that names no reset, such as Azure and Mistral, refills its limit within a minute."""
    assert headroom({"x-acme-left": "0", "x-acme-limit": "120"}, Acme.requests) == Headroom(0.0, 0.5)
    assert headroom({"x-acme-left": "0"}, Acme.requests) is None


def test_a_codec_names_headers_that_a_recording_keeps() -> None:
    """Only headers on an allow list are recorded; a codec can add to it, for requests and replies."""
    headers = {"x-acme-region": "eu", "x-other": "secret", "x-ratelimit-remaining-requests": "3"}
    request = codec().encode(CALL)
    answer = HTTPReply(status=200, body=b"{}", headers=headers)
    for asked, wanted in (
        (replace(request, kept=()), {"x-ratelimit-remaining-requests"}),
        (request, {"x-ratelimit-remaining-requests", "x-acme-region"}),
    ):
        written = redact_line(Exchange(request=redact_request(asked), reply=answer, facts=Facts(lineage="")))
        assert {header for header in headers if header.encode() in written} == wanted
