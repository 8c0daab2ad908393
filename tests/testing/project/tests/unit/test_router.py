"""A user's tests: each mark is one way of using cassettes."""

from __future__ import annotations

import asyncio

import pytest
from router import aroute, route

pytestmark = pytest.mark.cassette(clients="all")


def test_plain() -> None:
    """The default path: cassettes/test_router/test_plain.yaml next to this module."""
    assert route("My card was charged twice.") == "answer 1"


async def test_async() -> None:
    """Async tests record and replay like any other, and their tasks use the test's tape."""
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(aroute(f"Ticket {i}")) for i in range(3)]
    assert sorted(task.result()[:6] for task in asked) == ["answer"] * 3


@pytest.mark.parametrize("ticket", ["refund/late", "login?"])
def test_parametrised(ticket: str) -> None:
    """Each set of parameters has its own cassette."""
    assert route(ticket).startswith("answer")


class TestGrouped:
    """A class's name is part of the file's."""

    def test_method(self) -> None:
        """cassettes/test_router/TestGrouped.test_method.yaml."""
        assert route("Where is my parcel?").startswith("answer")


@pytest.mark.cassette("shared/greeting")
def test_named() -> None:
    """A name with a slash is shared among modules: cassettes/shared/greeting.yaml."""
    assert route("Hello").startswith("answer")


@pytest.fixture
def greeting() -> str:
    """Fixtures of a marked test are part of its recording."""
    return route("Hello from a fixture")


def test_with_fixture(greeting: str) -> None:
    """A fixture's calls are replayed too."""
    assert greeting.startswith("answer")
