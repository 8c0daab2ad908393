"""Concurrent instances share nothing, and their results have the same bytes in any order of completion."""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from router_runs import train
from training_fakes import Adder, ScriptedModel, additions, exact, section, suggest

from aggregator import bundle, cassette, lineage, portal
from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.cassettes.lineage import current_lineage, current_role
from aggregator.cassettes.storage import read
from aggregator.executors.local import fan_out
from aggregator.records import Sample
from aggregator.simulation import SimulatedModel
from aggregator.training.algorithms import AggregatedUpdate
from aggregator.training.checkpoints import RESULT
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.step import Step

OPERATIONS = 60
BATCH = 32
MARK = re.compile(r"mark-\d+-")
"""Ends with a dash, so that no marker is part of another."""


class Deep(Module):
    """Passes its input through sixty traced operations."""

    def __init__(self, seed: int) -> None:
        self.prompt = ParameterNode("Pass it on.")
        self.latencies = random.Random(seed)

    @bundle()
    async def hand_on(self, text: str, depth: int) -> str:
        """Return the text."""
        for _ in range(self.latencies.randrange(4)):
            await asyncio.sleep(0)
        return text

    async def forward(self, x: int) -> str:
        text = f"mark-{x}-"
        for depth in range(OPERATIONS):
            text = await self.hand_on(text, depth)
        return text


class DeepInAThread(Module):
    """The same, synchronously."""

    def __init__(self, seed: int) -> None:
        self.prompt = ParameterNode("Pass it on.")
        self.latencies = random.Random(seed)

    @bundle()
    def hand_on(self, text: str, depth: int) -> str:
        """Return the text."""
        time.sleep(self.latencies.random() / 10_000)
        return text

    def forward(self, x: int) -> str:
        text = f"mark-{x}-"
        for depth in range(OPERATIONS):
            text = self.hand_on(text, depth)
        return text


def marked(x: int, output: str, info: Any) -> tuple[float, str]:
    return 0.0, f"wrong: mark-{x}- came out as {output}"


@pytest.mark.requirement(
    "Trace: GraphPropagator: the subgraph as feedback",
    "Trace's defect 1: threads shared the optimizer and its feedback",
    "Trace's defect 2: prompts held another instance's graph",
)
@pytest.mark.parametrize("kind", [Deep, DeepInAThread])
@pytest.mark.parametrize("seed", range(3))
def test_sixty_operations_of_thirty_two_instances_never_mix(kind: type[Deep | DeepInAThread], seed: int) -> None:
    """Trace crashed in 10 of 10 such runs, or put another instance's graph into up to 42 % of the prompts."""
    latencies = random.Random(seed)
    optimizer = ScriptedModel("TERMINATE", jitter=lambda: latencies.randrange(9))
    run = AggregatedUpdate(kind(seed), LLMOptimizer(llm=optimizer), llm=ScriptedModel("x"), max_concurrency=BATCH)
    result = run.train(marked, [(i, None) for i in range(BATCH)], batch_size=BATCH)
    assert result.failures == ()
    assert sorted(marks(prompt) for prompt in optimizer.asked) == sorted([f"mark-{i}-"] for i in range(BATCH))
    for prompt in optimizer.asked:
        (mark,) = marks(prompt)
        transcript = section(prompt, "Transcript")
        assert transcript.count("hand_on") == OPERATIONS
        assert transcript.count(mark) == 2 * OPERATIONS
        assert section(prompt, "Output") == mark
        assert section(prompt, "Feedback") == f"wrong: {mark} came out as {mark}"


def marks(prompt: list[dict[str, Any]]) -> list[str]:
    return sorted({mark for message in prompt for mark in MARK.findall(message["content"])})


def test_a_proposal_does_not_depend_on_its_batch() -> None:
    """An instance's prompt has the same bytes alone and with 31 others: the optimizer has no shared memory."""

    def prompts(batch: Sequence[tuple[int, None]]) -> list[str]:
        optimizer = ScriptedModel("TERMINATE")
        run = AggregatedUpdate(Deep(0), LLMOptimizer(llm=optimizer), llm=ScriptedModel("x"))
        run.train(marked, batch, batch_size=len(batch))
        return sorted(str(prompt) for prompt in optimizer.asked)

    together = prompts([(i, None) for i in range(BATCH)])
    assert together == sorted(prompt for i in range(BATCH) for prompt in prompts([(i, None)]))


class Placed(Module):
    """Answers with its lineage."""

    def __init__(self) -> None:
        self.prompt = ParameterNode("Where?")

    async def forward(self, x: int) -> str:
        with lineage(f"step={x}"):
            await asyncio.sleep(0)
            return f"{current_lineage()} {current_role()}"


class PlacedInAThread(Placed):
    def forward(self, x: int) -> str:  # type: ignore[override]
        with lineage(f"step={x}"):
            time.sleep(0.0005)
            return f"{current_lineage()} {current_role()}"


@pytest.mark.parametrize("kind", [Placed, PlacedInAThread])
def test_each_instance_has_its_own_lineage(kind: type[Placed]) -> None:
    """What an agent adds to its lineage is invisible to the others, in tasks and in threads."""
    outputs: dict[int, str] = {}

    def note(x: int, output: str, info: Any) -> float:
        outputs[x] = output
        return 1.0

    run = AggregatedUpdate(kind(), LLMOptimizer(llm=ScriptedModel("TERMINATE")), llm=ScriptedModel("x"))
    run.train(note, [(i, None) for i in range(BATCH)], batch_size=BATCH)
    assert outputs == {i: f"train/epoch=0/batch=0/sample={i}/step={i} agent" for i in range(BATCH)}
    assert current_lineage() == ""


class Valued(Module):
    """Answers with the value that it reads after the others have run."""

    def __init__(self) -> None:
        self.amount = ParameterNode(-1)

    async def forward(self, x: int) -> int:
        for _ in range(x):
            await asyncio.sleep(0)
        return self.amount.data


class ValuedInAThread(Valued):
    def forward(self, x: int) -> int:  # type: ignore[override]
        time.sleep(x / 10_000)
        return self.amount.data


@pytest.mark.parametrize("kind", [Valued, ValuedInAThread])
async def test_candidates_evaluated_at_once_read_their_own_values(kind: type[Valued]) -> None:
    """Sixteen gates try sixteen values of one agent at once; the agent itself keeps the stored one."""
    agent = kind()
    batch = [Sample(i, i) for i in range(8)]
    stored: list[int] = []

    step = Step.of(agent, guide=read_off, samples=batch)

    async def evaluate(value: int) -> list[Any]:
        runs = await step.evaluate({"amount": value}, batch)
        stored.append(agent.amount.data)
        return [run.output for run in runs]

    outputs = await fan_out(evaluate, range(16), 16)
    assert outputs == [[value] * len(batch) for value in range(16)]
    assert stored == [-1] * 16


def read_off(x: int, output: int, info: Any) -> float:
    return float(output)


@pytest.mark.requirement("Trace's defect 7: proposals of one batch saw each other through the memory")
def test_history_has_finished_steps_only() -> None:
    """No prompt contains what another instance of the same batch has just proposed."""
    optimizer = ScriptedModel('{"suggestion": {"prompt": "Pass it on, please."}}', "TERMINATE")
    run = AggregatedUpdate(Deep(0), LLMOptimizer(llm=optimizer), llm=ScriptedModel("x"))
    run.train(marked, [(i, None) for i in range(BATCH)], batch_size=BATCH // 2)
    recalled = [section(prompt, "History") for prompt in optimizer.asked]
    assert recalled[: BATCH // 2] == [""] * (BATCH // 2)
    assert set(recalled[BATCH // 2 :]) == {'step 0, accepted: {"prompt":"Pass it on, please."}'}


def test_two_concurrent_trainings_equal_separate_ones() -> None:
    """Two agents are trained in one event loop: neither run affects the other."""

    def trainer(seed: int) -> AggregatedUpdate:
        latencies = random.Random(seed)
        optimizer = ScriptedModel(suggest(amount=seed), jitter=lambda: latencies.randrange(5))
        return AggregatedUpdate(Adder(), LLMOptimizer(llm=optimizer), llm=ScriptedModel("x"), seed=seed)

    async def both() -> list[Any]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(trainer(seed).atrain(exact, additions(seed))) for seed in (3, 4)]
        return [task.result() for task in tasks]

    assert portal.call(both) == [trainer(seed).train(exact, additions(seed)) for seed in (3, 4)]


Asked = list[tuple[str, int, bytes]]
"""Lineage, ticket and body of every request."""


def asked(path: Path) -> Asked:
    recording = read(path)
    assert recording is not None
    exchanges = [row.exchange() for row in recording.rows]
    return sorted((one.facts.lineage, one.facts.ticket, one.request.body) for one in exchanges)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, bytes]]:
    """Record a run through the real client, eight calls at once, answers shuffled; return URL, folder and result."""
    folder = tmp_path_factory.mktemp("recorded")
    with SimulatedModel() as server:
        with cassette(folder / "run.yaml", "all"):
            train(server.base_url, shuffle=0, run_dir=folder / "run")
        yield server.base_url, folder, (folder / "run" / RESULT).read_bytes()


Recorded = tuple[str, Path, bytes]


@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_live_runs_are_the_same_at_any_concurrency(recorded: Recorded, tmp_path: Path, concurrency: int) -> None:
    """In any order of answers, requests and lineages are the same, and result.json is equal byte for byte."""
    url, folder, result = recorded
    with cassette(tmp_path / "run.yaml", "all"):
        train(url, shuffle=concurrency, max_concurrency=concurrency, run_dir=tmp_path / "run")
    assert (tmp_path / "run" / RESULT).read_bytes() == result
    assert asked(tmp_path / "run.yaml") == asked(folder / "run.yaml")


@pytest.mark.parametrize("latency", ["off", "recorded"])
@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_a_cassette_replays_to_the_same_bytes_at_any_concurrency(
    recorded: Recorded, tmp_path: Path, concurrency: int, latency: Any
) -> None:
    """Played in any order, at once or with recorded waits, every exchange is used and the result is the same."""
    url, folder, result = recorded
    with cassette(folder / "run.yaml", "none", latency=latency) as tape:
        train(url, max_concurrency=concurrency, run_dir=tmp_path / "run")
    assert (tmp_path / "run" / RESULT).read_bytes() == result
    assert tape.unplayed() == []
    assert tape.report == []


def test_another_seed_is_another_run(recorded: Recorded, tmp_path: Path) -> None:
    """The result compared above does depend on the seed."""
    url, _, result = recorded
    train(url, seed=1, run_dir=tmp_path / "run")
    assert (tmp_path / "run" / RESULT).read_bytes() != result


SETS = """
import sys
from training_fakes import Adder, ScriptedModel, exact
from aggregator import AggregatedUpdate, LLMOptimizer
from aggregator.agents.parameters import ParameterNode

class Tagged(Adder):
    def __init__(self):
        super().__init__()
        self.tags = ParameterNode({"red", "green", "blue", "black", "white"})
    async def forward(self, x):
        return self.tags.data

optimizer = ScriptedModel("TERMINATE")
run = AggregatedUpdate(Tagged(), LLMOptimizer(llm=optimizer), llm=ScriptedModel("x"))
run.train(lambda x, output, info: (0.5, "so so"), [(0, 0)], run_dir=sys.argv[1])
sys.stdout.write(str(optimizer.asked))
"""


def test_the_order_of_sets_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Prompts and result.json do not depend on the interpreter's hash seed."""

    def run(hash_seed: str) -> tuple[str, bytes]:
        command = [sys.executable, "-c", SETS, str(tmp_path / hash_seed)]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=60)
        return done.stdout, (tmp_path / hash_seed / RESULT).read_bytes()

    assert run("1") == run("2")
