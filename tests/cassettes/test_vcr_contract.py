"""What the adapter uses of vcrpy beyond its documentation: a test for each line of its list, on 9.0 and the newest.

A failure here says which private part of vcrpy moved, before a user's test suite does.
"""

from __future__ import annotations

import asyncio
import inspect
from importlib import import_module
from typing import Any
from unittest import mock

import aiohttp
import httpx
import pytest
import vcr.stubs.aiohttp_stubs
import vcr.stubs.httpx_stubs
from vcr.cassette import Cassette, CassetteContextDecorator
from vcr.patch import CassettePatcherBuilder
from vcr.record_mode import RecordMode
from vcr.request import Request

from aggregator.cassettes.clients import FAMILIES
from aggregator.cassettes.vcr import _GUARDED, IndexedCassette

GROUPS = sorted(group for groups in FAMILIES.values() for group in groups)


class Asked(Cassette):  # type: ignore[misc] # vcrpy is untyped
    """A cassette that writes down what it is asked."""

    def __init__(self, path: str, play: bool = False, **kwargs: Any) -> None:
        super().__init__(path=path, record_mode=RecordMode.NEW_EPISODES, **kwargs)
        self.asked: list[tuple[str, Any]] = []
        self.play = play

    def _load(self) -> None:
        self.asked.append(("_load", None))

    def _save(self, force: bool = False) -> None:
        self.asked.append(("_save", None))

    def can_play_response_for(self, request: Any) -> bool:
        self.asked.append(("can_play_response_for", request))
        return self.play

    def play_response(self, request: Any) -> dict[str, Any]:
        self.asked.append(("play_response", request))
        return {
            "status": {"code": 200, "message": "OK"},
            "headers": {"content-type": ["text/plain"]},
            "body": {"string": b"played"},
        }

    def append(self, request: Any, response: Any) -> None:
        self.asked.append(("append", (request, response)))

    def filter_request(self, request: Any) -> Any:
        self.asked.append(("filter_request", request))
        return request

    @property
    def write_protected(self) -> bool:
        return False


def test_a_cassette_is_made_by_path_and_record_mode() -> None:
    """`Cassette(path=, record_mode=)` is enough, and `_path` is what patches and messages name."""
    made = Cassette(path="somewhere", record_mode=RecordMode.NEW_EPISODES)
    assert (made._path, made.record_mode) == ("somewhere", RecordMode.NEW_EPISODES)
    assert (made.custom_patches, made.inject) == ((), False)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_load", ["self"]),
        ("_save", ["self", "force"]),
        ("can_play_response_for", ["self", "request"]),
        ("play_response", ["self", "request"]),
        ("append", ["self", "request", "response"]),
        ("filter_request", ["self", "request"]),
        ("find_requests_with_most_matches", ["self", "request"]),
        ("__contains__", ["self", "request"]),
        ("__len__", ["self"]),
    ],
)
def test_overridden_methods_have_vcrpys_signature(method: str, parameters: list[str]) -> None:
    """Each method that we override exists in vcrpy with these parameters, and ours takes the same."""
    assert list(inspect.signature(getattr(Cassette, method)).parameters) == parameters
    assert list(inspect.signature(getattr(IndexedCassette, method)).parameters) == parameters


def test_write_protected_is_a_property() -> None:
    """vcrpy reads `write_protected` as an attribute."""
    assert isinstance(Cassette.write_protected, property)


def test_the_decorator_loads_enters_and_saves() -> None:
    """`from_args(cls, **kwargs)` loads by `cls.load(**kwargs)`, saves at the end; a subclass patches in its way."""
    patched: list[Any] = []

    class Decorator(CassetteContextDecorator):  # type: ignore[misc] # vcrpy is untyped
        def _patch_generator(self, cassette: Any) -> Any:
            patched.append(cassette)
            yield cassette

    with Decorator.from_args(Asked, path="somewhere") as cassette:
        assert patched == [cassette]
        assert cassette.asked == [("_load", None)]
    assert cassette.asked == [("_load", None), ("_save", None)]


@pytest.mark.parametrize("group", GROUPS)
def test_patchers_of_each_client_can_be_built_alone(group: str) -> None:
    """`CassettePatcherBuilder._<client>()` gives context managers, whether the client is installed or not."""
    for patcher in getattr(CassettePatcherBuilder(Asked("somewhere")), f"_{group}")():
        assert hasattr(patcher, "__enter__")


def test_no_client_is_left_out() -> None:
    """Every group of patches that vcrpy has belongs to one of our clients."""
    import vcr.patch

    names = getattr(vcr.patch, "PATCHER_NAMES", None)
    if names is None:
        pytest.skip("this vcrpy does not list its groups")
    assert sorted(names) == GROUPS


@pytest.mark.parametrize("group", sorted(group for family in _GUARDED for group in FAMILIES[family]))
def test_patches_of_functions_can_be_replaced_and_undone(group: str) -> None:
    """They are unittest.mock's, with `new` and `attribute`; `new.__wrapped__` is the original."""
    pytest.importorskip(group)
    patchers = list(getattr(CassettePatcherBuilder(Asked("somewhere")), f"_{group}")())
    assert patchers
    for patcher in patchers:
        assert isinstance(patcher, mock._patch)
        target = patcher.getter()
        assert patcher.new.__wrapped__ is getattr(target, patcher.attribute)


def test_stubs_can_be_imported_before_anything_is_patched() -> None:
    """The stubs that derive from patched classes have modules of these names."""
    for name in ("requests", "urllib3"):
        import_module(f"vcr.stubs.{name}_stubs")


def test_a_request_has_four_parts_and_room_for_ours() -> None:
    """`Request(method, uri, body, headers)` keeps what it was given and takes an attribute of ours."""
    request = Request("POST", "http://x/", "text", {"a": "1"})
    request.aggregator_turn = "ours"
    assert (request.method, request.uri, request.body, dict(request.headers)) == (
        "POST", "http://x/", b"text", {"a": "1"},
    )  # fmt: skip
    assert request.aggregator_turn == "ours"
    assert Request("POST", "http://x/", {"json": 1}, {}).body == {"json": 1}


def aiohttp_call(cassette: Asked, real: Any) -> bytes:
    async def ask() -> bytes:
        async with aiohttp.ClientSession() as session:
            call = vcr.stubs.aiohttp_stubs.vcr_request(cassette, real)
            response = await call(session, "POST", "http://127.0.0.1/", json={"a": 1})
            content: bytes = await response.read()
            return content

    with asyncio.Runner() as runner:
        return runner.run(ask())


def httpx_call(cassette: Asked, real: Any) -> bytes:
    call = vcr.stubs.httpx_stubs.vcr_handle_request(cassette, real, httpx)
    with httpx.HTTPTransport() as transport:
        response = call(transport, httpx.Request("POST", "http://127.0.0.1/", json={"a": 1}))
        content: bytes = response.read()
        return content


@pytest.mark.parametrize("call", [aiohttp_call, httpx_call])
def test_stubs_ask_and_play_one_request_object(call: Any) -> None:
    """A stub asks `can_play_response_for`, then `play_response`, with the same object, and never the network."""

    def real(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was asked")

    cassette = Asked("somewhere", play=True)
    assert call(cassette, real) == b"played"
    assert [name for name, _ in cassette.asked] == ["can_play_response_for", "play_response"]
    assert cassette.asked[0][1] is cassette.asked[1][1]


def test_stubs_append_the_request_object_they_asked_about() -> None:
    """A live answer is appended with the object of the question, in the shape that we read."""

    def real(self: Any, request: Any) -> Any:
        return httpx.Response(201, headers={"x-id": "7"}, stream=httpx.ByteStream(b"live"), request=request)

    cassette = Asked("somewhere")
    assert httpx_call(cassette, real) == b"live"
    asked = dict(cassette.asked)
    request, response = asked["append"]
    assert request is asked["can_play_response_for"]
    assert response["status"] == {"code": 201, "message": "Created"}
    assert (response["headers"], response["body"]) == ({"x-id": ["7"]}, {"string": b"live"})
