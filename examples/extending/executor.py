"""An executor: each rollout in a thread with an event loop of its own, so an agent that blocks holds up no other.

An executor has one method, `map`. It awaits `work(task)` for each task, returns the rollouts in the order of the tasks,
and raises only what ends a run, once the work in flight has ended: the error of the earliest task that has one.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from aggregator import AggregatedUpdate, LLMOptimizer
from aggregator.protocols import RolloutWork
from aggregator.records import Rollout, RolloutTask
from aggregator.testing import ScriptedModel, suggestion


class Threads:
    """Runs at most `limit` rollouts at once, each in a thread."""

    def __init__(self, limit: int = 8) -> None:
        self.pool = ThreadPoolExecutor(limit)

    async def map(self, work: RolloutWork, tasks: Sequence[RolloutTask]) -> list[Rollout]:
        loop = asyncio.get_running_loop()
        running = [loop.run_in_executor(self.pool, self.run, work, task) for task in tasks]
        if running:
            await asyncio.wait(running)
        errors = [error for future in running if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in running]

    def run(self, work: RolloutWork, task: RolloutTask) -> Rollout:
        with asyncio.Runner() as runner:
            return runner.run(work(task))


async def slow(x: int, *, amount: int = 1) -> int:
    """An async agent that should not block, and does."""
    time.sleep(0.1)  # noqa: ASYNC251 - the fault that this executor is for
    return x + amount


def guide(x: int, output: int, wanted: int) -> tuple[float, str]:
    return float(output == wanted), f"Expected {wanted}, got {output}."


def main() -> None:
    model = ScriptedModel(suggestion(amount=3))
    trainer = AggregatedUpdate(slow, LLMOptimizer(llm=model), llm=model, executor=Threads(), observers=[])
    started = time.perf_counter()
    result = trainer.train(guide, [(x, x + 3) for x in range(8)], batch_size=8)
    print(f"amount = {result.parameters['amount']}")
    print(f"eight instances that block for 0.1 s took {time.perf_counter() - started:.1f} s, one after the other 0.8 s")


if __name__ == "__main__":
    main()
