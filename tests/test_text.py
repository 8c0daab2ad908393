"""Values as text: no addresses, no hash order, bounded."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct

from aggregator import Module, ParameterNode
from aggregator.text import MISSING, as_text, canonical_json, cut, json_changes, show, show_error, strip_fence


class Plain:
    pass


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError


class Holder:
    def __repr__(self) -> str:
        return f"Holder({object()!r})"


class Point(Struct):
    x: Any


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", '"a"'),
        ('a "quoted" \\ tab\t', '"a \\"quoted\\" \\\\ tab\\t"'),
        ("two\nlines", "two\nlines"),
        ("é", '"é"'),
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        ([1, ["a\nb"]], '[1, ["a\\nb"]]'),
        ((1,), "(1)"),
        ({"b": {1: None}}, '{"b": {1: null}}'),
        ({"b", "a"}, '{"a", "b"}'),
        (Plain(), "<Plain>"),
        ([Plain()], "[<Plain>]"),
        (Broken(), "<Broken>"),
        (Holder(), "Holder(<object>)"),
        (Module(), "<Module>"),
        (ParameterNode(3), "3"),
        (Point(1), "Point(x=1)"),
        (Point(Plain()), "Point(x=<test_text.Plain>)"),
        (b"ab", "b'ab'"),
    ],
)
def test_values_are_shown_without_addresses(value: Any, text: str) -> None:
    """The same value is the same text in every run."""
    assert show(value) == text


def test_a_huge_int_is_shown_by_its_size() -> None:
    """Python does not convert more than 4300 digits to text."""
    assert show(10**5000) == "<int of 16610 bits>"


def test_sets_do_not_depend_on_the_hash_seed() -> None:
    """Two processes with different hash seeds show one text."""
    script = "from aggregator.text import show; print(show({'x' * i for i in range(9)}))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1


def test_omissions_are_stated() -> None:
    """Long texts, many items and deep nesting are cut with a marker that says how much."""
    assert show("x" * 30, 10) == f'"{"x" * 10} [... 20 more characters]"'
    assert show(list(range(100)), 10) == "[0, 1, 2, 3, [... 96 more items]]"
    assert show([[[[[[[1]]]]]]]) == "[[[[[[[... nested deeper]]]]]]]"
    assert cut("ab", 2) == "ab"


def test_a_cyclic_list_ends() -> None:
    """A cycle ends at the depth limit."""
    loop: list[Any] = []
    loop.append(loop)
    assert "[... nested deeper]" in show(loop)


@settings(max_examples=60)
@given(
    st.recursive(
        st.text() | st.integers(),
        lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=9), inner),
    )
)
def test_the_limit_is_respected(value: Any) -> None:
    """No value is longer than a small multiple of the limit."""
    assert len(show(value, 50)) < 500


def test_errors_are_shown_by_class_and_message() -> None:
    """An error's text has no address, and an exception class whose str fails is shown too."""

    class OddError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert show_error(OddError()) == "OddError"
    assert show_error(ValueError(f"at {Plain()!r}")) == "ValueError: at <test_text.Plain>"


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("plain", "plain"),
        ("```json\n{}\n```", "{}"),
        ("```\n  a\n  b\n```\n", "  a\n  b"),
        ('```json\n{"a": 1}```', '{"a": 1}'),
        ("``````", ""),
        ("```", "```"),
        ("```a", "```a"),
        ("x ```json\n{}\n```", "x ```json\n{}\n```"),
    ],
)
def test_the_fence_around_a_whole_text_is_removed(text: str, inside: str) -> None:
    """Only a fence around the whole text is removed; text before it, and an unclosed fence, are kept."""
    assert strip_fence(text) == inside


def test_canonical_json_distinguishes_values_that_python_calls_equal() -> None:
    """Key order is ignored; 1, 1.0 and True are three values; a hook encodes other objects."""
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1})
    assert len({canonical_json(value) for value in (1, 1.0, True)}) == 3
    assert canonical_json({"x": Plain}, hook=lambda _: "P") == b'{"x":"P"}'


def test_json_changes_name_every_difference_with_its_path() -> None:
    """Missing keys and items, other types, and values inside."""
    changes = list(json_changes({"a": [1, {"b": 2}], "c": 1, "d": 0}, {"a": [1, {"b": 3}, 4], "c": True, "e": None}))
    assert changes == [
        ("a[1].b", 2, 3),
        ("a[2]", MISSING, 4),
        ("c", 1, True),
        ("d", 0, MISSING),
        ("e", MISSING, None),
    ]


def test_a_traceback_inside_a_message_named_folders_of_the_machine() -> None:
    """Trace and worker pools put one into messages, which go into prompts: a replay elsewhere did not find them."""
    message = 'Traceback:\n  File "/home/ada/x y/agent.py", line 3, in f\n    open("/etc/hosts")\n'
    windows = 'Traceback:\n  File "C:\\Users\\ada\\agent.py", line 9, in f\n'
    assert show_error(ValueError(message)) == "ValueError: " + message.replace("/home/ada/x y/", "")
    assert show_error(ValueError(windows)) == 'ValueError: Traceback:\n  File "agent.py", line 9, in f\n'


def test_a_value_that_contains_itself_or_is_nested_deep_is_text() -> None:
    """An agent that returned such a value ended the run with RecursionError."""
    cyclic: list[object] = ["x"]
    cyclic.append(cyclic)
    deep: object = 1
    for _ in range(100_000):
        deep = [deep]
    assert as_text(cyclic) == "['x', [...]]"
    assert as_text(deep) == "<list, nested too deep>"
