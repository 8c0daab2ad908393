"""What a training step costs in addition to its calls: wall time against the critical path, CPU per instance, memory.

The models answer from memory after a fixed latency, so all that is left is the trainer: executor, prompts, parsing.
"""

from __future__ import annotations

import asyncio
import resource
import time
from functools import partial
from math import log
from random import Random
from typing import Any

from benchmarks.harness import Case, Options, call, measure
from benchmarks.report import Report, Row, Target

LATENCY = 0.2
BATCHES = (8, 64, 512)
LIMITS = {8: 1.05, 64: 1.05, 512: 1.25}
INSTANCES = 10_000
TAIL_BATCH = 64
TAILS = ("lognormal", "pareto")
TASKS = 400


def draw(distribution: str, role: str, sample: int) -> float:
    """Seconds that one call of one instance takes: medians near 0.1 s, a heavy tail, the same in every run."""
    random = Random(f"{distribution}/{role}/{sample}")
    return random.lognormvariate(log(0.1), 1.0) if distribution == "lognormal" else 0.06 * random.paretovariate(1.5)


def make_trainer(
    latency: float, batch_size: int, distribution: str | None = None
) -> tuple[Any, Any, list[tuple[int, int]]]:
    """A trainer of an agent with one model call, its guide, and its data."""
    from aggregator import AggregatedUpdate, LLMOptimizer, Module, ParameterNode, exact_match
    from aggregator.cassettes.lineage import current_lineage
    from aggregator.records import Choice, Completion, Message, Usage

    async def drawn(role: str) -> None:
        """Take as long as a call of this role for the instance in whose lineage it is made."""
        place = current_lineage().partition("sample=")[2].partition("/")[0]
        await asyncio.sleep(draw(distribution or "", role, int(place)) if place else latency)

    async def fixed(role: str) -> None:
        await asyncio.sleep(latency)

    wait = fixed if distribution is None else drawn

    class Model:
        """Answers with the same text after a latency."""

        def __init__(self, text: str) -> None:
            self.answer = Completion(
                choices=(Choice(message=Message(content=text)),), usage=Usage(input_tokens=900, output_tokens=60)
            )

        async def complete(self, messages: Any, **options: Any) -> Completion:
            await wait("agent")
            return self.answer

    student = Model("billing")

    class Router(Module):
        def __init__(self) -> None:
            self.instruction = ParameterNode("Name the team that should answer.\n" * 10, description="what it is told")
            self.examples = ParameterNode(3, description="how many examples it sees")

        async def forward(self, x: int) -> str:
            return (await student.complete([{"role": "user", "content": f"ticket {x}"}])).text

    suggestion = '{{"reasoning_examples": "more", "suggestion": {{"examples": {}}}}}'

    class Optimizer(Model):
        """Two different suggestions in turn, so that there is something to aggregate."""

        calls = 0

        async def complete(self, messages: Any, **options: Any) -> Completion:
            self.calls += 1
            content = suggestion.format(4 + self.calls % 2)
            await wait("proposal")
            return Completion(choices=(Choice(message=Message(content=content)),), usage=self.answer.usage)

    trainer = AggregatedUpdate(Router(), LLMOptimizer(llm=Optimizer("")), llm=Model(suggestion.format(4)))
    return trainer, exact_match, [(i, i) for i in range(batch_size)]


def wall(batch_size: int) -> dict[str, float]:
    """One step at full concurrency: seconds, and the three calls that no schedule can shorten."""
    trainer, guide, data = make_trainer(LATENCY, batch_size)
    trainer.train(guide, data[:2], batch_size=2, max_concurrency=2)  # imports and the loop's thread
    start = time.perf_counter()
    trainer.train(guide, data, batch_size=batch_size, max_concurrency=batch_size)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "critical path": 3 * LATENCY, "ratio": seconds / (3 * LATENCY)}


def tail(distribution: str, batch_size: int) -> dict[str, float]:
    """One step whose calls take very different times, against the slowest instance's two calls and the merge."""
    trainer, guide, data = make_trainer(LATENCY, batch_size, distribution)
    trainer.train(guide, data[:2], batch_size=2, max_concurrency=2)  # imports and the loop's thread
    start = time.perf_counter()
    trainer.train(guide, data, batch_size=batch_size, max_concurrency=batch_size)
    seconds = time.perf_counter() - start
    agents, proposals = ([draw(distribution, role, i) for i in range(batch_size)] for role in ("agent", "proposal"))
    slowest = max(map(sum, zip(agents, proposals, strict=True))) + LATENCY
    barrier = max(agents) + max(proposals) + LATENCY
    return {"seconds": seconds, "critical path": slowest, "ratio": seconds / slowest, "barrier": barrier / slowest}


async def processes(tasks: int) -> dict[str, float]:
    """What a worker process adds to the agent: its start, and each rollout, without and with a model's call."""
    from aggregator import LLM, as_agent
    from aggregator.executors import ProcessExecutor
    from aggregator.executors.work import AgentWork
    from aggregator.records import RolloutTask, Sample
    from aggregator.testing import FakeTransport

    llm = LLM("openai-compatible/tiny", base_url="http://127.0.0.1:9/v1", transport=FakeTransport("billing"))
    jobs = [RolloutTask(sample=Sample(i, i), lineage=(f"sample={i}",)) for i in range(tasks)]
    found: dict[str, float] = {}
    with ProcessExecutor(2) as executor:
        for name, agent in (("us", Counter(None)), ("us with a call", Counter(llm))):
            work = AgentWork(as_agent(agent), None)
            start = time.perf_counter()
            await executor.map(work, jobs[:2])
            found.setdefault("start ms", (time.perf_counter() - start) * 1e3)
            start = time.perf_counter()
            await executor.map(work, jobs)
            found[name] = (time.perf_counter() - start) / tasks * 1e6
    return found


class Counter:
    """An agent that does next to nothing; a worker process imports it."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def parameters(self) -> list[Any]:
        from aggregator import ParameterNode

        return vars(self).setdefault("own", [ParameterNode(1, name="amount")])

    async def __call__(self, x: int) -> Any:
        return x if self.llm is None else (await self.llm.complete(f"ticket {x}")).text


def cpu(instances: int, in_thread: bool = False) -> dict[str, float]:
    """CPU of one epoch with models that answer at once, per instance."""
    trainer, guide, data = make_trainer(0.0, instances)
    if in_thread:
        guide = partial(_plain, guide)
    trainer.train(guide, data[:64], batch_size=64)
    start = time.process_time()
    trainer.train(guide, data, batch_size=64)
    return {"us": (time.process_time() - start) / instances * 1e6}


def _plain(guide: Any, x: Any, output: Any, info: Any) -> Any:
    """The same guide as a plain function, which runs in a thread."""
    return guide(x, output, info)


def memory(instances: int, after: int = 1_000) -> dict[str, float]:
    """Resident memory at the end of an epoch, over what it was after the first instances."""
    trainer, guide, data = make_trainer(0.0, instances)
    marks: list[tuple[int, float]] = []

    def watch(report: Any) -> None:
        marks.append(((report.step + 1) * 64, resident()))

    trainer.observers = [watch]
    trainer.train(guide, data, batch_size=64)
    first = next(size for seen, size in marks if seen >= min(after, instances // 2))
    return {"first MB": first, "last MB": marks[-1][1], "growth MB": marks[-1][1] - first}


def resident() -> float:
    """Resident memory of this process in MB."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - read at every step
            return int(file.read().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def run(options: Options) -> Report:
    instances = 1_000 if options.quick else INSTANCES
    batches = BATCHES[:2] if options.quick else BATCHES
    cases = [Case(f"batch {size}", call("step", "wall", batch_size=size)) for size in batches]
    cases += [
        Case("cpu", call("step", "cpu", instances=min(instances, 2_000))),
        Case("cpu, guide in a thread", call("step", "cpu", instances=min(instances, 2_000), in_thread=True)),
        Case("memory", call("step", "memory", instances=instances)),
        Case("processes", call("step", "processes", tasks=TASKS // (4 if options.quick else 1))),
    ]
    cases += [Case(name, call("step", "tail", distribution=name, batch_size=TAIL_BATCH)) for name in TAILS]
    measured = measure(cases, options, repetitions=3)
    ratios = {size: measured.median(f"batch {size}", "ratio") for size in batches}
    rows = [
        Row(f"step of {size} instances", {"seconds": measured.median(f"batch {size}", "seconds"), "ratio": ratio})
        for size, ratio in ratios.items()
    ]
    rows += [
        Row(f"{name}, an instance", {"us": measured.median(name, "us")}) for name in ("cpu", "cpu, guide in a thread")
    ]
    rows += [
        Row(
            f"step of {TAIL_BATCH} instances, {name} latencies",
            {key: measured.median(name, key) for key in ("seconds", "ratio", "barrier")},
        )
        for name in TAILS
    ]
    rows.append(Row("rollout in a worker process", measured.figures["processes"][0]))
    rows.append(Row(f"memory, {instances} instances in batches of 64", measured.figures["memory"][0]))
    targets = [
        Target(f"step of {size} against the critical path of {3 * LATENCY:g} s", ratio, LIMITS[size], "x")
        for size, ratio in ratios.items()
    ]
    targets += [
        Target(f"step with {name} latencies against its slowest instance", measured.median(name, "ratio"), 1.05, "x")
        for name in TAILS
    ]
    targets.append(Target("CPU of trainer, prompts and parsing an instance", measured.median("cpu", "us"), 150, "us"))
    growth = measured.median("memory", "growth MB")
    targets.append(Target("memory growth after the first 1,000 instances", growth, 5.0, "MB"))
    notes = [
        "The models are in this process and answer after asyncio.sleep; no HTTP is part of these figures.",
        "Heavy-tailed latencies: the path is the slowest instance's agent and proposal, and the merge.",
        "`barrier` is what the same step would take if proposals began only after the last rollout, on the same path.",
        "Memory grows by the result's own history: one score per instance and one report per step.",
    ]
    return Report(rows=rows, targets=targets, notes=notes)
