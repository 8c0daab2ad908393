"""A worker's messages are not trusted: the parent checks exceptions, frames, sizes and types of values."""

from __future__ import annotations

import builtins
import os
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.errors import SandboxError
from aggregator.sandbox.crossing import Call, Fault, Frame, Function, check_content, pack, rebuild, result_of, unpack


def call(**facts: Any) -> Call:
    given = {"seconds": 5.0, "memory": 1 << 30, "output": 1 << 20, "most_values": 1_000, **facts}
    return Call(
        functions={"": Function(source="", name="op")}, args=[], kwargs={}, owner=None, asynchronous=False, **given
    )


def read(content: Any, **facts: Any) -> Any:
    """Return what the parent reads from an answer; bytes are sent unchanged."""
    raw = content if isinstance(content, bytes) else msgspec.msgpack.encode(content)
    return result_of(Frame("", raw), call(**facts))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")) | st.integers(0, 9), inner),
)


@settings(max_examples=200)
@given(plain)
def test_plain_values_pass(value: Any) -> None:
    """Values that a call may return arrive unchanged."""
    assert read({"value": value}, most_values=10**6) == value


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes_raise_at_most_a_sandbox_error(content: bytes) -> None:
    """Any bytes give an answer, a SandboxError, or an exception of the table."""
    try:
        read(content)
    except Exception as error:  # noqa: BLE001 - its type is what is checked
        assert isinstance(error, SandboxError) or "source_line" in vars(error)  # noqa: PT017 - as above


def test_a_worker_cannot_choose_what_the_parent_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not in the table of exceptions becomes text in a SandboxError; nothing of that name is called."""
    monkeypatch.delenv("REACHED", raising=False)
    arguments = ["import os; os.environ['REACHED'] = '1'"]
    wrong = []
    for kind in sorted({*vars(builtins), "os.system", "SystemExit", "KeyboardInterrupt", "__import__"}):
        error: object = rebuild(Fault(kind=kind, text="x", args=arguments), "op")
        is_named = type(error).__name__ == kind or str(error) == f"op failed with {kind}: x"
        if not (isinstance(error, Exception) and is_named) or "REACHED" in os.environ:
            wrong.append(kind)
    assert wrong == []


@pytest.mark.parametrize(
    ("start", "end"), [(-(10**9), -(10**9) + 1), (10**9, 10**9 + 1), (0, 5), (1, 1), (True, 2), (2**63, 2**63 + 1)]
)
@pytest.mark.parametrize("kind", ["UnicodeDecodeError", "UnicodeEncodeError", "UnicodeTranslateError"])
def test_a_unicode_error_must_refer_to_its_own_object(kind: str, start: int, end: int) -> None:
    """CPython reads memory at `start` when it prints such an error, so an invalid position is not used."""
    thing = b"abc" if kind == "UnicodeDecodeError" else "abc"
    arguments = ["ascii", thing, start, end, "r"][kind == "UnicodeTranslateError" :]
    error = rebuild(Fault(kind=kind, text="said", args=arguments), "op")
    assert "said" in str(error)


def test_a_valid_unicode_error_is_restored() -> None:
    """Position, object and reason are those of the worker."""
    error = rebuild(
        Fault(kind="UnicodeDecodeError", text="", args=["utf-8", b"\xff", 0, 1, "invalid start byte"]), "op"
    )
    assert str(error) == "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"


@pytest.mark.parametrize(
    "arguments", [[["nested"]], [{}], ["x"] * 6, ["x" * 20_000], [{"a": 1}, 2]], ids=lambda value: str(value)[:20]
)
def test_arguments_of_an_exception_are_few_and_plain(arguments: list[Any]) -> None:
    """Any other argument is replaced by the text."""
    assert rebuild(Fault(kind="ValueError", text="said", args=arguments), "op").args == ("said",)


@pytest.mark.parametrize("line", [-1, 10**9])
def test_a_line_outside_the_source_is_dropped(line: int) -> None:
    """The line is used to quote the source."""
    assert vars(rebuild(Fault(kind="ValueError", text="", line=line), "op"))["source_line"] == 0


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([[]] * 2_000, "its result holds more than 1000 values"),
        ([{}] * 2_000, "its result holds more than 1000 values"),
        (dict.fromkeys(range(2_000)), "its result holds more than 1000 values"),
        ([[[None] * 30] * 30] * 3, "its result holds more than 1000 values"),
    ],
)
def test_a_small_reply_of_many_values_is_refused_before_it_is_decoded(value: Any, reason: str) -> None:
    """A byte limit does not bound memory: an empty list is one byte here and a hundred there."""
    with pytest.raises(SandboxError, match=f"Expected op to stay within its sandbox, but {reason}"):
        read({"value": value})


def test_depth_is_limited() -> None:
    """64 levels are accepted, 100,000 are refused without recursion."""
    nested: Any = 1
    for _ in range(64):
        nested = [nested]
    assert read({"value": nested}) == nested
    deep = b"\x81\xa5value" + b"\x91" * 100_000 + b"\x01"
    with pytest.raises(SandboxError, match="nested deeper than 64 levels"):
        read(deep, most_values=10**6)


def test_tuple_keys_are_limited() -> None:
    """Their hashes can be chosen to collide, and a dict of many such keys takes minutes to build."""
    assert read({"value": {(1, 2): 3}}) == {(1, 2): 3}
    with pytest.raises(SandboxError, match="more than 1000 keys that are tuples"):
        read({"value": {(i,): None for i in range(1_500)}}, most_values=10**6)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x81\xa5value\xc1",
        b"\x81\xa5value\xc7\x01\x05a",
        b"\x81\xa5value\x01\x01",
        b"\x81\xa5value\xdd\xff\xff\xff\xff",
        b"\x81\xa5value\xdb\xff\xff\xff\xff",
        b"\x93\x01\x02\x03",
        b"\x81\xa5error\x01",
        b"\x81\xa5limit\x01",
    ],
)
def test_malformed_answers_are_a_sandbox_error(content: bytes) -> None:
    """Truncated, of another shape, with unknown extension types, or longer than stated."""
    with pytest.raises(SandboxError, match="Expected an answer from the sandbox of op"):
        read(content)


@pytest.mark.parametrize("value", [(1, ("a", 2.5)), {"k": (1,)}, [(), b"x"], {"a", "b"}, frozenset({1}), {(1, 2): [3]}])
def test_values_of_a_module_keep_their_types(value: Any) -> None:
    """Tuples and sets, which msgpack does not have, arrive as tuples and sets."""
    there = msgspec.msgpack.decode(msgspec.msgpack.encode(pack(value, wide=True)), ext_hook=unpack)
    assert there == value
    assert type(there) is type(value)


def test_check_content_counts_exactly() -> None:
    """The limit is the number of values, including keys and containers."""
    content = msgspec.msgpack.encode({"value": [1, "two", {"three": 3}]})
    check_content(content, 8)
    with pytest.raises(Exception, match="more than 7 values"):
        check_content(content, 7)
