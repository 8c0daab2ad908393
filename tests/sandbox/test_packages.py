"""Packages in the process sandbox: what trained code may import, and numbers of packages as results."""

from __future__ import annotations

from typing import Any

import pytest
from sandboxed_agents import Lazy, plain_agent

from aggregator import ConfigError, Module, bundle
from aggregator.errors import SandboxError
from aggregator.sandbox.limits import Limits
from aggregator.sandbox.pool import pool

np = pytest.importorskip("numpy")
PATIENT = Limits(seconds=30.0)  # for a busy machine


class Agent(Module):
    """An agent whose module imports numpy."""

    @bundle(trainable=True, sandbox=PATIENT)
    def total(self, n: int) -> Any:
        """Sum up a product of matrices."""
        square = np.ones((n, n))
        return float((square @ square).sum())


class Importing(Module):
    """Imports a module of the user's own when it is called."""

    @bundle(trainable=True, sandbox=PATIENT)
    def louder(self, x: str) -> str:
        """Say it louder."""
        import sandboxed_agents

        return sandboxed_agents.shout(x)


def trained(body: str) -> Agent:
    agent = Agent()
    agent.parameters_dict()["total__code"].data = f"def total(self, n):\n    {body}\n"
    return agent


@pytest.fixture(scope="module", autouse=True)
def _no_worker_is_left() -> Any:
    yield
    pool().close()


def test_a_product_of_matrices_hung_in_the_sandbox() -> None:
    """The threads of a numeric library end in the fork, and the child waited for them up to its time limit."""
    assert Agent().total(600) == 600.0**3


@pytest.mark.parametrize(
    "body",
    ["import numpy; return int(numpy.arange(n).sum())", "from numpy.linalg import norm; return int(norm([n + 6.0]))"],
)
def test_an_import_of_a_package_that_the_module_uses_failed(body: str) -> None:
    """Packages that the operation's module imports are loaded before the worker is closed."""
    assert trained(body).total(4) in (6, 10)


def test_an_import_that_the_original_source_makes_failed() -> None:
    """A package that only the operation itself imports is known from its source."""
    agent = Lazy()
    agent.parameters_dict()["mean__code"].data = "def mean(self, xs):\n    import numpy\n    return numpy.median(xs)\n"
    assert agent.mean([1.0, 2.0, 9.0]) == 2.0


def test_an_import_of_the_users_own_module_within_the_operation_failed() -> None:
    """The operation as written imports it when it is called; so may changed source."""
    agent = Importing()
    assert agent.louder("ha") == "HA"
    agent.parameters_dict()[
        "louder__code"
    ].data = "def louder(self, x):\n    import sandboxed_agents as own\n    return own.shout(x) * 2\n"
    assert agent.louder("ha") == "HAHA"


def test_a_users_module_that_only_changed_source_imports() -> None:
    """It cannot be read, and the error says why and names the remedy."""
    agent = trained("import sandboxed_agents; return sandboxed_agents.shout('a')")
    with pytest.raises(SandboxError, match=r"while it imported sandboxed_agents; .*Limits\(packages="):
        agent.total(1)


def test_the_refusal_of_an_import_named_no_remedy() -> None:
    """It named a call inside the package (`os.putenv`); now it names the package and both remedies.

    A worker that has imported the package for another operation makes no difference.
    """
    assert trained("return float(np.float64(n))").total(1) == 1.0
    agent = plain_agent(Limits(seconds=30.0))
    agent.parameters_dict()["work__code"].data = "def work(self, x):\n    import numpy\n    return numpy.sum(x)\n"
    remedy = r"while it imported numpy; import it in the operation as you wrote it, or .*Limits\(packages=\['numpy'\]\)"
    with pytest.raises(SandboxError, match=remedy):
        agent.work([1, 2])
    permitted = plain_agent(Limits(seconds=30.0, packages=["numpy"]))
    permitted.parameters_dict()["work__code"].data = agent.parameters_dict()["work__code"].data
    assert permitted.work([1, 2]) == 3


@pytest.mark.parametrize("body", ["import nothing_of_this_name", "import numpy.nothing_of_this_name"])
def test_a_missing_module_is_the_codes_own_error(body: str) -> None:
    """As without a sandbox; the worker is not lost by it."""
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        trained(body).total(1)


def test_modules_of_python_that_can_start_processes_may_be_imported() -> None:
    """`import asyncio` was refused because it imports `subprocess`; only its use is refused."""
    assert trained("import asyncio, subprocess; return n").total(1) == 1
    with pytest.raises(SandboxError, match="other processes"):
        trained("import asyncio, subprocess; return subprocess.run(['true']).returncode").total(1)


@pytest.mark.parametrize(
    ("result", "plain"),
    [
        ("np.float64(1.5)", 1.5),
        ("np.int64(3)", 3),
        ("{'a': np.bool_(True), 'b': np.float32(0.5)}", {"a": True, "b": 0.5}),
        ("np.ones((2, 2))", [[1.0, 1.0], [1.0, 1.0]]),
        ("[np.str_('x')]", ["x"]),
        ("range(3)", [0, 1, 2]),
        ("__import__('collections').deque([1])", [1]),
        ("{'a': 1}.items()", [["a", 1]]),
        ("type('Text', (str,), {})('x')", "x"),
    ],
)
def test_numbers_of_numpy_could_not_leave_the_sandbox(result: str, plain: Any) -> None:
    """A mean is a numpy.float64, which is no plain number for msgpack; results arrive as Python's own."""
    got = trained(f"return {result}").total(1)
    assert got == plain
    assert type(got) is type(plain)


@pytest.mark.parametrize("packages", ["numpy", [3], ["not a name"]])
def test_invalid_packages_are_refused(packages: Any) -> None:
    """One name as text would be read as letters."""
    with pytest.raises(ConfigError, match=r"Expected Limits\(packages=...\) as a list of names"):
        Limits(packages=packages)
