"""Which hosts a replaying test may reach."""

from __future__ import annotations

import socket
from collections.abc import Callable
from http.server import HTTPServer
from typing import Any

import aiohttp
import httpx
import pytest
from user_project import Handler, Model, only

from aggregator.errors import CassetteError
from aggregator.testing.taping import refuse_connections

pytest_plugins = ["pytester"]


def ask(port: int, host: str = "localhost") -> None:
    with httpx.Client(trust_env=False) as client:
        assert client.post(f"http://{host}:{port}/", content=b"x").status_code == 200


def connect(port: int) -> None:
    socket.create_connection(("localhost", port)).close()


@pytest.mark.parametrize("reach", [ask, connect])
@pytest.mark.parametrize("allowed", ["localhost", "LocalHost", "127.0.0.1"])
def test_a_host_allowed_by_name_was_refused_by_address(
    model: Model, allowed: str, reach: Callable[[int], None]
) -> None:
    """The addresses of an allowed name are allowed; `localhost` gives only those."""
    with refuse_connections("replaying", [allowed]):
        reach(model.server_port)


async def test_an_allowed_name_works_in_an_event_loop(model: Model) -> None:
    """aiohttp, and httpx through anyio, resolve and connect by other functions."""
    url = f"http://localhost:{model.server_port}/"
    with refuse_connections("replaying", ["localhost"]):
        async with aiohttp.ClientSession() as client, client.post(url, data=b"x") as reply:
            assert reply.status == 200
        async with httpx.AsyncClient(trust_env=False) as other:
            assert (await other.post(url, content=b"x")).status_code == 200


def send(*arguments: Any) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(*arguments)


@pytest.mark.parametrize(
    ("reach", "host"),
    [
        (lambda: ask(9, "127.0.0.1"), "127.0.0.1"),
        (lambda: ask(9), "localhost"),
        (lambda: ask(9, "model.invalid"), "model.invalid"),
        (lambda: send(b"x", ("127.0.0.1", 9)), "127.0.0.1"),
        (lambda: send(b"x", 0, ("127.0.0.1", 9)), "127.0.0.1"),
        (lambda: socket.gethostbyname("model.invalid"), "model.invalid"),
        (lambda: socket.gethostbyname_ex("model.invalid"), "model.invalid"),
        (lambda: socket.gethostbyaddr("192.0.2.1"), "192.0.2.1"),
    ],
)
def test_lookups_and_datagrams_passed_the_guard(reach: Callable[[], None], host: str) -> None:
    """Every outgoing call is refused and recorded, because code may hide the error."""
    met: list[CassetteError] = []
    with (
        refuse_connections("replaying", ["other.invalid"], met=met),
        pytest.raises(CassetteError, match=f"got one to '{host}'"),
    ):
        reach()
    assert len(met) == 1


def test_the_guard_leaves_nothing_behind() -> None:
    """Functions are restored, also after a block that raises."""
    before = [socket.getaddrinfo, socket.gethostbyname, socket.socketpair, socket.socket.connect, socket.socket.sendto]
    with pytest.raises(CassetteError), refuse_connections("replaying"):
        ask(9)
    after = [socket.getaddrinfo, socket.gethostbyname, socket.socketpair, socket.socket.connect, socket.socket.sendto]
    assert before == after


def test_a_server_can_listen() -> None:
    """`http.server` resolves its own name when it starts."""
    with refuse_connections("replaying"), HTTPServer(("127.0.0.1", 0), Handler) as server:
        assert server.server_port


def test_a_swallowed_refusal_passed_without_any_cassette(
    project: pytest.Pytester, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails the test, as a swallowed miss does; a string of allowed hosts is one host."""
    only(
        project,
        """
def agent():
    try: return route("x")
    except Exception: return "sales"
@pytest.mark.cassette
def test_refused(): assert agent() == "sales"
@pytest.mark.cassette(allowed_hosts="127.0.0.1")
def test_allowed(): assert agent() == "answer 1"
""",
    )
    monkeypatch.setenv("CI", "true")
    outcome = project.runpytest()
    outcome.assert_outcomes(passed=1, failed=1)
    outcome.stdout.fnmatch_lines(["*CassetteError: Expected no connection, got one to '127.0.0.1': *"])


def test_fixtures_of_a_wider_scope_reached_the_network_in_ci(
    project: pytest.Pytester, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run before the cassette is open: refused with the remedy, but allowed for other tests."""
    only(
        project,
        """
@pytest.fixture(scope="module")
def summary(): return route("summary")
@pytest.fixture(scope="module")
def hidden():
    try: return route("hidden")
    except Exception: return "sales"
@pytest.mark.cassette(clients="all")
def test_module(summary): pass
@pytest.mark.cassette(clients="all")
def test_hidden(hidden): assert hidden == "sales"
class TestClass:
    @classmethod
    def setup_class(cls): route("setup_class")
    @pytest.mark.cassette(clients="all")
    def test_class(self): pass
@pytest.fixture(scope="session")
def free(): return route("free")
def test_free(free): pass
""",
    )
    monkeypatch.setenv("CI", "true")
    outcome = project.runpytest()
    outcome.assert_outcomes(passed=1, failed=1, errors=2)
    outcome.stdout.fnmatch_lines(["*from a fixture of wider scope than a function; ask the model in a fixture of *"])
    assert model.hits == 1
