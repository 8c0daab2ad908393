"""Other HTTP clients on our tape: one file per client, whose patches are installed once for any number of open tapes.

vcrpy replaces classes for the whole process and gives each patch one cassette, so two cassettes in two tasks mix, and a
connection under construction removes the patches from every thread. Here functions are replaced, and each call decides
by its context whether a tape records it, and which. Existing connections are recorded as well.

May import what `cassettes` may. A client is imported only by functions that run after the user has imported it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from aggregator.cassettes.patches.aiohttp import PATCHES as AIOHTTP
from aggregator.cassettes.patches.httpx import PATCHES as HTTPX
from aggregator.cassettes.patches.lm15 import PATCHES as LM15
from aggregator.cassettes.patches.stdlib import PATCHES as STDLIB
from aggregator.cassettes.patches.tornado import PATCHES as TORNADO
from aggregator.cassettes.patches.urllib3 import PATCHES as URLLIB3
from aggregator.cassettes.traffic import refuse
from aggregator.patching import Patch, Patches


def _refusing(original: Callable[..., Any], *, client: str) -> Callable[..., Any]:
    """Raise if the function would reach the network while a tape plays."""
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
        ("websockets.asyncio.client", "connect.create_connection"),  # up to version 16
        ("websockets.asyncio.client", "connect.open_tcp_connection"),
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
    "httpcore": tuple(
        (module, path)
        for module in ("httpcore", "httpcore2")
        for path in ("ConnectionPool.handle_request", "AsyncConnectionPool.handle_async_request")
    ),
    "pyreqwest": tuple(
        ("pyreqwest.request", path)
        for path in (
            *("ConsumedRequest.send", "SyncConsumedRequest.send", "OneOffRequestBuilder.send"),
            *("SyncOneOffRequestBuilder.send", "StreamRequest.__aenter__", "SyncStreamRequest.__enter__"),
        )
    ),
    "twisted": (("twisted.web.client", "_AgentBase._requestWithEndpoint"),),
    "geventhttpclient": (("geventhttpclient.client", "HTTPClient.request"),),
    "aiosonic": (("aiosonic.client", "HTTPClient.request"),),
    "niquests": (("niquests.sessions", "Session.send"), ("niquests.async_session", "AsyncSession.send")),
}

UNSERVED = tuple(
    Patch(module, path, partial(_refusing, client=client))
    for client, functions in _FUNCTIONS.items()
    for module, path in functions
)


_patches = Patches((*AIOHTTP, *HTTPX, *LM15, *STDLIB, *TORNADO, *URLLIB3, *UNSERVED))


@contextmanager
def patched() -> Iterator[None]:
    """Hold the patches of every client during a block; a client that is imported later is patched then.

    Calls outside a tape with `clients=` and outside `observing` are not affected.
    """
    _patches.hold()
    try:
        yield
    finally:
        _patches.release()
