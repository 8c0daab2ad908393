"""Types of values: inference, conversion, refusals and descriptions."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta, Struct

from aggregator.agents.parameters import Unfit, convert, describe_type, infer_type, schema, snapshot
from aggregator.text import shorten


class Step(Struct, frozen=True):
    text: str
    weight: float = 1.0


class Tree(Struct):
    name: str
    children: list[Tree] = []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, bool),
        (3, int),
        (0.5, float),
        ("x", str),
        (None, Any),
        (["a"], list[str]),
        ([], list[Any]),
        ([1, 2.5], list[float]),
        ([1, "a"], list[Any]),
        ([True, 1], list[Any]),
        ({"a": 1}, dict[str, int]),
        ({"a": ["x"], "b": ["y"]}, dict[str, list[str]]),
        ({1: "a"}, dict[int, str]),
        ({1: "a", "b": "c"}, dict[Any, str]),
        ({}, dict[str, Any]),
        ((1, 2), tuple[int, ...]),
        ({1}, set[int]),
        (Step("x"), Step),
        ([Step("x")], list[Step]),
    ],
)
def test_the_type_is_inferred_from_the_value(value: Any, expected: Any) -> None:
    """A parameter without a type has its value's type, including items; mixed types become Any."""
    assert infer_type(value) == expected


@pytest.mark.parametrize(
    ("raw", "kind", "expected"),
    [
        ("False", bool, False),
        ("false", bool, False),
        ("1", bool, True),
        ("7", int, 7),
        (2.0, int, 2),
        (1, float, 1.0),
        ("0.25", float, 0.25),
        (["a"], list[str], ["a"]),
        ({"a": "1"}, dict[str, int], {"a": 1}),
        ([1, 2], tuple[int, ...], (1, 2)),
        ({"text": "x", "weight": "2"}, Step, Step("x", 2.0)),
        (None, Any, None),
        ("anything", Any, "anything"),
        ("Define the terms, answer by default", str, "Define the terms, answer by default"),
    ],
)
def test_json_sensible_values_are_converted(raw: Any, kind: Any, expected: Any) -> None:
    """A value with one plain meaning becomes the parameter's type."""
    value = convert(raw, kind)
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.requirement("Trace's defect 13: values were converted by type(old)(new)")
@pytest.mark.parametrize(
    ("raw", "kind", "reason"),
    [
        ("c, d", list[str], "Expected `array`, got 'c, d'"),
        ('["x", "y"]', list[str], 'Expected `array`, got \'["x", "y"]\''),
        (2.9, int, "Expected `int`, got 2.9"),
        ("2.9", int, "Expected `int`, got '2.9'"),
        (True, int, "Expected `int`, got True"),
        (3, str, "Expected `str`, got 3"),
        (None, str, "Expected `str`, got None"),
        (["l1", "l2"], str, "Expected `str`, got ['l1', 'l2']"),
        ("yes", bool, "Expected `bool`, got 'yes'"),
        (7, Annotated[float, Meta(ge=0, le=1)], "Expected `float` <= 1.0, got 7"),
        ("nan", float, "Expected a finite number, got nan"),
        (math.inf, float, "Expected a finite number, got inf"),
        (10**400, float, "Number out of range, got 1"),
        ("1" * 5000, int, "Integer value out of range, got '1111"),
        ("\ud83d", str, "Expected text that UTF-8 can carry, got a lone surrogate"),
        ("c", Literal["a", "b"], "Expected Literal['a', 'b'], got 'c'"),
    ],
)
def test_ambiguous_values_are_refused(raw: Any, kind: Any, reason: str) -> None:
    """`type(old)(new)` turned "c, d" into letters, 2.9 into 2 and None into 'None'; each is refused."""
    with pytest.raises(Unfit) as refused:
        convert(raw, kind)
    assert refused.value.reason.startswith(reason)


@pytest.mark.parametrize(
    ("raw", "kind", "path"),
    [
        (["a", 1], list[str], "[1]"),
        ({"a": math.nan}, Any, ".a"),
        ({"a": [1, {"b": math.inf}]}, Any, ".a[1].b"),
        ([{"text": 1}], list[Step], "[0].text"),
        (Step("x", math.nan), Step, ".weight"),
        ({1: 2}, dict[str, int], ""),
    ],
)
def test_the_path_inside_a_value_is_named(raw: Any, kind: Any, path: str) -> None:
    """The error for a nested value has its path, at any depth."""
    with pytest.raises(Unfit) as refused:
        convert(raw, kind)
    assert refused.value.path == path


def test_a_value_nested_too_deeply_is_refused() -> None:
    """Depth beyond the interpreter's limit is refused without a RecursionError."""
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Unfit, match="at most 64 levels"):
        convert(deep, Any)
    while isinstance(deep, list):  # take it apart by hand: deallocating a deep list must not recurse
        deep = deep.pop()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
kinds = st.sampled_from(
    [bool, int, float, str, list[str], list[int], list[float], dict[str, str], dict[str, float], Step, Any, Tree]
)


def carries(value: Any) -> bool:
    """Return True if JSON returns the value unchanged."""
    return bool(msgspec.json.decode(msgspec.json.encode(value)) == msgspec.to_builtins(value))


@settings(max_examples=60)
@given(json_values, kinds)
def test_conversion_is_safe_and_stable(raw: Any, kind: Any) -> None:
    """Any JSON value is refused, or becomes one that converts to itself and that JSON keeps unchanged."""
    try:
        value = convert(raw, kind)
    except Unfit:
        return
    assert convert(value, kind) == value
    assert carries(value)


@pytest.mark.parametrize("kind", [bool, int, float, str, list[str], dict[str, int]])
def test_a_lone_surrogate_is_refused_for_every_type(kind: Any) -> None:
    """Text that UTF-8 cannot encode is refused, never an error from inside the library."""
    with pytest.raises(Unfit):
        convert("\ud800", kind)


@settings(max_examples=60)
@given(json_values, kinds)
def test_no_number_becomes_text(raw: Any, kind: Any) -> None:
    """Text in a converted value was text before."""
    try:
        value = convert(raw, kind)
    except Unfit:
        return
    if kind is str:
        assert raw is value or raw == value
    if kind == list[str]:
        assert raw == value


@settings(max_examples=60)
@given(json_values)
def test_a_value_has_its_inferred_type(value: Any) -> None:
    """The inferred type accepts its value unchanged."""
    try:
        converted = convert(value, infer_type(value))
    except Unfit as refused:
        assert "finite" in refused.reason or "UTF-8" in refused.reason or "range" in refused.reason  # noqa: PT017
    else:
        assert converted == value


def test_a_schema_is_self_contained() -> None:
    """References are inlined; a recursive type ends as any value, and a type that JSON does not support is {}."""
    assert schema(Annotated[float, Meta(ge=0, le=1)]) == {"type": "number", "minimum": 0, "maximum": 1}
    assert schema(list[Step])["items"]["properties"] == {
        "text": {"type": "string"},
        "weight": {"type": "number", "default": 1.0},
    }
    assert "$ref" not in str(schema(Tree))
    assert schema(object) == {}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (str, "str"),
        (list[str], "list[str]"),
        (Annotated[list[str], Meta(min_length=1, max_length=5)], "list[str], at least 1 long, at most 5 long"),
        (Annotated[str, Meta(pattern="^a")], "str, matching ^a"),
        (dict[str, Any], "dict[str, Any]"),
        (str | None, "str | None"),
        (Literal["a", "b"], "Literal['a', 'b']"),
        (Step, "Step"),
    ],
)
def test_types_are_readable(kind: Any, words: str) -> None:
    """Prompts name types without module paths."""
    assert describe_type(kind) == words


def test_a_snapshot_is_a_copy() -> None:
    """A later change in place does not affect a snapshot."""
    value = {"a": [1]}
    kept = snapshot(value)
    value["a"].append(2)
    assert kept == {"a": [1]}


def test_errors_shorten_a_long_value() -> None:
    """A refused text of a megabyte does not fill the error."""
    assert len(shorten("x" * 1_000_000)) < 100
    assert len(shorten(["x" * 1_000_000])) < 100
