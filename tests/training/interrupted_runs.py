"""Training runs to interrupt: `python -W error -X dev interrupted_runs.py KIND RUN_DIR`."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

from training_fakes import Adder, ScriptedModel, additions, exact, first_suggestion, from_feedback

from aggregator import LLM, AggregatedUpdate, LLMOptimizer
from aggregator.simulation import SimulatedModel

BUSY_AT = 6
"""The input at which an agent waits: by then one step has finished."""


def busy() -> None:
    sys.stdout.write("busy\n")
    sys.stdout.flush()


class Sleeping(Adder):
    """Sleeps for an hour."""

    async def forward(self, x: int) -> int:
        if x >= BUSY_AT:
            busy()
            await asyncio.sleep(3600)
        return await super().forward(x)


class Blocking(Adder):
    """Blocks its thread for an hour and cannot be stopped."""

    def forward(self, x: int) -> int:  # type: ignore[override]
        if x >= BUSY_AT:
            busy()
            time.sleep(3600)
        return int(x + self.amount.data)


class Asking(Adder):
    """Calls a model synchronously, in a loop."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm

    def forward(self, x: int) -> int:  # type: ignore[override]
        if x >= BUSY_AT:
            busy()
            while True:
                self.llm(messages=f"How much is {time.monotonic()}?")
        return int(x + self.amount.data)


class Stubborn(Adder):
    """Ignores its first cancellation."""

    async def forward(self, x: int) -> int:
        if x >= BUSY_AT:
            busy()
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                await asyncio.sleep(0.05)
        return await super().forward(x)


def kinds(llm: LLM) -> dict[str, Callable[[], Adder]]:
    return {"sleeping": Sleeping, "blocking": Blocking, "asking": lambda: Asking(llm), "stubborn": Stubborn}


def main(kind: str, run_dir: str) -> None:
    with SimulatedModel(latency=0.01) as server:
        agent: Any = kinds(LLM("openai-compatible/simulated-1", base_url=server.base_url))[kind]()
        optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
        trainer = AggregatedUpdate(agent, optimizer, llm=ScriptedModel(first_suggestion), observers=[])
        data = [*additions(5, count=4), *((BUSY_AT + i, 0) for i in range(4))]
        trainer.train(exact, data, run_dir=run_dir, batch_size=1, seed=SEED)


SEED = 4
"""An order of the eight inputs that does not begin with one that waits."""

if __name__ == "__main__":
    main(*sys.argv[1:])
