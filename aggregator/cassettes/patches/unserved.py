"""Clients that no cassette can serve: their calls are refused while one plays, and pass unseen while one records."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from aggregator.cassettes.traffic import refuse
from aggregator.patching import Patch


def _refusing(original: Callable[..., Any], *, client: str) -> Callable[..., Any]:
    """Raise where the function would reach the network while a tape plays."""
    if inspect.iscoroutinefunction(original):

        @wraps(original)
        async def guarded_async(*args: Any, **kwargs: Any) -> Any:
            if (refusal := refuse(client, "a connection", "")) is not None:
                raise refusal
            return await original(*args, **kwargs)

        return guarded_async

    @wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if (refusal := refuse(client, "a connection", "")) is not None:
            raise refusal
        return original(*args, **kwargs)

    return guarded


_CALLS = tuple(
    f"_{asked}{answered}MultiCallable.{name}"
    for asked in ("Unary", "Stream", "SingleThreadedUnary")
    for answered in ("Unary", "Stream")
    for name in ("__call__", "with_call", "future")
)
_FUNCTIONS = {
    "websockets": (
        ("websockets.asyncio.client", "connect.create_connection"),
        ("websockets.asyncio.client", "ClientConnection.handshake"),
        ("websockets.sync.client", "connect"),
        ("websockets.sync.client", "ClientConnection.handshake"),
        ("websockets.legacy.client", "Connect.__init__"),
        ("websocket._core", "WebSocket.connect"),
        ("tornado.websocket", "websocket_connect"),
        ("tornado.websocket", "WebSocketClientConnection.__init__"),
    ),
    "grpc": (
        *(("grpc._channel", call) for call in _CALLS),
        *(("grpc.aio._channel", call.removeprefix("_")) for call in _CALLS),
    ),
    "curl_cffi": (("curl_cffi.curl", "Curl.perform"), ("curl_cffi.aio", "AsyncCurl.add_handle")),
    "niquests": (("niquests.sessions", "Session.send"), ("niquests.async_session", "AsyncSession.send")),
    "httpcore": (),
}

PATCHES = tuple(
    Patch(module, path, partial(_refusing, client=client))
    for client, functions in _FUNCTIONS.items()
    for module, path in functions
)
