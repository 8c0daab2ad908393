"""tornado's AsyncHTTPClient, both of its engines; redirects are followed by tornado, and recorded as one answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from io import BytesIO
from typing import Any

from aggregator.cassettes.clients import headers_of, kind_of, standard_error, to_request
from aggregator.cassettes.lineage import passing
from aggregator.cassettes.tape import RecordedError
from aggregator.cassettes.traffic import Turn, begin, is_wanted, leaves_out
from aggregator.errors import CassetteError
from aggregator.patching import Patch

CLIENT = "tornado"
_EFFECTIVE = "X-Effective-Url"  # the final address after redirects, kept with the answer
_FAILED = 599  # tornado's status of an attempt without an answer


def _response(client: Any, request: Any, code: int, **known: Any) -> Any:
    from tornado.httpclient import HTTPResponse

    return HTTPResponse(request, code, request_time=client.io_loop.time() - request.start_time, **known)


def _raised(failure: RecordedError) -> BaseException:
    from tornado import httpclient, simple_httpclient

    home, _, name = failure.kind.rpartition(".")
    kind = getattr(simple_httpclient, name, None) if home == "tornado" else None
    if isinstance(kind, type) and issubclass(kind, httpclient.HTTPError):
        message = failure.message.removeprefix(f"HTTP {_FAILED}: ")
        timed_out = kind is not simple_httpclient.HTTPStreamClosedError
        return (simple_httpclient.HTTPTimeoutError if timed_out else simple_httpclient.HTTPStreamClosedError)(message)
    return standard_error(failure.kind, failure.message)


def _answer(client: Any, turn: Turn, request: Any, callback: Callable[[Any], None]) -> None:
    """Deliver the tape's answer, in a later iteration of the event loop and after the recorded time."""
    from tornado.httputil import HTTPHeaders

    if turn.failure is not None:
        response = _response(client, request, _FAILED, error=_raised(turn.failure))
    else:
        reply = turn.reply
        assert reply is not None  # otherwise it is live
        headers = HTTPHeaders()
        for name, value in headers_of(reply, turn.request.method, titled=True):
            headers.add(name, value)
        body = BytesIO(reply.body)
        if request.header_callback is not None:
            for name, value in headers.get_all():
                request.header_callback(f"{name}: {value}\r\n")
            request.header_callback("\r\n")
        if request.streaming_callback is not None:
            request.streaming_callback(reply.body)
            body = BytesIO()
        response = _response(
            client,
            request,
            reply.status,
            reason=reply.reason or None,
            headers=headers,
            buffer=body,
            effective_url=headers.pop(_EFFECTIVE, request.url),
        )
    client.io_loop.call_later(turn.delay, callback, response)


def _fetch_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def fetch_impl(self: Any, request: Any, callback: Callable[[Any], None]) -> Any:
        if not is_wanted(CLIENT):
            return original(self, request, callback)
        if leaves_out(CLIENT, request.url):
            with passing():
                return original(self, request, callback)
        if request.body_producer is not None:
            error = CassetteError(
                f"Expected a body given as bytes, got a body_producer - at {request.url}; a cassette cannot read it"
            )
            return callback(_response(self, request, _FAILED, error=error))
        try:
            turn = begin(CLIENT, to_request(request.method, request.url, request.body, request.headers))
        except Exception as error:  # noqa: BLE001 - a miss, or a refusal: fetch raises it from the response
            return callback(_response(self, request, _FAILED, error=error))
        if turn.failure is not None or turn.reply is not None:
            return _answer(self, turn, request, callback)
        return _send(self, original, turn, request, callback)

    return fetch_impl


def _send(client: Any, original: Callable[..., Any], turn: Turn, request: Any, callback: Callable[[Any], None]) -> Any:
    """Send a request, and record its answer before it is delivered."""
    streamed = request.streaming_callback
    pieces: list[bytes] = []
    if streamed is not None:
        request.streaming_callback = pieces.append

    def received(response: Any) -> None:
        request.streaming_callback = streamed
        content = b"".join(pieces) if streamed is not None else (response.body or b"")
        try:
            if response.code == _FAILED and response.error is not None:
                turn.fail(kind_of(response.error, "tornado"), str(response.error))
            else:
                led = [(_EFFECTIVE, response.effective_url)] if response.effective_url != request.url else []
                headers = [*response.headers.get_all(), *led]
                turn.finish(turn.answer(response.code, response.reason, headers, content))
        except CassetteError as error:
            response = _response(client, request, _FAILED, error=error)
        else:
            if streamed is not None and content:
                streamed(content)
        callback(response)

    with passing():
        return original(client, request, received)


PATCHES = (
    Patch("tornado.simple_httpclient", "SimpleAsyncHTTPClient.fetch_impl", _fetch_impl),
    Patch("tornado.curl_httpclient", "CurlAsyncHTTPClient.fetch_impl", _fetch_impl),
)
