"""Killed runs, and runs on a full disk, lose nothing that was paid for."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from router_runs import CONCURRENCY, Child, train
from training_fakes import Adder, ScriptedModel, additions, exact, first_suggestion, from_feedback, suggest

from aggregator import LLM
from aggregator.errors import CassetteLockedError, TrainingError
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest, TrainingResult
from aggregator.simulation import SimulatedModel
from aggregator.training.algorithms import AggregatedUpdate
from aggregator.training.checkpoints import CHECKPOINT, JOURNAL, RESULT, load_result
from aggregator.training.proposers import LLMOptimizer


class Whole(NamedTuple):
    """An unbroken run: its result.json and its number of requests."""

    result: bytes
    paid: int


@pytest.fixture(scope="module")
def server() -> Iterator[SimulatedModel]:
    with SimulatedModel(latency=0.02) as model:
        yield model


@pytest.fixture(scope="module")
def whole(server: SimulatedModel, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    run_dir = tmp_path_factory.mktemp("whole")
    train(server.base_url, run_dir=run_dir)
    return Whole((run_dir / RESULT).read_bytes(), paid(server))


def paid(server: SimulatedModel) -> int:
    return sum(server.calls.values())


def kill_and_resume(server: SimulatedModel, whole: Whole, run_dir: Path, kills: int, seed: int) -> None:
    """Kill a run several times, resume it to its end, and compare with an unbroken one."""
    moments, before = random.Random(seed), paid(server)
    for _ in range(kills):
        Child(server.base_url, run_dir).kill_after(moments.uniform(0.02, 0.5))
    train(server.base_url, run_dir=run_dir, resume=True)
    assert (run_dir / RESULT).read_bytes() == whole.result
    assert paid(server) - before <= whole.paid + kills * CONCURRENCY


@pytest.mark.requirement("Trace: resume()", "Trace's defect 11: agents with operations could not be saved")
def test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one(
    server: SimulatedModel, whole: Whole, tmp_path: Path
) -> None:
    """After three SIGKILLs result.json is the same, and only calls in flight are paid for again."""
    kill_and_resume(server, whole, tmp_path / "killed", kills=3, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 6))
def test_thirty_kills_change_nothing(server: SimulatedModel, whole: Whole, tmp_path: Path, seed: int) -> None:
    """Kills at thirty other moments, six in each run."""
    kill_and_resume(server, whole, tmp_path / "killed", kills=6, seed=seed)


def test_a_torn_temporary_file_does_not_prevent_a_resume(server: SimulatedModel, whole: Whole, tmp_path: Path) -> None:
    """A kill while a checkpoint is written leaves the previous one and a torn file, which the next one replaces."""
    child = Child(server.base_url, tmp_path / "torn")
    while not (tmp_path / "torn" / CHECKPOINT).exists():
        assert child.process.poll() is None
    child.kill_after(0.0)
    (tmp_path / "torn" / f"{CHECKPOINT}.tmp").write_bytes(b'{"version": 1, "finger')
    train(server.base_url, run_dir=tmp_path / "torn", resume=True)
    assert (tmp_path / "torn" / RESULT).read_bytes() == whole.result
    assert not list((tmp_path / "torn").glob("*.tmp"))


def test_a_running_run_is_not_resumed(server: SimulatedModel, whole: Whole, tmp_path: Path) -> None:
    """The error names the other process that still trains it, and nothing is changed."""
    child = Child(server.base_url, tmp_path / "run")
    while not (tmp_path / "run" / JOURNAL).exists():
        assert child.process.poll() is None
    with pytest.raises(CassetteLockedError, match=f"a lock held by process {child.process.pid}"):
        train(server.base_url, run_dir=tmp_path / "run", resume=True)
    assert child.wait()[0] == 0
    assert (tmp_path / "run" / RESULT).read_bytes() == whole.result


def test_a_run_dir_that_cannot_be_written_is_reported_first(server: SimulatedModel, tmp_path: Path) -> None:
    """The error names the folder; no request was sent."""
    before = paid(server)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(TrainingError, match="Expected to keep the run in .*file.*make the folder writable"):
        train(server.base_url, run_dir=tmp_path / "file" / "run")
    assert paid(server) == before


FULL = """
import resource, signal, sys
from router_runs import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing beyond the limit is an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    train(sys.argv[1], run_dir=sys.argv[2])
except Exception as error:
    sys.stdout.write(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize(
    ("room", "told"),
    [
        (3_000, "CassetteError: .*journal.yaml.*File too large"),
        (150_000, "CassetteError: .*journal.yaml.*File too large"),
    ],
)
def test_a_full_disk_ends_the_run_and_keeps_what_was_paid(
    server: SimulatedModel, whole: Whole, tmp_path: Path, room: int, told: str
) -> None:
    """The error says what could not be written; with free space the run continues, and ends as an unbroken one."""
    before = paid(server)
    command = [sys.executable, "-c", FULL, server.base_url, str(tmp_path / "full"), str(room)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent)
    assert re.match(told, ended.stdout), ended.stdout + ended.stderr
    train(server.base_url, run_dir=tmp_path / "full", resume=True)
    assert (tmp_path / "full" / RESULT).read_bytes() == whole.result
    assert paid(server) - before <= whole.paid + CONCURRENCY


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    """The error carries the result with all its steps, and the remedy."""
    run_dir = tmp_path / "run"
    (run_dir / f"{CHECKPOINT}.tmp").mkdir(parents=True)  # the path of the checkpoint
    optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
    trainer = AggregatedUpdate(Adder(), optimizer, llm=ScriptedModel(first_suggestion))
    with pytest.raises(TrainingError, match="Expected to write .*checkpoint.json.*free some space") as caught:
        trainer.train(exact, additions(5), run_dir=run_dir)
    assert caught.value.result is not None
    assert len(caught.value.result.history) == 1
    assert load_result(run_dir / RESULT).parameters == caught.value.result.parameters == {"amount": 5, "label": "sum"}


class Outage(Transport):
    """A model that is down until the test repairs it."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.is_down = False
        self.down_at: int | None = None
        self.served = 0

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        if self.is_down:
            return HTTPReply(status=self.status, body=b'{"error": {"message": "not now"}}', headers={})
        self.served += 1
        content = suggest(amount=5) if b"#Parameters" in request.body else "3"
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return HTTPReply(status=200, body=msgspec.json.encode({"choices": [choice]}), headers={})


@pytest.mark.parametrize(("status", "name"), [(401, "AuthenticationError"), (503, "ServerError")])
def test_a_run_that_ended_on_failed_calls_continues_once_they_succeed(tmp_path: Path, status: int, name: str) -> None:
    """The failures are in the journal, but a resumed run repeats them; answered calls are not paid for again."""
    model = Outage(status)
    llm = LLM("openai-compatible/x", base_url="http://localhost/v1", transport=model, max_attempts=1)
    data = additions(5, count=6)

    def run(folder: str, *, down_at: int | None = None, resume: bool = False) -> TrainingResult:
        model.down_at = down_at

        def guide(x: int, output: int, info: int) -> tuple[float, str]:
            model.is_down = x == model.down_at
            return exact(x, output, info)

        trainer = AggregatedUpdate(Adder(), LLMOptimizer(llm=llm), llm=llm, max_concurrency=1)
        return trainer.train(guide, data, run_dir=tmp_path / folder, resume=resume, batch_size=2, max_failure_ratio=0.2)

    whole = run("whole")
    served = model.served
    with pytest.raises(TrainingError, match=name):
        run("cut", down_at=data[whole.history[1].sample_ids[1]][0])
    model.is_down = False
    resumed = run("cut", resume=True)
    assert resumed == whole
    assert model.served == 2 * served
