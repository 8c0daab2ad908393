"""Error answers of every provider: class, code, message, request id, waiting time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    ContextLengthError,
    NotFoundError,
    PermissionDeniedError,
    QuotaError,
    RateLimitError,
    ServerError,
)
from aggregator.llm.codecs.failures import read_fault, retry_after, should_retry, status_error
from aggregator.records import HTTPReply


def error(status: int, body: Any = b"", reason: str = "", **headers: str) -> APIStatusError:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return status_error(HTTPReply(status=status, body=data, headers=names, reason=reason), "openai")


@pytest.mark.requirement("client 8: a class for each kind")
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (301, APIStatusError),
        (400, BadRequestError),
        (401, AuthenticationError),
        (402, QuotaError),
        (403, PermissionDeniedError),
        (404, NotFoundError),
        (405, BadRequestError),
        (408, ServerError),
        (409, ServerError),
        (413, BadRequestError),
        (422, BadRequestError),
        (429, RateLimitError),
        (500, ServerError),
        (503, ServerError),
        (529, ServerError),
        (599, ServerError),
    ],
)
def test_class_follows_from_the_status(status: int, kind: type[APIStatusError]) -> None:
    """Each status has its class, and an empty body still gives a message."""
    found = error(status)
    assert type(found) is kind
    assert found.status == status
    assert not found.message.endswith(": ")


@pytest.mark.requirement("client 8: message and code of every shape, numbers too")
@pytest.mark.parametrize(
    ("status", "body", "words", "code"),
    [
        (400, {"error": {"message": "m", "type": "bad_request", "param": None, "code": None}}, "m", "bad_request"),
        (404, {"error": {"message": "m", "type": "t", "code": "model_not_found"}}, "m", "model_not_found"),
        (400, {"error": {"code": 400, "message": "m", "type": "exceed", "n_ctx": 5}}, "m", "exceed"),
        (500, {"error": "m"}, "m", None),
        (401, {"detail": "m"}, "m", None),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "m", "type": "missing"}]}, "m at body.n", None),
        (400, {"code": 400, "message": "m", "type": "Bad Request"}, "m", "Bad Request"),
        (400, {"object": "error", "message": "m", "type": "x", "code": "3051", "raw_status_code": 400}, "m", "x"),
        (422, {"object": "error", "message": {"detail": [{"msg": "m", "loc": ["a"]}]}, "code": "9"}, "m at a", "9"),
        (404, {"code": "not found", "error": "m"}, "m", "not found"),
        (400, {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}, "m", "overloaded_error"),
        (400, {"error": {"code": 400, "message": "m", "status": "INVALID_ARGUMENT"}}, "m", "INVALID_ARGUMENT"),
        (400, [{"error": {"code": 400, "message": "m", "status": "INVALID_ARGUMENT"}}], "m", "INVALID_ARGUMENT"),
        (502, {"error": {"message": "Provider failed", "metadata": {"raw": '{"error": {"message": "m"}}'}}}, "m", None),
        (502, {"error": {"message": "Provider failed", "metadata": {"raw": "upstream"}}}, "d: upstream", None),
        (400, {"success": False, "errors": [{"code": 7009, "message": "m"}]}, "m", "7009"),
        (429, {"error": {"code": 8, "message": "m"}}, "m", "8"),
        (429, {"error": {"code": 429, "message": "m"}}, "m", None),
        (400, {"error": {"code": True, "message": "m"}}, "m", None),
        (400, {"error": {"message": "m", "failed_generation": "<f>", "code": "tool_failed"}}, "m", "tool_failed"),
        (400, {"errors": ["m", "n"]}, "m; n", None),
        (500, {"error": {"error": {"message": "m"}}}, "m", None),
        (400, b'data: {"error": {"message": "m"}}\n\n', "m", None),
        (400, b'event: error\ndata: {"error": {"message": "m"}}\n\n', "m", None),
        (502, b"<html><head><title>502 m</title></head><body>x</body></html>", "502 m", None),
        (502, b"<h1>m</h1>", "m", None),
        (500, b"Internal m", "Internal m", None),
        (500, b'"m"', "m", None),
        (500, b"\xff\xfe", "\ufffd", None),
    ],
)  # fmt: skip
def test_message_and_code_of_every_shape(status: int, body: Any, words: str, code: str | None) -> None:
    """The message is found under any name and at any depth; a number is the code if there is no name."""
    found = error(status, body)
    assert words in found.message
    assert found.code == code


@pytest.mark.requirement("client 8: words even without a body")
@pytest.mark.parametrize("body", [b"", b"{}", b"null", b"[]", b'{"error": {}}', b'{"error": null}', b"{cut", b"12"])
def test_a_body_without_a_message(body: bytes) -> None:
    """The status line is used if the body has no message."""
    found = error(500, body, reason="Internal Server Error")
    assert type(found) is ServerError
    assert len(found.message) > len("openai answered 500: ")


@pytest.mark.requirement("client 8: a class for each kind")
@pytest.mark.parametrize(
    ("status", "error_body"),
    [
        (400, {"code": "context_length_exceeded", "message": "x"}),
        (400, {"type": "exceed_context_size_error", "code": 400, "message": "x"}),
        (400, {"message": "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens"}),
        (400, {"type": "invalid_request_error", "message": "prompt is too long: 210000 tokens > 200000 maximum"}),
        (400, {"message": "input length and `max_tokens` exceed context limit: 199000 + 4096 > 200000"}),
        (400, {"status": "INVALID_ARGUMENT", "message": "The input token count (9) exceeds the maximum"}),
        (400, {"message": "the request exceeds the available context size, try increasing it"}),
        (422, {"message": "Prompt contains 40000 tokens, too large for model with 32768 maximum context length"}),
        (413, {"message": "Please reduce the length of the messages"}),
    ],
)  # fmt: skip
def test_a_prompt_that_does_not_fit(status: int, error_body: Any) -> None:
    """Each provider's message for a full context raises ContextLengthError."""
    assert type(error(status, {"error": error_body})) is ContextLengthError


@pytest.mark.parametrize(
    "message",
    [
        "Unsupported parameter: 'stop'",
        "The context is not valid JSON",
        "max_tokens is too large",
        "temperature exceeds 2",
    ],
)
def test_other_bad_requests_are_not_context_overflows(message: str) -> None:
    """Similar messages are still a BadRequestError."""
    assert type(error(400, {"error": {"message": message}})) is BadRequestError


@pytest.mark.requirement("client 8: a class for each kind")
def test_quota_is_distinguished_from_rate() -> None:
    """`insufficient_quota` is permanent; Gemini's RESOURCE_EXHAUSTED, with nearly the same message, is not."""
    quota = {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}
    gemini = {"code": 429, "message": "You exceeded your current quota", "status": "RESOURCE_EXHAUSTED"}
    assert type(error(429, {"error": quota})) is QuotaError
    assert type(error(429, {"error": gemini})) is RateLimitError


@pytest.mark.requirement("client 3: Retry-After in ms, seconds, fractions, as a date; 0 is absent")
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "0"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "200"}, 0.2),
        ({"retry-after-ms": "0", "retry-after": "1"}, 1.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:27:00 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None),
    ],
)
def test_how_long_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    """Milliseconds, seconds, fractions and dates (by the server's clock) are read; zero and nonsense are ignored."""
    assert retry_after(headers) == seconds


@pytest.mark.requirement("client 3: Gemini's retryDelay")
def test_geminis_wait_is_in_the_body() -> None:
    """RetryInfo's retryDelay is used if no header gives a wait."""
    details = [{"@type": "type.googleapis.com/google.rpc.QuotaFailure"}, {"retryDelay": "48.5s"}]
    body = {"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED", "details": details}}
    assert error(429, body).retry_after == 48.5
    assert error(429, body, retry_after="3").retry_after == 3.0


@pytest.mark.requirement("client 8: request id")
@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ({"x_request_id": "a", "request_id": "b"}, {}, "a"),
        ({"request_id": "b"}, {}, "b"),
        ({"apim_request_id": "c"}, {}, "c"),
        ({}, {"request_id": "d", "error": {"message": "m"}}, "d"),
        ({}, {"request_id": None, "error": {"message": "m"}}, None),
    ],
)
def test_request_id(headers: dict[str, str], body: Any, expected: str | None) -> None:
    """The id is read from OpenAI's, Anthropic's and Azure's headers, or from the body."""
    assert error(400, body, **headers).request_id == expected


@pytest.mark.requirement("client 3: x-should-retry")
@pytest.mark.parametrize(("value", "expected"), [("true", True), ("false", False), ("", None), ("maybe", None)])
def test_should_retry(value: str, expected: bool | None) -> None:
    """`x-should-retry` is true, false or absent."""
    assert should_retry({"x-should-retry": value}) is expected


def test_a_redirect_error_names_the_remedy() -> None:
    """A redirect is not followed, because a POST would become a GET: the message gives the new address."""
    found = error(307, b"", location="https://other.example/v1")
    assert "https://other.example/v1" in found.message
    assert "base_url" in found.message


def test_secrets_are_masked_in_messages() -> None:
    """A key that the server quotes is replaced by stars."""
    reply = HTTPReply(status=401, body=b'{"error": "bad key sk-1"}', headers={})
    assert "sk-1" not in status_error(reply, "openai", ("sk-1",)).message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "message", "detail", "code", "type", "metadata", "details", "loc"]), inner
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_no_error_body_breaks_the_reading(body: Any) -> None:
    """Any JSON body gives an error with the status's class and a message."""
    assert error(400, body).message.strip(": ")
    assert type(error(500, body)) is ServerError


@given(st.binary(max_size=60))
def test_no_bytes_break_the_reading(body: bytes) -> None:
    """Any bytes that are not JSON do, too."""
    assert isinstance(read_fault(body).message, str)
