"""Code that training writes: sandboxed by default, checked before a run, loaded from files only with permission."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from aggregator import (
    LLM,
    AggregatedUpdate,
    ConfigError,
    LLMOptimizer,
    Module,
    ParameterNode,
    as_model,
    bundle,
    cassette,
)
from aggregator.agents.code import source_digest
from aggregator.agents.sandbox import uses_of
from aggregator.errors import TrainingError
from aggregator.observing.observer import Observer
from aggregator.records import HTTPReply, RunInfo
from aggregator.sandbox.limits import sandboxed
from aggregator.sandbox.pool import pool
from aggregator.testing import FakeTransport
from aggregator.training.parts import check_code

CACHE: dict[str, str] = {}
STOP = {"the"}
PATTERN = re.compile("a+")


class Client:
    def complete(self, text: str) -> str:
        return text


CLIENT = Client()


@dataclass
class Ticket:
    text: str


def lower(text: str) -> str:
    return " ".join(word for word in text.lower().split() if word not in STOP)


@pytest.fixture(scope="module", autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    pool().close()


class Base(Module):
    limit = 3

    def __init__(self) -> None:
        self.k = ParameterNode(3)
        self.words = ["a"]
        self.llm = CLIENT
        self.count = 0

    def helper(self, text: str) -> str:
        return lower(text)[: self.limit]


def problems(agent: Module) -> str:
    with pytest.raises(ConfigError) as raised:
        check_code(agent, agent.parameters())
    return str(raised.value)


def test_an_operation_that_awaits_is_named() -> None:
    """A sandbox has no access to awaitables of this process."""

    class Agent(Base):
        @bundle(trainable=True)
        async def op(self, x: str) -> str:
            await asyncio.sleep(0)
            return x

    text = problems(Agent())
    assert text.startswith("Expected trainable operations that can run in a sandbox")
    assert "Agent.op awaits (line 2)" in text
    assert "set sandbox=None in its @bundle" in text


def test_an_operation_that_calls_a_model_is_named() -> None:
    """The model may be on the instance, in the module, or imported inside."""

    class Agent(Base):
        @bundle(trainable=True)
        def one(self, x: str) -> str:
            return self.llm.complete(x)

        @bundle(trainable=True)
        def two(self, x: str) -> str:
            return CLIENT.complete(x)

        @bundle(trainable=True)
        def three(self, x: str) -> str:
            from aggregator import LLM

            return LLM()(x).text

    text = problems(Agent())
    assert "Agent.one uses self.llm, a value of the type Client (line 2)" in text
    assert "Agent.two uses CLIENT, a value of the type Client (line 2)" in text
    assert "Agent.three imports aggregator (line 2)" in text


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("self.count += 1", "changes self.count"),
        ("self.count = len(x)", "changes self.count"),
        ("self.words[0] = x", "changes self.words"),
        ("self.words.append(x)", "changes self.words"),
        ("del self.words[0]", "changes self.words"),
        ("self.k.data = 4", "changes self.k"),
        ("for self.count in range(3): pass", "changes self.count"),
        ("setattr(self, 'count', 1)", "changes self"),
        ("CACHE[x] = x", "changes CACHE of its module"),
        ("CACHE.update({x: x})", "changes CACHE of its module"),
        ("global CACHE\n    CACHE = {}", "changes CACHE of its module"),
        ("super().__init__()", "uses super()"),
        ("me = self\n    me.count = 1", "changes self.count"),
        ("words = self.words\n    words.append(x)", "changes self.words"),
        ("cache = CACHE\n    cache[x] = x", "changes CACHE of its module"),
        ("a = self\n    a = a.words\n    a.append(x)", "changes self.words"),
        ("yield x", "is a generator"),
    ],
)
def test_a_side_effect_of_an_operation_is_named(body: str, what: str, tmp_path: Path) -> None:
    """In a sandbox such a change is lost with the process."""
    module, indented = tmp_path / "changing.py", body.replace("\n", "\n    ")
    module.write_text(
        "from test_trained_code import Base, bundle\nCACHE = {}\nclass Agent(Base):\n"
        f"    @bundle(trainable=True)\n    def op(self, x: str) -> str:\n        {indented}\n"
        "        return x\n"
    )
    space: dict[str, Any] = {"__name__": "changing"}
    import linecache

    linecache.cache.pop(str(module), None)
    exec(compile(module.read_text(), str(module), "exec"), space)
    assert f"Agent.op {what}" in problems(space["Agent"]())


def test_arguments_and_values_that_cannot_be_sent_are_named() -> None:
    """The value's class is the user's own, as an annotation or used inside."""

    class Agent(Base):
        @bundle(trainable=True)
        def op(self, x: Ticket) -> str:
            return Ticket(x.text).text

    text = problems(Agent())
    assert "takes x: Ticket" in text
    assert "uses Ticket, the class Ticket (line 2)" in text


@pytest.mark.parametrize(
    "body",
    [
        "words = list(self.words)\n    words.append(x)",
        "words = self.words\n    words = sorted(words)\n    words.append(x)",
        "words = self.words\n    for words in [[]]: words.append(x)",
        "a = x\n    b = a\n    a = b\n    a.append(x)",
        "count = self.count\n    count += 1",
    ],
)
def test_changes_of_local_names_are_allowed(body: str) -> None:
    """A copy, a new value under the same name and a number may change."""
    assert not uses_of(f"def op(self, x):\n    {body}\n    return x", is_method=True).problems


def test_what_can_be_sent_to_a_sandbox() -> None:
    """Functions, sets, patterns, methods, class attributes, imports of the module, and typed arguments can be sent."""

    class Agent(Base):
        @bundle(trainable=True)
        def op(self, x: str | None, n: list[int] = []) -> str:  # noqa: B006
            return (
                lower(x or "") + str(PATTERN.sub("", "a")) + self.helper("b") + str(self.limit + self.k.data) + os.sep
            )

    agent = Agent()
    check_code(agent, agent.parameters())
    own = agent.op("The Cat")
    agent.parameters_dict()["op__code"].data += "\n# changed"
    assert agent.op("The Cat") == own


def test_a_long_source_is_checked_without_recursion() -> None:
    """600 terms are 600 levels of its tree."""
    agent = Cleaner()
    agent.parameters()[0].data = f"def clean(self, x):\n    return x + {' + '.join(['1'] * 600)}\n"
    check_code(agent, agent.parameters())
    assert agent.clean(1) == 601  # type: ignore[arg-type, comparison-overlap]


def test_sandbox_none_turns_the_checks_off() -> None:
    """Code that runs in this process may await, call and change anything."""

    class Agent(Base):
        @bundle(trainable=True, sandbox=None)
        def op(self, x: str) -> str:
            self.count += 1
            return self.llm.complete(x)

    agent = Agent()
    check_code(agent, agent.parameters())
    agent.parameters_dict()["op__code"].data += "\n# changed"
    assert (agent.op("x"), agent.count) == ("x", 1)


def test_only_trainable_operations_are_checked() -> None:
    """An operation that the optimizer does not change is not checked."""

    class Agent(Base):
        @bundle(trainable=True)
        def op(self, x: str) -> str:
            return self.llm.complete(x)

    agent = Agent()
    check_code(agent, [agent.k])
    with sandboxed(None):
        check_code(agent, agent.parameters())


class Cleaner(Module):
    @bundle(trainable=True)
    def clean(self, x: str) -> str:
        """Prepare."""
        return x

    async def forward(self, x: str) -> str:
        return self.clean(x)


class Open(Cleaner):
    @bundle(trainable=True, sandbox=None)
    def clean(self, x: str) -> str:
        """Prepare."""
        return x


def model(body: str) -> Any:
    def reply(messages: Any, **_: Any) -> str:
        source = f"def clean(self, x):\n    {body}\n    return x.upper()\n"
        return json.dumps({"suggestion": {"clean__code": source}, "reasoning_clean__code": "x"})

    return as_model(reply)


def guide(x: str, output: str, info: str) -> float:
    return float(output == info)


def train(agent: Module, llm: Any, **options: Any) -> Any:
    trainer = AggregatedUpdate(agent, LLMOptimizer(llm=llm), llm=llm, observers=options.pop("observers", None))
    return trainer.train(guide, [("a", "A"), ("b", "B")], batch_size=2, num_epochs=1, verbose=False, **options)


def test_training_refuses_before_anything_is_paid_for() -> None:
    """The agent is not run and the model is not called."""
    asked = []

    class Agent(Base):
        @bundle(trainable=True)
        def op(self, x: str) -> str:
            return self.llm.complete(x)

        def forward(self, x: str) -> str:
            asked.append(x)
            return self.op(x)

    def reply(messages: Any, **_: Any) -> str:
        asked.append("model")
        return "TERMINATE"

    with pytest.raises(ConfigError, match=r"Agent.op uses self.llm.*sandbox=None"):
        train(Agent(), as_model(reply))
    assert asked == []


def test_an_endless_suggestion_becomes_feedback_by_default() -> None:
    """One `while True` in a suggestion used to hang a run."""
    agent = Cleaner()
    with sandboxed("process"):
        pass  # the default needs no option
    result = train(agent, model("import os; os._exit(3)"), max_failure_ratio=1.0)
    assert result.parameters["clean__code"].count("_exit") == 1
    with pytest.raises(Exception, match="it ended its process with exit code 3"):
        agent.clean("x")


def test_the_author_s_own_source_runs_in_this_process() -> None:
    """Only code that training changed runs in a worker."""

    class Where(Module):
        @bundle(trainable=True)
        def where(self) -> int:
            return os.getpid()

    agent = Where()
    assert agent.where() == os.getpid()
    agent.parameters()[0].data += "\n# changed"
    assert agent.where() != os.getpid()


def test_the_run_s_record_shows_where_code_runs() -> None:
    """Observers get it at the start, for a run's manifest."""
    seen: list[RunInfo] = []

    class Watch(Observer):
        def started(self, info: RunInfo, /) -> None:
            seen.append(info)

    for agent in (Cleaner(), Open()):
        train(agent, model("pass"), observers=[Watch()])
    with sandboxed("process"):
        train(Cleaner(), model("pass"), observers=[Watch()])
    assert [dict(info.sandboxes) for info in seen] == [
        {"clean__code": "process"},
        {"clean__code": "none"},
        {"clean__code": "process"},
    ]


@pytest.mark.skipif(importlib.util.find_spec("pydantic_monty") is None, reason="the extra monty")
def test_monty_is_recorded_in_the_run_s_folder(tmp_path: Path) -> None:
    """Another interpreter may give other results, so a resume compares its name and version."""
    with sandboxed("monty"):
        train(Cleaner(), model("pass"), run_dir=tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "checkpoint.json").read_text())["fingerprint"]
    assert kept["sandbox"] == f"clean__code in monty {version('pydantic-monty')}"
    train(Cleaner(), model("pass"), run_dir=tmp_path / "other")
    assert "sandbox" not in json.loads((tmp_path / "other" / "checkpoint.json").read_text())["fingerprint"]


CHANGED = 'def clean(self, x: str) -> str:\n    """Prepare."""\n    return x.upper()\n'


def saved(tmp_path: Path, source: str = CHANGED) -> Path:
    agent = Open()
    agent.parameters()[0].data = source
    agent.save(tmp_path / "agent.json")
    return tmp_path / "agent.json"


def test_sandboxed_code_loads_without_permission(tmp_path: Path) -> None:
    """It runs in a worker, wherever it comes from."""
    agent = Cleaner()
    agent.load(saved(tmp_path))
    assert agent.clean("a") == "A"


def test_code_of_a_file_for_this_process_needs_permission(tmp_path: Path) -> None:
    """The error names the sha256 that permits exactly this source; nothing was loaded."""
    path, agent = saved(tmp_path), Open()
    with pytest.raises(ConfigError, match=r"code=True or code='ask'.*clean__code has sandbox=None") as raised:
        agent.load(path)
    assert agent.clean("a") == "a"
    found = re.search(r"[0-9a-f]{64}", str(raised.value))
    assert found is not None
    assert found[0] == source_digest(CHANGED)
    for code in (True, found[0], [found[0], "0" * 64]):
        agent = Open()
        agent.load(path, code=code)
        assert agent.clean("a") == "A"
    with pytest.raises(ConfigError, match="clean__code has sandbox=None"):
        agent.load(path, code="0" * 64)


def test_a_file_with_the_author_s_own_code_loads_without_permission(tmp_path: Path) -> None:
    """Its code is part of the program already."""
    Open().save(tmp_path / "own.json")
    assert Open().load(tmp_path / "own.json") == {}


@pytest.mark.parametrize("code", ["yes", "abc", 1, ["x"], [], None, {"0" * 63}])
def test_permissions_for_code_are_validated(code: Any, tmp_path: Path) -> None:
    """An invalid permission is an error, and permits nothing."""
    with pytest.raises(ConfigError, match="Expected code=True, False, 'ask', or the sha256"):
        Open().load(saved(tmp_path), code=code)
    with pytest.raises(ConfigError, match="Expected code=True, False, 'ask', or the sha256"):
        cassette(tmp_path / "tape.yaml", code=code)


ASKING = """
import sys
sys.path.insert(0, sys.argv[1])
from test_trained_code import Open
agent = Open()
try:
    agent.load(sys.argv[2], code="ask")
    print("RAN", agent.clean("a"))
except Exception as error:
    print("REFUSED", str(error)[:60])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
@pytest.mark.parametrize(("answer", "outcome"), [("y\n", "RAN A"), ("n\n", "REFUSED"), ("\n", "REFUSED")])
def test_ask_shows_the_source_on_a_terminal(answer: str, outcome: str, tmp_path: Path) -> None:
    """Only "y" or "yes" lets it run; escape sequences in the source are printed as text."""
    import pty

    source = CHANGED.replace("Prepare.", "Prepare.\\x1b[2J")
    path = saved(tmp_path, source.replace("\\x1b", "\x1b"))
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", ASKING, str(Path(__file__).parent), str(path)])
    seen = b""
    while b"[y/N]" not in seen:
        seen += os.read(terminal, 1 << 12)
    os.write(terminal, answer.encode())
    with suppress(OSError):  # Linux reports it if the other side has closed the terminal
        while piece := os.read(terminal, 1 << 12):
            seen += piece
    os.waitpid(pid, 0)
    os.close(terminal)
    assert outcome.encode() in seen
    assert b"return x.upper()" in seen
    assert b"\x1b[2J" not in seen


def test_ask_without_a_terminal_is_an_error(tmp_path: Path) -> None:
    """A background program does not wait for an answer for ever."""
    with pytest.raises(ConfigError, match="Expected a terminal for code='ask', got none"):
        Open().load(saved(tmp_path), code="ask")


def recorded_training(path: Path, agent: Module, **options: Any) -> Any:
    """Train with replies from a fake server, recorded to a cassette and replayed from it."""
    source = CHANGED
    reply = json.dumps({"suggestion": {"clean__code": source}, "reasoning_clean__code": "x"})
    transport = FakeTransport(lambda _: reply)
    llm = LLM("openai/gpt-4o-mini", api_key="none", transport=transport)
    with cassette(path, mode="once", **options):
        return train(agent, llm)


def test_replay_runs_code_in_this_process_only_with_permission(tmp_path: Path) -> None:
    """Recording does not ask, because the suggestion is live; a replay does."""
    path = tmp_path / "tape.yaml"
    first = recorded_training(path, Open())
    assert first.parameters["clean__code"] == CHANGED
    with pytest.raises(ConfigError, match=r"source from the recording .*tape.yaml.* in this process"):
        recorded_training(path, Open())
    for code in (True, source_digest(CHANGED)):
        assert recorded_training(path, Open(), code=code).parameters == first.parameters
    recorded_training(tmp_path / "other.yaml", Cleaner())
    assert recorded_training(tmp_path / "other.yaml", Cleaner()).parameters == first.parameters


def test_a_run_s_own_journal_is_trusted_by_its_resume(tmp_path: Path) -> None:
    """What a run wrote itself is replayed without permission."""
    llm = model("pass")
    first = train(Open(), llm, run_dir=tmp_path / "run")
    again = train(Open(), llm, run_dir=tmp_path / "run", resume=True)
    assert again.parameters == first.parameters


def test_a_run_that_was_cut_off_replays_its_own_code(tmp_path: Path) -> None:
    """The second proposal failed, the first one is in the journal: it was paid for and is trusted."""
    reply = json.dumps({"suggestion": {"clean__code": CHANGED}, "reasoning_clean__code": "x"})
    refused = HTTPReply(status=401, body=b'{"error": {"message": "no"}}', headers={})

    def attempt(*answers: Any, resume: bool) -> tuple[Any, int]:
        transport = FakeTransport(*answers)
        llm = LLM("openai/gpt-4o-mini", api_key="none", transport=transport)
        trainer = AggregatedUpdate(Open(), LLMOptimizer(llm=llm), llm=llm)
        data = [("a", "A"), ("b", "B")]
        try:
            result = trainer.train(
                guide, data, batch_size=2, max_concurrency=1, run_dir=tmp_path / "run", resume=resume
            )
        except TrainingError:
            result = None
        return result, len(transport.requests)

    assert attempt(reply, refused, resume=False) == (None, 2)
    result, asked = attempt(reply, resume=True)
    assert result.parameters == {"clean__code": CHANGED}
    assert asked >= 1


def test_values_of_the_environment_are_redacted_in_results_of_trained_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the output or error of trained code would reach prompts and recordings."""
    monkeypatch.setenv("MY_API_KEY", "canary-4711")
    agent = Open()
    code = agent.parameters()[0]
    code.data = "def clean(self, x):\n    import os\n    return [x, {'k': 'is ' + os.environ['MY_API_KEY']}]\n"
    assert str(agent.clean("a")) == str(["a", {"k": "is REDACTED"}])
    code.data = "def clean(self, x):\n    import os\n    raise ValueError('is ' + os.environ['MY_API_KEY'])\n"
    with pytest.raises(ValueError, match="is REDACTED"):
        agent.clean("a")
    code.data = "def clean(self, x):\n    return x"
    given: Any = ["a", {"b": 1}]
    given.append(given)
    assert agent.clean(given) is given
