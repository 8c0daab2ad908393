"""Rollouts in worker processes: the same results, one owner of models and budget, and no process left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from process_parts import BASE_URL, Adder, Asking, Judging, Located, Noting, Odd, Raising, Scripted, even, tasks

from aggregator import LLM, Budget, as_model, cassette, portal
from aggregator.adapters.agents import as_agent
from aggregator.errors import AggregatorError, BudgetExceededError, CassetteMissError, ConfigError
from aggregator.executors.local import LocalExecutor
from aggregator.executors.process import ProcessExecutor
from aggregator.executors.work import AgentWork
from aggregator.llm.ledger import Price, collecting
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest, Rollout, Usage
from aggregator.sandbox.limits import sandboxed

KEY = "sk-process-1f8a7b6c5d4e"
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def executor() -> Iterator[ProcessExecutor]:
    with ProcessExecutor(2) as shared:
        yield shared


def work(agent: Any, guide: Any = even) -> AgentWork:
    return AgentWork(as_agent(agent), guide)


def outputs(rollouts: list[Rollout]) -> list[Any]:
    return [rollout.output for rollout in rollouts]


def client(*texts: str, **options: Any) -> tuple[LLM, Scripted]:
    transport = Scripted(*texts)
    return LLM("openai-compatible/tiny", base_url=BASE_URL, api_key=KEY, transport=transport, **options), transport


def is_running(pid: int) -> bool:
    """Return True for a process that is neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def gone(pid: int) -> bool:
    """Return True once a process has ended, within ten seconds."""
    for _ in range(200):
        if not is_running(pid):
            return True
        await asyncio.sleep(0.05)
    return False


def content(path: Path) -> str:
    return path.read_text() if path.exists() else ""


async def written(path: Path) -> str:
    """Return a file's content, once it exists."""
    while not content(path):  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.01)
    return content(path)


async def test_results_are_in_the_order_of_the_tasks(executor: ProcessExecutor) -> None:
    """Rollouts equal the local executor's in any order of completion, and two processes work."""
    agent = Adder()
    local = await LocalExecutor().map(work(agent), tasks(*range(9)))
    remote = await executor.map(work(agent), tasks(*range(9)))
    assert [(one.output, one.score, one.feedback, one.transcript) for one in remote] == [
        (one.output, one.score, one.feedback, one.transcript) for one in local
    ]
    pids = set(outputs(await executor.map(work(Located()), tasks(*range(6)))))
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert await executor.map(work(agent), []) == []


async def test_the_agent_is_sent_once_to_each_worker(executor: ProcessExecutor, tmp_path: Path) -> None:
    """In several calls of `map`, and with two guides, each worker unpickles the agent once."""
    agent = as_agent(Noting(tmp_path / "notes"))
    for guide in (even, None, even):
        await executor.map(AgentWork(agent, guide), tasks(*range(4)))
    notes = (tmp_path / "notes").read_text().split()
    assert len(notes) == len(set(notes)) == 2


async def test_values_override_a_workers_parameters(executor: ProcessExecutor) -> None:
    """This includes code; a task without values gets the agent's current ones, even if it was sent before."""
    agent = Adder()
    job = work(agent)
    code = "def twist(self, x: int) -> int:\n    return x * 100\n"
    (changed,) = await executor.map(job, tasks(3, values={"amount": 7, "twist__code": code}))
    agent.amount.data = 50
    (current,) = await executor.map(job, tasks(3))
    assert (changed.output, current.output) == (307, 53)


async def test_trained_code_stays_in_its_sandbox(executor: ProcessExecutor, tmp_path: Path) -> None:
    """`sandboxed` around a run applies in its workers: a model's code writes no file, unless it is allowed to."""
    path = tmp_path / "written"
    write = f"with open({str(path)!r}, 'w') as file:\n        file.write('escaped')"
    code = f"def twist(self, x: int) -> int:\n    {write}\n    return x\n"
    job, trial = work(Adder()), tasks(3, values={"twist__code": code})
    with sandboxed("process"):
        (remote,) = await executor.map(job, trial)
        (local,) = await LocalExecutor().map(job, trial)
    assert remote.failure is not None
    assert (remote.failure.error, content(path)) == ("SandboxError", "")
    assert (remote.failure, remote.transcript) == (local.failure, local.transcript)
    with sandboxed(None):
        (free,) = await executor.map(job, trial)
    assert (free.output, content(path)) == (4, "escaped")


async def test_a_guide_that_is_a_method_of_the_agent_reads_its_values(executor: ProcessExecutor) -> None:
    """Agent and guide are the same object in a worker, as they are here."""
    agent = Adder()
    (rollout,) = await executor.map(work(agent, agent.is_even), tasks(3, values={"amount": 5}))
    assert rollout.score == 5.0


async def test_models_are_called_by_this_process(executor: ProcessExecutor, tmp_path: Path) -> None:
    """Key, budget, ledger and cassette are here; the rollout's transcript shows the call."""
    budget = Budget(calls=10)
    llm, transport = client(budget=budget)
    with cassette(tmp_path / "calls.yaml", mode="all"), collecting() as ledger:
        rollouts = await executor.map(work(Asking(llm)), tasks("one", "twice", "thread", "loop", "stream"))
    assert {outputs(rollouts)[i] for i in (0, 2, 3)} < {str(len(request.body)) for request in transport.requests}
    assert [type(output) for output in outputs(rollouts)] == [str, list, str, str, list]
    assert {request.headers["authorization"] for request in transport.requests} == {f"Bearer {KEY}"}
    assert budget.spent.calls == ledger.totals()["agent"].calls == len(transport.requests) == 6
    assert "LLM call" in rollouts[0].transcript
    assert 'lineage":"train/sample=1"' in (tmp_path / "calls.yaml").read_text()


class Gone(Transport):
    """A server that no longer has the model."""

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        return HTTPReply(status=404, body=b"{}", headers={})


async def test_fallback_models_are_chosen_by_the_owner(executor: ProcessExecutor) -> None:
    """A worker passes the call on as one; this process decides which model answers, also for streams."""
    gone = LLM("openai-compatible/gone", base_url=BASE_URL, api_key=KEY, transport=Gone())
    second, transport = client()
    one, stream, secret = outputs(
        await executor.map(work(Asking(LLM([gone, second]))), tasks("one", "stream", "secret"))
    )
    assert (type(one), type(stream)) == (str, list)
    assert len(transport.requests) == 2
    assert KEY not in secret[0]


async def test_no_key_reaches_a_worker(executor: ProcessExecutor) -> None:
    """Neither the model's stand-in nor the worker's environment has the client's key."""
    llm, _ = client(budget=Budget(usd=1))
    ((seen, budget),) = outputs(await executor.map(work(Asking(llm)), tasks("secret")))
    assert KEY not in seen
    assert budget == "None"


@pytest.mark.parametrize("recorded", ["process", "local"])
async def test_one_executors_recording_is_replayed_by_the_other(
    recorded: str, executor: ProcessExecutor, tmp_path: Path
) -> None:
    """The cassettes are equal except for times, and so are the outputs."""
    inputs = tasks("one", "twice", "stream", "thread", "one")
    executors: dict[str, Any] = {"process": executor, "local": LocalExecutor()}
    llm, _ = client()
    with cassette(tmp_path / "calls.yaml", mode="all"):
        before = await executors.pop(recorded).map(work(Asking(llm)), inputs)
    (other,) = executors.values()
    offline = LLM("openai-compatible/tiny", base_url=BASE_URL)
    with cassette(tmp_path / "calls.yaml", mode="none") as tape:
        after = await other.map(work(Asking(offline)), inputs)
    assert outputs(after) == outputs(before)
    assert [one.transcript for one in after] == [one.transcript for one in before]
    assert tape.unplayed() == []


async def test_a_miss_that_an_agent_hides_is_remembered(executor: ProcessExecutor, tmp_path: Path) -> None:
    """`except Exception` in a worker does not hide it from the cassette."""
    llm, _ = client()
    with cassette(tmp_path / "calls.yaml", mode="all"):
        await executor.map(work(Asking(llm)), tasks("one"))
    replaying = cassette(tmp_path / "calls.yaml", mode="none")
    tape = replaying.__enter__()
    (rollout,) = await executor.map(work(Asking(llm)), tasks("hide"))
    assert (rollout.output, len(tape.misses)) == ("hidden", 1)
    with pytest.raises(CassetteMissError):
        replaying.__exit__(None, None, None)


async def test_a_budget_ends_the_run_from_a_worker(executor: ProcessExecutor) -> None:
    """`map` raises this process's budget error; nothing more is sent."""
    llm, transport = client(budget=Budget(calls=3))
    with pytest.raises(BudgetExceededError, match="within the budget of 3 calls, got one"):
        await executor.map(work(Asking(llm)), tasks(*["twice"] * 5))
    assert len(transport.requests) == 3


async def test_an_answer_is_validated_in_the_worker(executor: ProcessExecutor) -> None:
    """`validate` is a method of the agent there; an answer that it refuses is requested again."""
    llm, transport = client("bad", '{"good": 1}')
    (rollout,) = await executor.map(work(Asking(llm)), tasks("validate"))
    assert (rollout.output, len(transport.requests)) == ('{"good": 1}', 2)


async def test_a_client_made_in_a_worker_uses_the_owner_too(executor: ProcessExecutor, tmp_path: Path) -> None:
    """Its settings are sent, so its calls are recorded; a key in it is a ConfigError that names the argument."""
    llm, _ = client()
    with cassette(tmp_path / "calls.yaml", mode="all"):
        (rollout,) = await executor.map(work(Asking(llm)), tasks("made"))
    assert rollout.failure is not None
    assert (rollout.failure.error, rollout.failure.infrastructure) == ("APIConnectionError", True)
    assert 'lineage":"train/sample=0"' in (tmp_path / "calls.yaml").read_text()
    with pytest.raises(ConfigError, match=r"at LLM\.api_key$"):
        await executor.map(work(Asking(llm)), tasks("keyed"))


async def test_a_callable_model_is_called_here(executor: ProcessExecutor) -> None:
    """A closure need not be pickled, and its calls are counted here."""
    called: list[Any] = []

    def model(messages: Any, max_tokens: int) -> str:
        called.append((os.getpid(), max_tokens))
        return "from here"

    with collecting() as ledger:
        (rollout,) = await executor.map(work(Asking(None, as_model(model))), tasks("other"))
    assert rollout.output == "from here"
    assert called == [(os.getpid(), 7)]
    assert ledger.totals()["agent"].calls == 1
    assert "LLM call" in rollout.transcript


async def test_the_earliest_error_is_raised_after_work_in_flight(executor: ProcessExecutor) -> None:
    """The second task fails first, the first one later: its error is raised, and no third task starts."""
    job = Raising(None, None)
    with pytest.raises(AggregatorError, match="number 0") as caught:
        await executor.map(job, tasks(("own", 0.4), ("own", 0.0), ("own", 0.0)))
    assert "raised in a worker process:\nTraceback" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [("strange", ConfigError, "StrangeError: strange"), ("two", Exception, "TwoArgumentsError: one and 2")],
)
async def test_an_error_that_cannot_be_pickled_becomes_its_base_class(
    kind: str, expected: type[Exception], message: str, executor: ProcessExecutor
) -> None:
    """It is the nearest base class that can be pickled, with the error's name and text."""
    with pytest.raises(expected) as caught:
        await executor.map(Raising(None, None), tasks((kind, 0.0)))
    assert (type(caught.value), str(caught.value)) == (expected, message)


async def test_an_error_of_the_agent_is_a_record(executor: ProcessExecutor) -> None:
    """The rollout has the error's class and message, whether or not it can be pickled."""
    (rollout,) = await executor.map(work(Odd()), tasks("raise", min_score=0.25))
    assert rollout.failure is not None
    assert (rollout.failure.error, rollout.failure.message, rollout.score) == ("TwoArgumentsError", "one and 2", 0.25)


def test_an_interrupt_in_a_worker_is_raised_here(executor: ProcessExecutor) -> None:
    """It is raised as by the local executor; the worker continues."""
    with pytest.raises(KeyboardInterrupt):
        portal.call(executor.map, work(Odd()), tasks("interrupt"))
    assert outputs(portal.call(executor.map, work(Odd()), tasks("a", "b"))) == ["a", "b"]


async def test_a_rollout_in_a_worker_had_neither_cost_nor_milliseconds(executor: ProcessExecutor) -> None:
    """This process makes and measures its calls; those of a guide are not the agent's."""
    prices = {"tiny": Price(input=1.0, output=2.0)}
    found = []
    for where in (LocalExecutor(), executor):
        llm = LLM("openai-compatible/tiny", base_url=BASE_URL, api_key=KEY, transport=Timed(), prices=prices)
        (rollout,) = await where.map(work(Asking(llm), Judging(llm)), tasks("a"))
        assert rollout.score == 1.0
        found.append(dict(rollout.scores))
    assert found[0] == found[1] == {"cost": 20 / 1e6, "length": 2.0, "milliseconds": 12.5}


class Timed(Scripted):
    """Its answers take a while."""

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        return replace(await super().send(request, timeout=timeout), milliseconds=12.5)


async def test_usage_counted_in_a_worker_is_counted_here(executor: ProcessExecutor) -> None:
    """A user's own models run in the worker; their usage is in this process's ledger, also after an error."""
    with collecting() as ledger, pytest.raises(AggregatorError, match="counted"):
        await executor.map(Raising(None, None), tasks(("counts", 0.0)))
    assert ledger.entries() == [("guide", Usage(input_tokens=3, cost=0.1))]


class Local(Adder):
    """An agent with an attribute that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


async def test_an_object_that_cannot_be_pickled_is_named(executor: ProcessExecutor) -> None:
    """The error names agent, guide, sample or output, and the remedy."""
    remedy = "or use the local executor"
    with pytest.raises(ConfigError, match=rf"Expected an agent that pickles, got Local: .*{remedy} - at Local\.lock$"):
        await executor.map(work(Local()), tasks(1))
    with pytest.raises(ConfigError, match=f"Expected a guide that pickles, got function: .*{remedy}"):
        await executor.map(work(Adder(), lambda x, output, info: 1.0), tasks(1))
    with pytest.raises(ConfigError, match=rf"Expected values and a sample \(number 1\) that pickle.*{remedy}"):
        await executor.map(work(Adder()), tasks(1, threading.Lock()))
    with pytest.raises(ConfigError, match=f"Expected a rollout of instance 0 that pickles.*{remedy}"):
        await executor.map(work(Odd(), None), tasks("lock"))


@pytest.mark.parametrize(
    ("how", "ending"),
    [("die", "was ended by SIGKILL"), ("exit", "ended with exit code 3"), ("fork and die", "SIGKILL")],
)
async def test_an_instance_whose_worker_dies_is_lost_and_has_no_score(
    how: str, ending: str, executor: ProcessExecutor
) -> None:
    """It is an infrastructure failure; the other instances have their scores, and the worker is replaced."""
    rollouts = await executor.map(work(Odd(), None), tasks("a", how, "b", "c", min_score=0.0))
    lost = rollouts.pop(1)
    assert lost.failure is not None
    assert (lost.score, lost.failure.infrastructure, lost.failure.stage) == (None, True, "agent")
    assert ending in lost.failure.message
    assert (lost.sample_id, lost.x, lost.lineage) == (1, how, "train/sample=1")
    assert outputs(rollouts) == ["a", "b", "c"]
    assert len(set(outputs(await executor.map(work(Located()), tasks(*range(6)))))) == 2


async def test_a_worker_that_dies_between_two_tasks_loses_none() -> None:
    """No task had started in it: the next one goes to a new worker."""
    with ProcessExecutor(1) as executor:
        (pid,) = outputs(await executor.map(work(Located()), tasks(1)))
        os.kill(pid, signal.SIGKILL)
        assert await gone(pid)
        (other,) = await executor.map(work(Located()), tasks(1))
    assert other.failure is None
    assert other.output != pid


async def test_a_cancelled_task_may_clean_up(tmp_path: Path) -> None:
    """The agent's `finally` runs to its end in the worker."""
    with ProcessExecutor(1) as executor:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(executor.map(work(Odd(tmp_path / "notes")), tasks("sleep")))
            await written(tmp_path / "notes")
            running.cancel()
        assert (tmp_path / "notes").read_text() == "woken"
        assert outputs(await executor.map(work(Odd()), tasks("next"))) == ["next"]


@pytest.mark.parametrize("how", ["block", "child"])
async def test_a_task_that_ignores_its_cancellation_is_killed(how: str, tmp_path: Path) -> None:
    """All its child processes are killed too; the executor continues."""
    with ProcessExecutor(1) as executor:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(executor.map(work(Odd(tmp_path / "notes")), tasks(how)))
            pid = int(await written(tmp_path / "notes"))
            running.cancel()
        assert await gone(pid)
        assert outputs(await executor.map(work(Odd()), tasks("next"))) == ["next"]


@pytest.mark.parametrize("how", ["sleep", "block"])
async def test_a_task_that_takes_too_long_fails_and_its_worker_is_replaced(how: str, tmp_path: Path) -> None:
    """One task awaits, one blocks its event loop; neither continues."""
    with ProcessExecutor(1) as executor:
        late = tasks(how, timeout=0.3)
        (rollout,) = await executor.map(work(Odd(tmp_path / "notes")), late)
        assert rollout.failure is not None
        assert (rollout.failure.stage, rollout.failure.error) == ("agent", "InstanceTimeoutError")
        if how == "block":
            assert await gone(int(content(tmp_path / "notes")))
        assert outputs(await executor.map(work(Odd()), tasks("next", timeout=60))) == ["next"]


async def test_close_ends_every_worker() -> None:
    """Idle workers end, and a closed executor refuses work."""
    executor = ProcessExecutor(2)
    pids = set(outputs(await executor.map(work(Located()), tasks(*range(4)))))
    executor.close()
    executor.close()
    assert [is_running(pid) for pid in pids] == [False, False]
    with pytest.raises(ConfigError, match="Expected an executor that is open"):
        await executor.map(work(Adder()), tasks(1))


async def test_calls_of_map_share_the_workers(executor: ProcessExecutor) -> None:
    """Two event loops together use at most `max_workers` processes, and each gets its own results."""
    found: list[list[Any]] = []

    async def several() -> None:
        async with asyncio.TaskGroup() as group:
            runs = [group.create_task(executor.map(work(Located()), tasks(*range(3)))) for _ in range(2)]
        found.extend(outputs(run.result()) for run in runs)

    thread = threading.Thread(target=portal.call, args=[several])
    thread.start()
    await several()
    await asyncio.get_running_loop().run_in_executor(None, thread.join)
    assert len(found) == 4
    assert len({pid for pids in found for pid in pids}) == 2


def test_a_cassette_of_other_clients_is_refused(executor: ProcessExecutor, tmp_path: Path) -> None:
    """Their requests in a worker would not be intercepted."""
    with (
        cassette(tmp_path / "calls.yaml", mode="all", clients=["httpx"]),
        pytest.raises(ConfigError, match="Expected a cassette of the library's own client .*clients="),
    ):
        portal.call(executor.map, work(Adder()), tasks(1))


def test_arguments_are_checked() -> None:
    """The number of workers is an int of at least 1."""
    with pytest.raises(ConfigError, match="max_workers"):
        ProcessExecutor(0)


SCRIPT = """
import asyncio, os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {here!r})
from process_parts import Located, Odd, even, tasks
from aggregator import portal, Module, ParameterNode
from aggregator.adapters.agents import as_agent
from aggregator.executors.process import ProcessExecutor
from aggregator.executors.work import AgentWork

class Here(Module):
    def __init__(self): self.amount = ParameterNode(1)
    def forward(self, x): return [self, x]

def run(executor, agent, *inputs):
    return [r.output for r in portal.call(executor.map, AgentWork(as_agent(agent), None), tasks(*inputs))]

{body}
"""


def script(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(here=str(HERE), body=body))
    return [sys.executable, "-X", "dev", "-W", "error", str(path), str(tmp_path / "notes")]


def run_script(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(script(tmp_path, body), capture_output=True, text=True, timeout=60, check=False)
    done.stderr = without_slow_callbacks(done.stderr)
    return done


def without_slow_callbacks(errors: str) -> str:
    """Drop what asyncio's debug mode reports of a callback above 0.1 s, as there are on a busy machine."""
    return "".join(line for line in errors.splitlines(keepends=True) if not line.startswith("Executing <"))


def test_classes_of_the_main_script_are_found(tmp_path: Path) -> None:
    """As with `multiprocessing`, a script with the usual guard may define its agent itself."""
    body = """
if __name__ == "__main__":
    executor = ProcessExecutor(1)
    ((agent, x),) = run(executor, Here(), 5)
    print(type(agent).__name__, isinstance(agent, Here), x)
"""
    done = run_script(tmp_path, body)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Here True 5\n", "")


def test_the_start_method_of_multiprocessing_can_still_be_set(tmp_path: Path) -> None:
    """Starting a worker does not fix the application's start method."""
    body = """
if __name__ == "__main__":
    import multiprocessing
    run(ProcessExecutor(1), Odd(), "a")
    multiprocessing.set_start_method("spawn")
    print(multiprocessing.get_start_method())
"""
    done = run_script(tmp_path, body)
    assert (done.returncode, done.stdout, done.stderr) == (0, "spawn\n", "")


def test_a_script_without_the_guard_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    """The worker imports the script, and must not start the training again."""
    done = run_script(tmp_path, "run(ProcessExecutor(1), Here(), 5)")
    assert done.returncode == 1
    assert 'if __name__ == "__main__":' in done.stderr.splitlines()[-1]


def test_an_executor_that_is_not_closed_ends_with_the_process(tmp_path: Path) -> None:
    """This holds even if an agent has left a thread that runs for an hour."""
    body = """
if __name__ == "__main__":
    executor = ProcessExecutor(2)
    print(*run(executor, Located(), 1, 2, 3, 4))
    run(executor, Odd(Path(sys.argv[1])), "thread")
"""
    done = run_script(tmp_path, body)
    assert (done.returncode, done.stderr) == (0, "")
    assert [is_running(int(pid)) for pid in set(done.stdout.split())] == [False, False]


def test_workers_end_with_a_killed_process(tmp_path: Path) -> None:
    """SIGKILL leaves no process, whatever the workers do."""
    body = """
if __name__ == "__main__":
    run(ProcessExecutor(1), Odd(Path(sys.argv[1])), "block")
"""
    process = subprocess.Popen(script(tmp_path, body))
    try:
        pid = int(portal.call(written, tmp_path / "notes"))
    finally:
        process.kill()
        process.wait()
    assert portal.call(gone, pid)


def test_an_interrupt_ends_the_run_and_its_workers(tmp_path: Path) -> None:
    """Ctrl-C raises KeyboardInterrupt here within seconds, and the workers print nothing."""
    body = """
if __name__ == "__main__":
    try:
        run(ProcessExecutor(1), Odd(Path(sys.argv[1])), "block")
    except KeyboardInterrupt:
        print("interrupted")
"""
    process = subprocess.Popen(
        script(tmp_path, body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    pid = int(portal.call(written, tmp_path / "notes"))
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert (out, without_slow_callbacks(errors)) == ("interrupted\n", "")
    assert portal.call(gone, pid)


def test_a_forked_process_has_its_own_workers(tmp_path: Path) -> None:
    """The child starts new ones, and ending it does not affect the parent's."""
    body = """
if __name__ == "__main__":
    executor = ProcessExecutor(1)
    (first,) = run(executor, Located(), 1)
    child = os.fork()
    (mine,) = run(executor, Located(), 1)
    if child:
        os.waitpid(child, 0)
        print("same" if run(executor, Located(), 1) == [first] == [mine] else "other")
    else:
        print("own" if mine != first else "shared", flush=True)
"""
    done = run_script(tmp_path, body)
    assert (done.returncode, sorted(done.stdout.split()), done.stderr) == (0, ["own", "same"], "")
