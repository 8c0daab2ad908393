"""The process sandbox: trained code runs as it would here, every violation is an error, and the run continues."""

from __future__ import annotations

import asyncio
import importlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregator import ConfigError, Module, ParameterNode, bundle, transcript
from aggregator.errors import SandboxError
from aggregator.sandbox.limits import Limits, sandboxed
from aggregator.sandbox.pool import pool

WORDS = ["alpha", "beta"]
SMALL = Limits(seconds=0.3, memory=128 << 20, output=1 << 20)
PATIENT = Limits(seconds=30.0, memory=128 << 20, output=1 << 20)  # for a busy machine


class Agent(Module):
    def __init__(self) -> None:
        self.k = ParameterNode(3)
        self.title = "desk"
        self.client = object()

    @bundle(trainable=True, sandbox="process")
    def work(self, x: Any = 0, *, scale: int = 1) -> Any:
        """Work."""
        return [x, self.k.data, self.title, scale, WORDS, math.floor(2.5)]

    @bundle(trainable=True, sandbox=PATIENT)
    async def later(self, x: Any) -> Any:
        return x


def trained(body: str) -> Agent:
    agent = Agent()
    lines = "\n".join(f"    {line}" for line in body.split("\n"))
    agent.parameters_dict()["work__code"].data = f"def work(self, x=0, *, scale=1):\n{lines}\n"
    return agent


def trained_async(body: str) -> Agent:
    agent = Agent()
    lines = "\n".join(f"    {line}" for line in body.split("\n"))
    agent.parameters_dict()["later__code"].data = f"async def later(self, x):\n{lines}\n"
    return agent


@pytest.fixture(scope="module", autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    pool().close()


def processes_of(session: int) -> list[str]:
    """Return the live processes of a session, including zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            facts = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if entry.name.isdigit() and int(facts[3]) == session:
            found.append(entry.name)
    return found


def test_the_original_code_runs_in_the_sandbox() -> None:
    """Arguments, parameters, plain attributes, modules and constants of the module are available."""
    assert Agent().work({"a": (1, 2.5)}, scale=2) == [{"a": [1, 2.5]}, 3, "desk", 2, WORDS, 2]


def test_trained_code_runs_in_the_sandbox() -> None:
    """New source sees the same, in its own process."""
    agent = trained("import os, re\nreturn [x * self.k.data, scale, WORDS[0], math.pi, os.getpid(), re.escape('.')]")
    *values, pid, escaped = agent.work(2)
    assert (values, escaped) == ([6, 1, "alpha", math.pi], r"\.")
    assert pid != os.getpid()


async def test_asynchronous_code_runs_in_the_sandbox() -> None:
    """Async operations are awaited there; the event loop here continues."""
    assert await Agent().later([1]) == [1]
    agent = trained_async("import asyncio\nawait asyncio.sleep(0.05)\nreturn x + 1")
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    async with asyncio.TaskGroup() as group:
        ticking = group.create_task(tick())
        assert await agent.later(1) == 2
        ticking.cancel()
    assert ticks > 1


@pytest.mark.requirement("Trace's defect 33: a model's code ran without limits")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("while True: pass", "it ran longer than 0.3 seconds"),
        ("import time\ntime.sleep(60)", "it ran longer than 0.3 seconds"),
        ("return 'x' * (1 << 30)", "it used more than 128 MiB of memory"),
        ("bomb = []\nwhile True: bomb.append(bytearray(1 << 20))", "it used more than 128 MiB of memory"),
        ("import os\nwhile True: os.fork()", "it tried to use other processes (os.fork)"),
        ("import subprocess\nsubprocess.run(['true'])", "it tried to use other processes"),
        ("import os\nos.system('true')", "it tried to use other processes (os.system)"),
        ("import os\nos.kill(os.getppid(), 9)", "it tried to use other processes (os.kill)"),
        ("open('{path}', 'w')", "it tried to use the file system: writing '{path}'"),
        ("import os\nos.open('{path}', os.O_CREAT | os.O_RDWR)", "it tried to use the file system: writing"),
        ("import pathlib\npathlib.Path('{path}').mkdir()", "it tried to use the file system (os.mkdir)"),
        ("import shutil\nshutil.rmtree('{path}')", "it tried to use the file system"),
        ("return open('/etc/passwd').read()", "it tried to use the file system: reading '/etc/passwd'"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "it tried to use the network"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')", "it tried to use the network"),
        ("import ctypes", "it tried to use native code (import)"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "it tried to use its own limits"),
        ("import os\nos._exit(0)", "it ended its process with exit code 0 instead of returning"),
        ("import os, signal\nsignal.raise_signal(signal.SIGSEGV)", "its process was ended by SIGSEGV"),
        ("return 'x' * (2 << 20)", "its result is larger than 1048576 bytes"),
        ("return object()", "its result cannot leave it"),
        ("return 10**30", "its result cannot leave it"),
    ],
)
def test_a_violation_is_an_error_and_the_run_continues(body: str, reason: str, tmp_path: Path) -> None:
    """Each one is a SandboxError that is usable as feedback; nothing happened outside, and the next call works."""
    path = str(tmp_path / "made")
    agent = trained(body.replace("{path}", path))
    limits = SMALL if "longer than" in reason else PATIENT
    with sandboxed(limits), pytest.raises(SandboxError) as ended:
        agent.work()
    assert str(ended.value).startswith(
        "Expected work to stay within its sandbox, but " + reason.replace("{path}", path)
    )
    assert list(tmp_path.iterdir()) == []
    assert Agent().work()[1] == 3


def test_a_hidden_refusal_is_reported() -> None:
    """Code that catches the refusal and returns a value still fails."""
    with pytest.raises(SandboxError, match="it tried to use the network"):
        trained("import socket\ntry:\n    socket.socket()\nexcept Exception:\n    return 'fine'").work()


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="the filter is for x86-64 Linux")
@pytest.mark.parametrize("body", ["import _thread\n_thread.start_new_thread(print, ())"])
def test_the_kernel_refuses_what_the_hook_does_not_see(body: str) -> None:
    """Calls without an audit event are refused by the system call filter."""
    with pytest.raises((RuntimeError, SandboxError), match="thread"):
        trained(body).work()


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("y = 0\nreturn 1 / y", ZeroDivisionError, "division by zero"),
        ("return {}['missing']", KeyError, "'missing'"),
        ("return self.client", AttributeError, "self.client is not available in the sandbox"),
        ("return helper(x)", NameError, "name 'helper' is not defined"),
        ("return b'\\xff'.decode()", UnicodeDecodeError, "invalid start byte"),
        ("class MineError(Exception): ...\nraise MineError('own')", SandboxError, "work failed with MineError: own"),
        ("raise SystemExit(3)", SandboxError, "work failed with SystemExit: 3"),
        ("def deeper(n): return deeper(n + 1)\nreturn deeper(0)", RecursionError, "maximum recursion depth"),
    ],
)
def test_errors_of_the_code_are_the_agents_own(body: str, error: type[Exception], message: str) -> None:
    """A builtin exception keeps its class, any other becomes a SandboxError that names it."""
    with pytest.raises(error, match=message):
        trained(body).work()


def test_the_transcript_shows_the_line() -> None:
    """A sandboxed error has its line in the source, like one from this process."""
    with transcript() as seen, pytest.raises(ZeroDivisionError):
        trained("y = 0\nreturn 1 / y").work(1)
    assert seen.render() == (
        "Agent.work: Work.\n  x: 1\n  raised: ZeroDivisionError: division by zero (line 3: return 1 / y)"
    )


@pytest.mark.parametrize(
    "definition",
    [
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    n: int = 1",
        "from typing import NamedTuple\nclass P(NamedTuple):\n    n: int",
        "from msgspec import Struct\nclass P(Struct):\n    n: int",
    ],
    ids=["data class", "named tuple", "struct"],
)
def test_code_that_defines_a_data_class_failed(definition: str) -> None:
    """Its annotations are texts, which are looked up in its module."""
    assert trained(f"{definition}\nreturn P(x).n").work(5) == 5


def test_every_call_starts_with_a_clean_state() -> None:
    """Changes of modules or globals in one call do not reach another, in any worker."""
    agent = trained(
        "import json\njson.seen = getattr(json, 'seen', 0) + 1\nWORDS.append('x')\nreturn json.seen, len(WORDS)"
    )
    assert [agent.work() for _ in range(4)] == [[1, 3]] * 4
    assert WORDS == ["alpha", "beta"]


def test_the_order_of_sets_is_the_same_in_all_workers() -> None:
    """Results therefore do not depend on the worker."""
    agent = trained("return list({str(i) for i in range(50)})")
    orders = []
    for _ in range(2):
        pool().close()  # the next call starts a new worker
        orders.append(agent.work())
    assert orders[0] == orders[1]


def test_secrets_are_not_in_the_workers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's environment has none of the parent's keys."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    pool().close()
    assert "sk-secret" not in str(trained("import os\nreturn dict(os.environ)").work())


API_KEY = "canary-of-the-module"
SERVICES = {"crm": {"token": "canary-in-a-dict", "region": "eu"}, "keys": ["sk-canary-in-a-list"]}


def ask_service(question: str) -> str:
    return f"{API_KEY}: {question}"


class Client(Module):
    token = "canary-of-the-class"

    def __init__(self) -> None:
        self.api_key = "canary-of-the-instance"
        self.options = {"auth_token": "canary-in-an-attribute"}
        self.keywords = ["refund", "late delivery"]

    def signed(self, text: str) -> str:
        return f"{self.api_key} {text}"

    @bundle(trainable=True, sandbox="process")
    def work(self) -> Any:
        return self.keywords

    @bundle(trainable=True, sandbox="process")
    def ask(self) -> Any:
        return [ask_service("x"), self.signed("y"), SERVICES["keys"]]


SEARCHES = [
    "return API_KEY",
    "return SERVICES",
    "return ask_service('x')",
    "return ask_service.__globals__['API_KEY']",
    "return self.api_key",
    "return self.options",
    "return self.token",
    "return self.signed('x')",
    "return vars(self)",
    "import gc\n    return [str(found) for found in gc.get_objects() if 'can' + 'ary' in str(found)]",
]


@pytest.mark.parametrize("body", SEARCHES)
def test_changed_source_read_secrets_that_the_author_s_own_does_not_use(body: str) -> None:
    """Keys in variables, containers, attributes and helpers are not sent, however the code looks for them."""
    agent = Client()
    agent.parameters_dict()["work__code"].data = f"def work(self):\n    {body}\n"
    try:
        found = str(agent.work())
    except (LookupError, NameError, AttributeError, SandboxError) as error:
        found = str(error)
    assert "canary-" not in found


def test_secrets_that_the_author_s_own_source_uses_are_sent() -> None:
    """The original operation works, and so does changed source that uses the same names."""
    expected = ["canary-of-the-module: x", "canary-of-the-instance y", ["sk-canary-in-a-list"]]
    agent = Client()
    assert agent.ask() == expected
    agent.parameters_dict()["ask__code"].data += "    # changed\n"
    assert agent.ask() == expected


def test_plain_attributes_are_sent_whatever_their_name() -> None:
    """A list of keywords is not a secret, although its name begins with `key`."""
    agent = Client()
    agent.parameters_dict()["work__code"].data = "def work(self):\n    return sorted(self.keywords)\n"
    assert agent.work() == ["late delivery", "refund"]


def test_a_user_s_module_that_only_changed_source_names_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing it would run it outside the sandbox, and expose its content."""
    (tmp_path / "canary_settings.py").write_text("PASSWORD = 'canary'\n")
    (tmp_path / "canary_agent.py").write_text(
        "import canary_settings, math\nfrom aggregator import Module, bundle\n\n\n"
        "class Agent(Module):\n    @bundle(trainable=True)\n    def work(self, x):\n        return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    agent = importlib.import_module("canary_agent").Agent()
    code = agent.parameters_dict()["work__code"]
    code.data = "def work(self, x):\n    return canary_settings.PASSWORD\n"
    with pytest.raises(SandboxError, match="a module of your own that the source as written does not use"):
        agent.work(1)
    code.data = "def work(self, x):\n    return math.floor(x)\n"
    assert agent.work(1.5) == 1


@pytest.mark.parametrize("argument", [object(), {1, 2}, [object()], Agent()])
def test_arguments_that_cannot_be_sent_are_the_authors_error(argument: Any) -> None:
    """An argument that is not plain data is refused before anything runs, with what can be sent."""
    with pytest.raises(ConfigError, match="Expected argument 0 of work to be None, bool"):
        Agent().work(argument)


def test_sandbox_arguments_are_validated() -> None:
    """An unknown word, a limit of 0, and a sandbox for code that is not trained are refused."""
    with pytest.raises(ConfigError, match="Expected sandbox=None, 'process' or Limits"):
        bundle(trainable=True, sandbox="thread")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="Expected trainable=True with sandbox"):
        bundle(sandbox="process")
    with pytest.raises(ConfigError, match=r"Expected Limits\(seconds=...\) of at least 0.001, got 0"):
        Limits(seconds=0)


def test_the_context_manager_sandboxes_every_trainable_operation() -> None:
    """`sandboxed()` applies to operations without a sandbox argument, and only in its context."""

    class Plain(Module):
        @bundle(trainable=True)
        def where(self) -> int:
            import os

            return os.getpid()

    agent = Plain()
    assert agent.where() == os.getpid()
    with sandboxed():
        assert agent.where() != os.getpid()
    assert agent.where() == os.getpid()


async def test_cancelling_kills_the_worker() -> None:
    """A cancelled call ends at once, with its process, and the next call works."""
    agent = trained_async("import time\nwhile True: time.sleep(1)")
    with sandboxed(Limits(seconds=3600)), pytest.raises(TimeoutError):  # without cancellation it would not end
        async with asyncio.timeout(0.2):
            await agent.later(1)
    pool().close()
    assert await Agent().later(2) == 2


async def test_more_concurrent_calls_than_workers() -> None:
    """Of 64 concurrent calls, good and bad mixed, each gets its own answer, in order."""
    good, bad = trained_async("return x + 1"), trained_async("raise ValueError(x)")

    async def one(i: int) -> Any:
        try:
            return await (bad if i % 4 == 0 else good).later(i)
        except ValueError as error:
            return str(error)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(i)) for i in range(64)]
    assert [task.result() for task in tasks] == [str(i) if i % 4 == 0 else i + 1 for i in range(64)]


def test_calls_from_threads() -> None:
    """Concurrent calls of threads each get their own answer."""
    results: dict[int, Any] = {}
    agent = trained("return x * 2")

    def one(i: int) -> None:
        results[i] = agent.work(i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: 2 * i for i in range(8)}


def test_a_worker_that_dies_is_replaced() -> None:
    """A worker killed while idle is an error for at most one call, and leaves no zombie."""
    Agent().work()
    (session, *_) = [worker.process.pid for worker in pool()._idle]
    os.killpg(session, signal.SIGKILL)
    outcomes = []
    for _ in range(pool().size + 1):
        try:
            outcomes.append(Agent().work()[1])
        except SandboxError as error:
            outcomes.append(str(error))
    assert outcomes[-1] == 3
    assert sum(isinstance(outcome, str) for outcome in outcomes) <= 1
    pool().close()
    assert processes_of(session) == []


def test_no_process_outlives_the_program() -> None:
    """Workers end with the process that started them, even if that is killed during a call."""
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import test_sandbox
from aggregator.sandbox.limits import Limits, sandboxed
from aggregator.sandbox.pool import pool
agent = test_sandbox.trained("import time\\nwhile True: time.sleep(1)")
test_sandbox.Agent().work()
print(pool()._idle[0].process.pid, flush=True)
with sandboxed(Limits(seconds=0.2)):
    agent.work()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    session = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    while processes_of(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(session) == []
