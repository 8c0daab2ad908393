"""Code parameters in the sandbox: a violation becomes feedback, and the run continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from aggregator import Module, Proposal, Rollout, bundle
from aggregator.sandbox.limits import Limits, sandboxed
from aggregator.sandbox.pool import pool
from aggregator.training.algorithms import Minibatch
from aggregator.training.merge import majority

HEAD = "def double(self, x):\n"


class Agent(Module):
    @bundle(trainable=True)
    def double(self, x: int) -> int:
        return x

    async def forward(self, x: int) -> int:
        return self.double(x)


class Scripted:
    """An optimizer that proposes given bodies in order and records its feedback."""

    def __init__(self, bodies: Sequence[str]) -> None:
        self.parameters = None
        self.bodies = iter(bodies)
        self.seen: list[tuple[float | None, str]] = []

    async def propose(self, rollouts: Sequence[Rollout], step: Any) -> Proposal:
        (rollout,) = rollouts
        self.seen.append((rollout.score, rollout.feedback))
        return Proposal(values={"double__code": HEAD + next(self.bodies)}, sample_ids=(rollout.sample_id,))


def guide(x: int, output: Any, info: Any) -> tuple[float, str]:
    return float(output == 2 * x), "right" if output == 2 * x else "double it"


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    pool().close()


@pytest.mark.requirement("Trace's defect 33: a model's code ran without limits")
@pytest.mark.parametrize(
    ("body", "feedback"),
    [
        ("    while True: pass", "it ran longer than 0.3 seconds"),
        ("    return 'x' * (1 << 40)", "it used more than 128 MiB of memory"),
        ("    import os\n    while True: os.fork()", "it tried to use other processes"),
        ("    open('/tmp/out', 'w')", "it tried to use the file system"),
        ("    import socket\n    socket.socket()", "it tried to use the network"),
    ],
)
def test_bad_code_becomes_feedback_and_the_run_continues(body: str, feedback: str) -> None:
    """Endless loop, memory bomb, fork bomb, file write and socket become feedback, then the code is repaired."""
    agent = Agent()
    optimizer = Scripted([body, "    return 2 * x", "    return 2 * x"])
    trainer = Minibatch(agent, optimizer, rule=majority, observers=())
    with sandboxed(Limits(seconds=0.3, memory=128 << 20)):
        result = trainer.train(
            guide,
            [(1, None), (2, None), (3, None)],
            min_score=0.0,
            test_dataset=[(5, None)],
            eval_frequency=3,
            max_failure_ratio=1.0,
        )
    assert optimizer.seen[0] == (0.0, "double it")
    assert optimizer.seen[1][0] == 0.0
    assert feedback in optimizer.seen[1][1]
    assert optimizer.seen[2] == (1.0, "right")
    assert result.test_scores == [0.0, 1.0]
