"""sandbox="monty": trained code in its own interpreter, with the results of the process sandbox."""

from __future__ import annotations

import importlib.util
import math
import re
from typing import Any

import pytest

from aggregator import ConfigError, Module, ParameterNode, bundle
from aggregator.agents.code import CodeParameter
from aggregator.agents.sandbox import prepare
from aggregator.errors import SandboxError
from aggregator.sandbox.crossing import result_of
from aggregator.sandbox.limits import Limits, place_of, sandboxed
from aggregator.sandbox.monty import engine

needs_monty = pytest.mark.skipif(importlib.util.find_spec("pydantic_monty") is None, reason="the extra monty")

STOP = {"the"}
PREFIXES = ("re", "un")
VOWELS = re.compile("[aeiou]")


def shout(text: str) -> str:
    return text.upper()


class Agent(Module):
    step = 4

    def __init__(self) -> None:
        self.k = ParameterNode(3)
        self.title = "desk"
        self.client = object()

    def times(self, x: int) -> int:
        return x * self.step

    @bundle(trainable=True, sandbox="monty")
    def work(self, x: Any = 0, *, scale: int = 1) -> Any:
        """Work."""
        words = [word for word in ("the", "cat") if word not in STOP]
        return [x, self.k.data, self.title, self.times(2), shout(words[0]), VOWELS.sub("*", "oak"), PREFIXES, math.pi]

    @bundle(trainable=True, sandbox="monty")
    async def later(self, x: int) -> int:
        return x + self.times(1)


def trained(body: str) -> Agent:
    agent = Agent()
    lines = "\n".join(f"    {line}" for line in body.split("\n"))
    agent.parameters_dict()["work__code"].data = f"def work(self, x=0, *, scale=1):\n{lines}\n"
    return agent


@needs_monty
def test_changed_source_sees_what_the_author_s_own_sees() -> None:
    """Parameters, attributes, methods, functions, sets, tuples, patterns and modules are available."""
    agent = Agent()
    own = agent.work(1)
    agent.parameters_dict()["work__code"].data += "\n# changed"
    assert agent.work(1) == [*own[:6], list(PREFIXES), math.pi]


@needs_monty
async def test_async_code_runs_in_monty() -> None:
    """The result is the coroutine's."""
    agent = Agent()
    agent.parameters_dict()["later__code"].data = "async def later(self, x):\n    return self.times(x) + 1\n"
    assert await agent.later(2) == 9


@needs_monty
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("while True: pass", "it ran longer than 0.3 seconds"),
        ("return 'x' * (1 << 30)", "it used more than 64 MiB of memory"),
        ("return [[]] * 400000", "its result holds more than 250000 values"),
        ("return 'x' * (2 << 20)", "its result is larger than 1048576 bytes"),
        ("return 10**30", "its result cannot leave it"),
    ],
)
def test_its_limits_have_the_errors_of_the_process_sandbox(body: str, reason: str) -> None:
    """Time, memory, values and bytes of the result."""
    agent = trained(body)
    code = agent.parameters_dict()["work__code"]
    assert isinstance(code, CodeParameter)
    call = prepare(code.data, code.original, agent, (agent,), {}, Limits(seconds=0.3, output=1 << 20))
    with pytest.raises(SandboxError, match=f"Expected work to stay within its sandbox, but {reason}"):
        result_of(engine().run(call), call)


@needs_monty
@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("return open('/etc/passwd').read()", PermissionError),
        ("import os\nreturn os.environ", RuntimeError),
        ("import socket", ModuleNotFoundError),
        ("import ctypes", ModuleNotFoundError),
        ("return {}['missing']", KeyError),
        ("return self.client", AttributeError),
    ],
)
def test_it_has_no_access_and_its_errors_keep_their_types(body: str, error: type[Exception]) -> None:
    """No files, no environment, no network, no native code."""
    with pytest.raises(error) as raised:
        trained(body).work()
    assert vars(raised.value)["source_line"] == body.count("\n") + 2


@needs_monty
def test_the_context_manager_accepts_monty_too() -> None:
    """`sandboxed("monty")` applies to an operation without a sandbox argument."""

    class Plain(Module):
        @bundle(trainable=True)
        def half(self, x: int) -> float:
            return x / 2

    agent = Plain()
    agent.parameters()[0].data = "def half(self, x):\n    return x / 4\n"
    with sandboxed("monty"):
        assert agent.half(2) == 0.5


@pytest.mark.skipif(importlib.util.find_spec("pydantic_monty") is not None, reason="the extra monty is installed")
def test_without_the_extra_the_error_names_it() -> None:
    """There is no fallback to another engine."""
    with pytest.raises(ConfigError, match=r"pip install 'aggregated-update\[monty\]'"):
        trained("return 1").work()


def test_monty_is_used_on_request_only() -> None:
    """The default is the worker process, whether or not Monty is installed."""
    assert place_of("changed").engine == "process"
    assert place_of("monty").engine == "monty"
