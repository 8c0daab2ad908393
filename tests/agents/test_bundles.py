"""@bundle: values pass through, nothing is caught or shared; a trainable operation runs its parameter's source."""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

import pytest

from aggregator import ConfigError, Module, ParameterNode, bundle, transcript
from aggregator.agents.modules import operation_of
from aggregator.agents.parameters import overriding
from aggregator.agents.transcripts import Span
from aggregator.sandbox.limits import sandboxed

SCALE = 10


@bundle()
def add(a: int, b: int = 2, *rest: int, c: int = 0) -> int:
    """Add numbers.

    And nothing else.
    """
    return a + b + sum(rest) + c


@bundle
async def greet(name: str) -> str:
    await asyncio.sleep(0)
    return f"Hello {name}"


@bundle("Scale a number.", trainable=True)
def scale(x: int) -> int:
    # a comment that stays
    return x * SCALE


@bundle(trainable=True)
def factorial(n: int) -> int:
    return 1 if n < 2 else n * factorial(n - 1)


class Desk(Module):
    def __init__(self) -> None:
        self.word = ParameterNode("yes")
        self.tool = scale

    @bundle(trainable=True)
    def answer(self, x: str) -> str:
        """Answer."""
        return f"{self.word.data} {x}"

    @bundle(trainable=True)
    async def later(self, x: str) -> str:
        await asyncio.sleep(0)
        return self.answer(x)


async def test_values_pass_through() -> None:
    """A traced operation is called like the function and returns the same object."""
    token = object()

    @bundle()
    def same(value: Any) -> Any:
        return value

    with transcript():
        assert same(token) is token
        assert add(1, 2, 3, c=4) == 10
        assert await greet("Ada") == "Hello Ada"


def test_a_traced_function_keeps_its_metadata() -> None:
    """Name, docstring, signature and asynchrony are visible to inspection."""
    assert (add.__name__, inspect.getdoc(add)) == ("add", "Add numbers.\n\nAnd nothing else.")
    assert str(inspect.signature(add)) == "(a: 'int', b: 'int' = 2, *rest: 'int', c: 'int' = 0) -> 'int'"
    assert inspect.iscoroutinefunction(greet)
    assert not inspect.iscoroutinefunction(add)


@pytest.mark.requirement("Trace: bundle(description)")
def test_operations_are_recorded() -> None:
    """The transcript has name, description, named inputs and output, without `self`."""
    with transcript() as seen:
        add(1, 2, 3, c=4)
        Desk().answer("x")
    assert seen.render() == (
        "add: Add numbers.\n  a: 1\n  b: 2\n  *rest: (3)\n  c: 4\n  returned: 10\n"
        'Desk.answer: Answer.\n  x: "x"\n  returned: "yes x"'
    )


@pytest.mark.requirement("Trace: bundle(catch_execution_error)")
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1), asyncio.CancelledError()])
def test_errors_are_recorded_and_raised(error: BaseException) -> None:
    """Nothing is caught: neither an error nor Ctrl-C nor a cancellation; the transcript shows what was raised."""

    @bundle()
    def fail() -> None:
        raise error

    with transcript() as seen, pytest.raises(type(error)) as raised:
        fail()
    assert raised.value is error
    assert f"raised: {type(error).__name__}" in seen.render()


def test_wrong_arguments_raise_the_functions_own_error() -> None:
    """A call with wrong arguments fails as it would without @bundle."""
    with transcript(), pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        add()  # type: ignore[call-arg]


def test_decorators_that_hide_the_function_are_refused() -> None:
    """The error for @bundle over something that is not a function says where it belongs."""
    with pytest.raises(ConfigError, match="got staticmethod; put @bundle closest to the function"):
        bundle()(staticmethod(add))
    with pytest.raises(ConfigError, match="got a function without source"):
        bundle(trainable=True)(eval("lambda x: x"))


@pytest.mark.requirement("Trace: bundle(trainable): a function body as parameter")
def test_the_source_is_the_parameter() -> None:
    """The source has no decorators, keeps its comments, and is dedented."""
    code = {p.name: p for p in Desk().parameters()}
    assert list(code) == ["answer__code", "later__code", "word", "tool__code"]
    assert code["tool__code"].data == "def scale(x: int) -> int:\n    # a comment that stays\n    return x * SCALE\n"
    assert code["answer__code"].data == (
        'def answer(self, x: str) -> str:\n    """Answer."""\n    return f"{self.word.data} {x}"\n'
    )
    assert code["tool__code"].describe()["type"] == "source code of a Python function, name and arguments fixed"


def test_a_plain_operation_can_be_an_agent() -> None:
    """A trainable function has its parameter, as a module does."""
    (code,) = scale.parameters()  # type: ignore[attr-defined]
    assert code.name == "scale__code"


@pytest.mark.requirement("Trace: bundle(trainable): a function body as parameter")
async def test_the_current_source_runs() -> None:
    """New source runs with the module's globals and the instance's parameters, sync and async."""
    desk = Desk()
    code = desk.parameters_dict()
    code["answer__code"].data = "def answer(self, x):\n    return f'{self.word.data}, {SCALE} {x}'"
    code["later__code"].data = "async def later(self, x):\n    return 'later: ' + self.answer(x)"
    assert desk.answer("x") == "yes, 10 x"
    assert await desk.later("x") == "later: yes, 10 x"
    assert Desk().answer("x") == "yes x"


def test_new_source_keeps_the_closure() -> None:
    """Closure variables stay live, and nothing is added to the module."""
    factor = 2

    @bundle(trainable=True)
    def multiply(x: int) -> int:
        return x * factor

    code = operation_of(multiply).code  # type: ignore[union-attr]
    assert code is not None
    assert multiply(3) == 6
    code.data = "def multiply(x):\n    def inner():\n        return x * factor + 1\n    return inner()"
    assert multiply(3) == 7
    factor = 5
    assert multiply(3) == 16
    assert "multiply" not in globals()


@pytest.mark.requirement("Trace: bundle(overwrite_python_recursion)")
def test_new_source_calls_itself() -> None:
    """Inside a function its own name is the operation, in new source as in the original; a method has no such name."""
    code = operation_of(factorial).code  # type: ignore[union-attr]
    assert code is not None
    with overriding([code], {code.name: "def factorial(n):\n    return 2 if n < 2 else n * factorial(n - 1)\n"}):
        assert factorial(5) == 240
    assert factorial(5) == 120
    desk = Desk()
    desk.parameters_dict()["answer__code"].data = "def answer(self, x):\n    return answer(x)"
    with pytest.raises(NameError, match="name 'answer' is not defined"):
        desk.answer("x")


@pytest.mark.requirement("Trace: ExceptionNode.create_feedback('full')")
def test_an_error_in_trained_code_is_the_agents_own() -> None:
    """It is raised unchanged; the transcript quotes the line of the source as the optimizer sees it."""
    desk = Desk()
    desk.parameters_dict()["answer__code"].data = "def answer(self, x):\n    y = 0\n    return 1 / y"
    with transcript() as seen, pytest.raises(ZeroDivisionError):
        desk.answer("x")
    assert "raised: ZeroDivisionError: division by zero (line 3: return 1 / y)" in seen.render()


def test_an_error_in_the_original_code_has_its_line_too() -> None:
    """Lines count from `def`, whatever decorators precede it."""

    @bundle(
        "Fails.",
        trainable=True,
    )
    def fail(x: int) -> float:
        """Fail."""
        return x / 0

    with transcript() as seen, pytest.raises(ZeroDivisionError):
        fail(1)
    assert "division by zero (line 3: return x / 0)" in seen.render()


@pytest.mark.requirement("Trace's defect 6: operations shared state between threads, and forward ignored its agent")
async def test_concurrent_calls_share_nothing() -> None:
    """Trace kept a call's state on the operation: 32 concurrent tasks each have their own code and inputs."""
    desk = Desk()
    parameters = desk.parameters()

    async def trial(i: int) -> tuple[str, str]:
        source = f"async def later(self, x):\n    return '{i}:' + self.answer(x)"
        values = {"later__code": source, "word": f"w{i}"}
        with overriding(parameters, values), sandboxed(None), transcript() as seen:
            return await desk.later(f"x{i}"), seen.render()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(trial(i)) for i in range(32)]
    for i, task in enumerate(tasks):
        output, text = task.result()
        assert output == f"{i}:w{i} x{i}"
        assert text.count("Desk.") == 2
        assert text.count(f"x{i}") == text.count("x:") + text.count("returned")
    assert desk.answer("x") == "yes x"


@pytest.mark.requirement("Trace's defect 6: operations shared state between threads, and forward ignored its agent")
def test_threads_share_nothing() -> None:
    """In threads, with distinct feedback and 60 nested operations, no prompt holds another instance's work."""

    @bundle()
    def step(state: str, depth: int) -> str:
        return step(state, depth - 1) if depth else state

    def run(i: int) -> str:
        with transcript() as seen:
            step(f"<{i}>", 60)
        return seen.render(10**9)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(run, range(32)))
    for i, text in enumerate(texts):
        assert (text.count("step"), text.count(f'"<{i}>"'), text.count("<")) == (61, 122, 122)


def test_an_operation_under_other_decorators_belongs_to_the_instance() -> None:
    """A retry decorator above @bundle does not make the method's code shared."""

    def twice(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def again(*args: Any) -> Any:
            function(*args)
            return function(*args)

        return again

    class Retrying(Module):
        @twice
        @bundle(trainable=True)
        def work(self, x: int) -> int:
            return x

    first, second = Retrying(), Retrying()
    first.parameters()[0].data = "def work(self, x):\n    return -x"
    assert (first.work(1), second.work(1)) == (-1, 1)


def test_static_and_class_methods_have_one_source() -> None:
    """Without an instance the source belongs to the operation; it is found, and it runs."""

    class Tools(Module):
        @staticmethod
        @bundle(trainable=True)
        def double(x: int) -> int:
            return 2 * x

        @classmethod
        @bundle(trainable=True, sandbox=None)
        def name(cls) -> str:
            return cls.__name__

    tools = Tools()
    parameters = tools.parameters_dict()
    assert list(parameters) == ["double__code", "name__code"]
    assert (tools.double(2), Tools.name()) == (4, "Tools")
    parameters["double__code"].data = "def double(x):\n    return 3 * x"
    parameters["name__code"].data = "def name(cls):\n    return cls.__name__.lower()"
    assert (Tools.double(2), tools.name()) == (6, "tools")


def test_an_instance_without_a_dict_uses_the_operations_source() -> None:
    """A slotted object cannot store its own source."""

    class Slotted:
        __slots__ = ("k",)

        @bundle(trainable=True)
        def get(self) -> int:
            return 1

    assert Slotted().get() == 1


def spans() -> int:
    gc.collect()
    return sum(isinstance(thing, Span) for thing in gc.get_objects())


@pytest.mark.requirement(
    "Trace: backward(retain_graph), zero_feedback, detach",
    "Trace's defect 8: a global graph grew without end",
)
def test_nothing_is_kept_after_a_run() -> None:
    """Trace's global graph grew with every run; spans end with their transcript."""
    before = spans()
    for _ in range(50):
        with transcript() as seen:
            add(1)
    del seen
    assert spans() <= before  # spans of other tests may end meanwhile
