"""Train the demo's router, in this process or, by `python router_runs.py URL RUN_DIR`, in one that is killed."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aggregator import LLM, AggregatedUpdate, LLMOptimizer, TrainingResult
from aggregator.demo.run import TicketRouter, right_team, tickets
from aggregator.gates import improves_on_validation
from aggregator.llm.transport import shared_transport
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest

CONCURRENCY = 8


class Shuffled(Transport):
    """A transport that delays each answer by its own time, so that answers arrive in another order."""

    def __init__(self, seed: int, inner: Transport) -> None:
        self.random = random.Random(seed)
        self.inner = inner

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        reply = await self.inner.send(request, timeout=timeout)
        await asyncio.sleep(self.random.random() / 200)
        return reply


def train(base_url: str, *, shuffle: int | None = None, budget: Any = None, **options: Any) -> TrainingResult:
    """Train the router: 3 steps an epoch, a gate with a memory, a test set."""
    transport = None if shuffle is None else Shuffled(shuffle, shared_transport())
    llm = LLM("openai-compatible/simulated-1", base_url=base_url, transport=transport)
    given = tickets()
    pairs = [(ticket.text, ticket.team) for ticket in given.train[:20]]
    gate = improves_on_validation([(ticket.text, ticket.team) for ticket in given.test[:5]])
    trainer = AggregatedUpdate(
        TicketRouter(llm),
        LLMOptimizer(llm=llm),
        llm=llm,
        gate=gate,
        observers=options.pop("observers", []),
        budget=budget,
    )
    arguments = {
        "batch_size": 5,
        "num_epochs": 2,
        "test_dataset": pairs[:6],
        "eval_frequency": 3,
        "max_concurrency": CONCURRENCY,
        **options,
    }
    return trainer.train(right_team, pairs, **arguments)


class Child:
    """A process that trains in `run_dir`; call `wait`, or `process.send_signal` first."""

    def __init__(self, base_url: str, run_dir: Path, *arguments: str) -> None:
        command = [sys.executable, "-X", "dev", __file__, base_url, str(run_dir), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()

    def wait(self, timeout: float = 60) -> tuple[int, str]:
        """Return the exit code and the text on standard error."""
        _, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, errors

    def kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        self.process.kill()
        self.process.communicate()


def main(base_url: str, run_dir: str, num_epochs: str = "2") -> None:
    sys.stdout.write("starting\n")
    sys.stdout.flush()
    train(base_url, run_dir=run_dir, resume=True, num_epochs=int(num_epochs))


if __name__ == "__main__":
    main(*sys.argv[1:])
