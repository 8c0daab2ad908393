"""ParameterNode: which values it accepts, its name, and overrides that stay in their context."""

from __future__ import annotations

import asyncio
import threading
from contextvars import copy_context
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta

from aggregator import ConfigError, ParameterNode, node
from aggregator.agents.parameters import by_name, overriding, py_name, read, write
from aggregator.errors import ParameterError


@pytest.mark.requirement("Trace: ParameterNode")
def test_a_parameter_describes_itself() -> None:
    """Value, type, description and constraint are in the prompt."""
    k = ParameterNode(
        3, name="k", type=Annotated[int, Meta(ge=1, le=10)], description="passages", constraint="small is cheap"
    )
    assert k.describe() == {
        "value": 3,
        "type": "int, >= 1, <= 10",
        "description": "passages",
        "constraint": "small is cheap",
    }
    assert k.json_schema() == {"type": "integer", "minimum": 1, "maximum": 10, "description": "passages"}
    assert (str(k), repr(k)) == ("3", "ParameterNode(3, name='k')")


def test_a_refusal_refers_to_the_suggestion() -> None:
    """The error has what was expected, what it got and the component, as the model wrote it."""
    k = ParameterNode(["a"], name="retriever.k")
    with pytest.raises(ParameterError) as refused:
        k.convert(["b", 7])
    assert str(refused.value) == "Expected `str`, got `int` - at $.suggestion.retriever_k[1]"


def test_assignment_converts_and_checks() -> None:
    """Assigning is as strict as suggesting, and a refusal keeps the value."""
    flag = ParameterNode(data=True, name="flag")
    flag.data = "False"  # type: ignore[assignment]
    assert flag.data is False
    with pytest.raises(ParameterError, match=r"Expected `bool`, got 'maybe' - at flag.data"):
        flag.data = "maybe"  # type: ignore[assignment]
    assert flag.data is False


@pytest.mark.parametrize(
    ("start", "suggestion"),
    [(None, "x"), (0, None), (["a", "b"], "c, d"), ("s", None), ("s", ["l1", "l2"]), (1, 2.9)],
)
def test_values_are_converted_or_refused(start: Any, suggestion: Any) -> None:
    """`type(old)(new)` raised TypeError or corrupted values; now it is converted or a ParameterError."""
    parameter = ParameterNode(start)
    try:
        value = parameter.convert(suggestion)
    except ParameterError:
        return
    assert value == suggestion


@pytest.mark.requirement("Trace's defect 16: prompts with the word def were dropped")
@pytest.mark.parametrize("text", ["**Def**ine the terms, answer by **def**ault", "def", "TERMINATE", "return 1"])
def test_prompts_that_mention_code_words_are_kept(text: str) -> None:
    """An English prompt with "def" in it was dropped as broken code."""
    assert ParameterNode("x").convert(text) == text


def test_predicates_constrain() -> None:
    """A predicate refuses by False or ValueError; its docstring or name is in the error and in the prompt."""

    def short(value: str) -> bool:
        """At most three letters."""
        return len(value) <= 3

    def strict(value: str) -> bool:
        raise ValueError("never good")

    with pytest.raises(ParameterError, match=r"Expected At most three letters\., got 'long'"):
        ParameterNode("abc", constraint=short).convert("long")
    assert ParameterNode("abc", constraint=short).describe()["constraint"] == "At most three letters."
    with pytest.raises(ParameterError, match="that satisfies strict, got 'abc': never good"):
        ParameterNode("abc", constraint=strict)


def test_a_broken_predicate_is_not_a_refusal() -> None:
    """An error in the predicate's own code is raised to the user."""
    with pytest.raises(ZeroDivisionError):
        ParameterNode("abc", constraint=lambda value: 1 / 0 > 0)


@pytest.mark.parametrize(
    "value",
    [[1j], [len], {"f": len, "k": 1}, {(1, 2): 3}, {None: 1}, {True: 1}, {1: "a", "b": "c"}, {"x": {1: 2, "b": 3}}],
)
def test_values_that_a_file_cannot_hold_are_refused_before_training(value: Any) -> None:
    """A value that JSON cannot hold, or would change, is not trainable, at any depth."""
    with pytest.raises(ConfigError, match="a value that JSON can carry, got .*its keys all text or all numbers"):
        ParameterNode(value)
    assert ParameterNode(value, trainable=False).data == value


def test_the_first_value_is_checked_too() -> None:
    """A parameter never holds an invalid value."""
    with pytest.raises(ParameterError, match="Expected `float` <= 1.0, got 7.0 - at share"):
        ParameterNode(7.0, name="share", type=Annotated[float, Meta(le=1)])
    with pytest.raises(ConfigError, match="a value that JSON can carry"):
        ParameterNode(object())
    with pytest.raises(ConfigError, match="Expected a name, got ''"):
        ParameterNode(1, name="")
    assert isinstance(ParameterNode(lambda: 1, trainable=False).data(), int)


@pytest.mark.requirement("Trace: trace.node(data, name, trainable, description, constraint)")
def test_node_is_traces_constructor() -> None:
    """`node` keeps Trace's defaults: not trainable by default, and a node is returned unchanged."""
    plain, trained = node("a"), node("b", name="greeting", trainable=True, description="said first")
    assert (plain.trainable, trained.trainable, trained.name, trained.py_name) == (False, True, "greeting", "greeting")
    assert node(trained) is trained


@pytest.mark.requirement("Trace's defect 24: names collided")
def test_colliding_names_are_refused() -> None:
    """`a:10` and `a1:0` both became `a10` and one value overwrote the other; the error names both."""
    assert list(by_name([ParameterNode(1, name="a:10"), ParameterNode(2, name="a1:0")])) == ["a:10", "a1:0"]
    with pytest.raises(ConfigError, match=r"'a\.b' and 'a_b', which are both 'a_b' in prompts"):
        by_name([ParameterNode(1, name="a.b"), ParameterNode(2, name="a_b")])
    with pytest.raises(ConfigError, match="'k' and 'k'"):
        read([ParameterNode(1, name="k"), ParameterNode(2, name="k")])


@settings(max_examples=60)
@given(st.text(min_size=1))
def test_py_names_are_identifiers(name: str) -> None:
    """For any path the py_name is a stable identifier."""
    assert py_name(name).isidentifier()
    assert py_name(py_name(name)) == py_name(name)


def test_write_is_all_or_nothing() -> None:
    """One refused value, or an unknown name, leaves every parameter unchanged."""
    a, b = ParameterNode(1, name="a"), ParameterNode("x", name="b")
    with pytest.raises(ParameterError, match="Expected `str`, got 3 - at b"):
        write([a, b], {"a": 2, "b": 3})
    with pytest.raises(ParameterError, match=r"Expected names of parameters \(a, b\), got c"):
        write([a, b], {"a": 2, "c": 3})
    assert read([a, b]) == {"a": 1, "b": "x"}
    write([a, b], {"b": "y"})
    assert read([a, b]) == {"a": 1, "b": "y"}


@pytest.mark.requirement("Trace: clone")
def test_reads_and_writes_are_copies() -> None:
    """Changing a list in place, or the caller's own copy, does not change what was read or written."""
    items = ParameterNode(["a"], name="items")
    before = read([items])
    items.data.append("b")
    assert before == {"items": ["a"]}
    values = {"items": ["c"]}
    write([items], values)
    values["items"].append("d")
    assert items.data == ["c"]


def test_overrides_nest_and_end() -> None:
    """The inner override wins, the outer one applies again after it, and finally the stored value."""
    a, b = ParameterNode(1, name="a"), ParameterNode(1, name="b")
    with overriding([a, b], {"a": 2}):
        with overriding([a, b], {"a": 3, "b": 3}):
            assert (a.data, b.data) == (3, 3)
        assert (a.data, b.data) == (2, 1)
    assert (a.data, b.data) == (1, 1)


def test_an_override_is_checked_like_a_write() -> None:
    """An invalid candidate cannot be tried."""
    a = ParameterNode(1, name="a")
    with pytest.raises(ParameterError), overriding([a], {"a": "many"}):
        pytest.fail("entered")


def test_assignment_under_an_override_stays_in_it() -> None:
    """An agent that assigns to its own parameter during a trial changes only that trial."""
    a = ParameterNode(1, name="a")
    with overriding([a], {"a": 2}):
        a.data = 5
        assert a.data == 5
    assert a.data == 1


async def test_candidates_run_concurrently() -> None:
    """32 tasks with 32 values of one parameter each read their own, across awaits; nothing needs restoring."""
    k = ParameterNode(-1, name="k")

    async def trial(i: int) -> list[int]:
        with overriding([k], {"k": i}):
            seen = []
            for _ in range(5):
                await asyncio.sleep(0)
                seen.append(k.data)
            return seen

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(trial(i)) for i in range(32)]
    assert [task.result() for task in tasks] == [[i] * 5 for i in range(32)]
    assert k.data == -1


def test_overrides_belong_to_a_context() -> None:
    """A thread started with the context sees the override, any other one the stored value."""
    k = ParameterNode(1, name="k")
    seen: dict[str, int] = {}

    def look(who: str) -> None:
        seen[who] = k.data

    with overriding([k], {"k": 2}):
        context = copy_context()
        threads = [
            threading.Thread(target=context.run, args=(look, "with")),
            threading.Thread(target=look, args=("without",)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {"with": 2, "without": 1}


async def test_a_cancelled_trial_leaves_nothing() -> None:
    """Cancelling inside an override needs no clean-up, because the stored value was not changed."""
    k = ParameterNode(1, name="k")
    entered = asyncio.Event()

    async def trial() -> None:
        with overriding([k], {"k": 2}):
            entered.set()
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(trial())
        await entered.wait()
        task.cancel()
    assert task.cancelled()
    assert k.data == 1
