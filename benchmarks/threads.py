"""Other clients in threads: calls that go live while a cassette plays, and what a call costs from it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from benchmarks import traffic
from benchmarks.harness import Case, Clock, Measured, call
from benchmarks.report import Row, Target

THREADS, CALLS, ROUNDS = 16, 64, 100
CLIENTS = ("requests", "Session", "urllib3", "urllib", "httplib2", "boto3", "httpx")
AWS = {
    "region_name": "us-east-1",
    "aws_access_key_id": "AKIANOTAREALKEY00000",
    "aws_secret_access_key": "not-a-real-secret-not-a-real-secret-0000",
}
BEDROCK = "http://127.0.0.1:9"
Ask = Callable[[bytes], bytes]


def cases(path: str, folder: str, n: int) -> list[Case]:
    """What a call costs from 16 threads, and what it costs where nothing but the client does something."""
    bedrock = str(Path(folder) / f"bedrock-{n}.yaml")
    return [
        Case(f"{name} {n}", call("threads", "replay", path=file, n=n, client=client, is_bare=is_bare))
        for client, file in (("Session", path), ("boto3", bedrock))
        for name, is_bare in (
            (f"{client}, {THREADS} threads, patched", False),
            (f"{client}, {THREADS} threads, answered at once", True),
        )
    ]


def live_cases(*, quick: bool) -> list[Case]:
    """Calls of each client that reach the server in mode none."""
    return [
        Case(f"{client}: live calls", call("threads", "live", client=client, rounds=2 if quick else ROUNDS))
        for client in CLIENTS
    ]


def rows(measured: Measured, n: int) -> list[Row]:
    """What the cassette adds to a client's own work."""
    return [Row(f"{client}, {THREADS} threads: of ours {n}", {"cpu_us": added(measured, client, n)}) for client in OURS]


OURS = ("Session", "boto3")


def added(measured: Measured, client: str, n: int) -> float | None:
    """CPU microseconds a call beyond what the client takes by itself."""
    patched = measured.median(f"{client}, {THREADS} threads, patched {n}", "cpu_us")
    bare = measured.median(f"{client}, {THREADS} threads, answered at once {n}", "cpu_us")
    return None if patched is None or bare is None else patched - bare


def targets(measured: Measured, live: Measured, n: int) -> list[Target]:
    """No call goes live; a call of requests or boto3 costs at most 150 us of ours."""
    known = [one for client in CLIENTS if (one := live.median(f"{client}: live calls", "live")) is not None]
    return [
        Target(f"live calls of {CALLS} by {THREADS} threads, all clients and rounds", sum(known), 0.0, "calls"),
        *(
            Target(f"{client} by {THREADS} threads, of ours at {n}", added(measured, client, n), 150.0, "us")
            for client in OURS
        ),
    ]


# What runs in the processes ------------------------------------------------------------------------------------------


def client_of(name: str, url: str, stack: ExitStack) -> Ask:
    """Return a function that posts a body; `stack` closes what it has open."""
    import boto3  # type: ignore[import-untyped] # no type information
    import httplib2
    import httpx
    import requests
    import urllib3

    if name == "boto3":
        client = boto3.session.Session().client("bedrock-runtime", endpoint_url=url.partition("/v1")[0], **AWS)
        stack.callback(client.close)
        return lambda body: bytes(client.invoke_model(modelId="m", body=body)["body"].read())
    session = stack.enter_context(requests.Session())
    session.trust_env = False
    pool = urllib3.PoolManager(maxsize=THREADS)
    stack.callback(pool.clear)
    own = stack.enter_context(httpx.Client(trust_env=False))
    opener = build_opener(ProxyHandler({}))
    headers = traffic.REQUEST_HEADERS
    asks: dict[str, Ask] = {
        "requests": lambda body: requests.post(url, data=body, headers=headers, timeout=30).content,
        "Session": lambda body: session.post(url, data=body, headers=headers).content,
        "urllib3": lambda body: pool.request("POST", url, body=body, headers=headers).data,
        "urllib": lambda body: bytes(opener.open(Request(url, body, headers)).read()),
        "httplib2": lambda body: bytes(httplib2.Http().request(url, "POST", body, headers)[1]),
        "httpx": lambda body: own.post(url, content=body, headers=headers).content,
    }
    return asks[name]


def by_threads(ask: Ask, bodies: list[bytes]) -> list[bytes]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(ask, bodies))


def record_bedrock(path: str, n: int) -> None:
    """Record n answers of Bedrock, without a server."""
    from aggregator import cassette
    from aggregator.cassettes.clients import to_reply, to_request
    from aggregator.cassettes.traffic import begin

    with cassette(path, "all", clients="boto3", layout="journal"):
        for i in range(n):
            turn = begin("boto3", to_request("POST", f"{BEDROCK}/model/m/invoke", traffic.body(i), {}))
            turn.finish(to_reply(200, "OK", traffic.REPLY_HEADERS.items(), traffic.answer(i)))


def replay(path: str, n: int, client: str, is_bare: bool) -> dict[str, float]:
    """Ask each exchange once, from 16 threads; `is_bare`: answered within the client, without a cassette."""
    from aggregator import cassette
    from aggregator.cassettes import storage

    storage.SHARD_BYTES = 1 << 40
    if client == "boto3" and not is_bare:
        record_bedrock(path, n)
    bodies = [traffic.body(i) for i in range(n)]
    opened: Any = nullcontext() if is_bare else cassette(path, "none", clients="all", warn=False)
    with ExitStack() as stack:
        ask = client_of(client, BEDROCK if client == "boto3" else traffic.URL, stack)
        if is_bare:
            answer_at_once()
        with opened:
            ask(bodies.pop() if client == "boto3" else traffic.body(n))
            with Clock() as clock:
                by_threads(ask, bodies)
    return clock.each(n)


def answer_at_once() -> None:
    """Let every pool answer without a connection, as little as a client needs."""
    from io import BytesIO

    from urllib3 import HTTPResponse
    from urllib3.connectionpool import HTTPConnectionPool

    data = traffic.answer(0)

    def answered(self: Any, conn: Any, method: str, url: str, **options: Any) -> Any:
        held = options.get("response_conn")
        if held is not None:
            self._put_conn(held)
        given = {"preload_content": options.get("preload_content", True), "request_method": method}
        return HTTPResponse(BytesIO(data), headers=traffic.REPLY_HEADERS, status=200, reason="OK", version=11, **given)

    HTTPConnectionPool._make_request = answered  # type: ignore[method-assign,assignment] # noqa: SLF001


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hits = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        type(self).hits += 1
        data = b'{"n": %d}' % self.hits
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


def live(client: str, rounds: int) -> dict[str, float]:
    """Play 64 recorded calls from 16 threads, again and again; return how many went live, and how many were wrong."""
    import tempfile

    from aggregator import cassette

    bodies = [b'{"i": %d}' % i for i in range(CALLS)]
    with _Server(("127.0.0.1", 0), _Handler) as server, tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, path = f"http://127.0.0.1:{server.server_port}/v1", f"{folder}/live.yaml"
        wrong = 0
        with ExitStack() as stack:
            ask = client_of(client, url, stack)
            with cassette(path, "all", clients="all"):
                heard = by_threads(ask, bodies)
            for _ in range(rounds):
                with cassette(path, "none", clients="all", warn=False):
                    wrong += sum(one != other for one, other in zip(by_threads(ask, bodies), heard, strict=True))
        server.shutdown()
    return {"live": float(_Handler.hits - CALLS), "wrong": float(wrong), "calls": float(rounds * CALLS)}
