"""Trace's agents and optimizers through the yielding lock: instances never mix, and models are called concurrently."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aggregator import ConfigError, Module, Rollout
from aggregator.adapters.agents import CalledAgent, as_agent
from aggregator.adapters.trace import TraceAgent
from aggregator.adapters.trace_optimizer import as_optimizer
from aggregator.agents.parameters import overriding, read, write
from aggregator.cassettes.lineage import lineage
from aggregator.errors import ParameterError, RateLimitError, SandboxWarning
from aggregator.records import RolloutTask, Sample
from aggregator.sandbox.limits import sandboxed
from aggregator.training.algorithms import Minibatch
from aggregator.training.gates import improves_on_batch
from aggregator.training.merge import majority
from aggregator.training.parts import check_code
from aggregator.training.step import Step

DEPTH = 20


class Node:
    """The parts of Trace's node that the adapter and an optimizer use: shared data, parents and feedback."""

    def __init__(self, data: Any, name: str, parents: tuple[Node, ...] = ()) -> None:
        self._data = data
        self.name = name
        self.parents = parents
        self.feedback: list[str] = []
        self.trainable = not parents
        self.description = "[ParameterNode] How to answer."
        self._constraint = "short"

    @property
    def data(self) -> Any:
        return self._data

    @property
    def py_name(self) -> str:
        return self.name.replace(":", "")


class Agent:
    """An agent of DEPTH traced operations with one shared parameter."""

    def __init__(self, prompt: Any = "start") -> None:
        self.prompt = Node(prompt, "prompt:0")

    def parameters(self) -> list[Node]:
        return [self.prompt]

    def __call__(self, x: Any) -> Node:
        if x == "fail":
            error = ValueError("no answer")
            error.exception_node = Node("no answer", "error:0", (self.prompt,))  # type: ignore[attr-defined]
            raise error
        node = self.prompt
        for i in range(DEPTH):
            node = Node(f"{self.prompt.data}/{x}", f"step:{i}", (node,))
        return node


class Optimizer:
    """Trace's protocol: feedback is stored on shared nodes, and the prompt is built from them."""

    def __init__(self, parameters: list[Node], llm: Any) -> None:
        self.parameters = parameters
        self.llm = llm
        self.log: list[str] = []

    def zero_feedback(self) -> None:
        for node in self.parameters:
            node.feedback = []

    def backward(self, node: Node, feedback: str) -> None:
        path = []
        while node.parents:
            path.append(node.data)
            time.sleep(0)  # let the others run, unless something prevents it
            (node,) = node.parents
        node.feedback.append(f"{feedback} after {len(set(path))} of {path[0] if path else ''}")

    def step(self, bypassing: bool = False) -> dict[Node, Any]:
        (node,) = self.parameters
        time.sleep(0)
        prompt = " & ".join(node.feedback)
        suggestion = self.llm(messages=[{"role": "user", "content": prompt}])
        update = self.construct_update_dict(suggestion)
        self.log.append(prompt)
        if not bypassing:
            node._data = update[node]
        return update

    def construct_update_dict(self, suggestion: dict[str, Any]) -> dict[Node, Any]:
        return {node: type(node.data)(suggestion[node.py_name]) for node in self.parameters}


def echo(messages: list[dict[str, str]]) -> dict[str, str]:
    """A model that proposes what its prompt shows."""
    return {"prompt0": messages[0]["content"]}


def right(i: int) -> str:
    return f"feedback {i} after 1 of start/{i}"


def adapt(plain: Any, optimizer: Any) -> tuple[Any, Any]:
    """Agent and optimizer, adapted as by a trainer."""
    agent = as_agent(plain)
    return agent, as_optimizer(optimizer, agent)


async def run(agent: Any, x: Any) -> Any:
    """Return the agent's output alone."""
    return await agent.run(RolloutTask(sample=Sample(0, x)), None)


async def propose(agent: Any, optimizer: Any, i: Any, number: int = 0) -> Any:
    ran = await run(agent, i)
    rollout = Rollout(sample_id=int(i), output=ran.output, feedback=f"feedback {i}", score=0.5, handle=ran.handle)
    return await optimizer.propose([rollout], Step(number=number, parameters=optimizer.parameters))


async def all_of(agent: Any, optimizer: Any, count: int, number: int = 0) -> list[Any]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(propose(agent, optimizer, i, number)) for i in range(count)]
    return [task.result() for task in tasks]


@pytest.mark.requirement("Trace's defect 2: prompts held another instance's graph")
async def test_no_prompt_holds_another_instances_work() -> None:
    """Forced interleaving: in 5 rounds of 32 instances each prompt holds its own feedback and graph; 0 of 160 wrong."""
    shuffle = random.Random(3)

    def slow_echo(messages: list[dict[str, str]]) -> dict[str, str]:
        time.sleep(shuffle.random() / 500)
        return echo(messages)

    plain = Agent()
    agent, optimizer = adapt(plain, Optimizer(plain.parameters(), slow_echo))
    wrong = 0
    for _ in range(5):
        proposals = await all_of(agent, optimizer, 32)
        wrong += sum(proposal.values != {"prompt": right(i)} for i, proposal in enumerate(proposals))
    assert wrong == 0
    assert plain.prompt.data == "start"


def test_without_the_lock_the_same_calls_mix() -> None:
    """The fake is sensitive: the same interleaving on the bare optimizer mixes instances."""
    plain = Agent()
    together = threading.Barrier(8, timeout=30)

    class Interleaved(Optimizer):
        def backward(self, node: Node, feedback: str) -> None:
            together.wait()
            super().backward(node, feedback)
            together.wait()

    optimizer = Interleaved(plain.parameters(), echo)
    prompts: dict[int, Any] = {}

    def one(i: int) -> None:
        mine = copy.copy(optimizer)
        mine.zero_feedback()
        mine.backward(plain(i), f"feedback {i}")
        prompts[i] = mine.step(bypassing=True)[plain.prompt]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(prompts[i] != right(i) for i in range(8))


async def test_models_are_called_concurrently() -> None:
    """8 samples wait for their model together: with 0.3 s each a step takes a little more than 0.3 s, not 2.4 s."""
    together = threading.Barrier(8, timeout=30)

    def waiting(messages: list[dict[str, str]]) -> dict[str, str]:
        together.wait()  # passes only once all eight have arrived
        return echo(messages)

    plain = Agent()
    agent, optimizer = adapt(plain, Optimizer(plain.parameters(), waiting))
    proposals = await all_of(agent, optimizer, 8)
    assert [proposal.values["prompt"] for proposal in proposals] == [right(i) for i in range(8)]


async def test_a_candidate_is_tried_concurrently_with_the_current_values() -> None:
    """Concurrent evaluations with different overrides each use their own values; nothing is left afterwards."""
    plain = Agent()
    agent, _ = adapt(plain, Optimizer(plain.parameters(), echo))

    async def trial(value: str, x: int) -> Any:
        with overriding(agent.parameters(), {"prompt": value}):
            return (await run(agent, x)).output

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(trial(f"v{i % 3}", i)) for i in range(30)]
    assert [task.result() for task in tasks] == [f"v{i % 3}/{i}" for i in range(30)]
    assert plain.prompt.data == "start"


class Buffer:
    """Trace's FIFO buffer: it keeps the order and drops the oldest item."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffer: list[str] = []

    def add(self, item: str) -> None:
        self.buffer.append(item)
        self.buffer = self.buffer[-self.size :]

    def __iter__(self) -> Any:
        return iter(self.buffer)


@pytest.mark.requirement("Trace's defect 7: proposals of one batch saw each other through the memory")
@pytest.mark.parametrize(("name", "memory"), [("memory", Buffer(3)), ("buffer", [])])
async def test_proposals_of_one_batch_do_not_see_each_other(name: str, memory: Any) -> None:
    """All instances of a step see the same memory; what they add is visible from the next step on.

    OptoPrime keeps a buffer of fixed size in `memory`, OPRO a list in `buffer`.
    """

    class Remembering(Optimizer):
        def step(self, bypassing: bool = False) -> dict[Node, Any]:
            mine = getattr(self, name)
            seen = " ".join(mine)
            (mine.add if hasattr(mine, "add") else mine.append)(self.parameters[0].feedback[0].split()[1])
            self.llm(messages=[{"role": "user", "content": ""}])
            return {self.parameters[0]: f"saw {seen}"}

    plain = Agent()
    inner = Remembering(plain.parameters(), echo)
    setattr(inner, name, memory)
    agent, optimizer = adapt(plain, inner)
    first = await all_of(agent, optimizer, 3)
    assert [proposal.values for proposal in first] == [{"prompt": "saw "}] * 3
    second = await all_of(agent, optimizer, 2, number=1)
    assert [proposal.values for proposal in second] == [{"prompt": "saw 0 1 2"}] * 2
    third = await all_of(agent, optimizer, 1, number=2)
    assert third[0].values == {"prompt": "saw 2 0 1" if name == "memory" else "saw 0 1 2 0 1"}


async def test_an_optimizer_sees_the_candidate_that_ran() -> None:
    """With an override the optimizer finds the candidate's value on the node, and the current value does not change."""

    class Reading(Optimizer):
        def step(self, bypassing: bool = False) -> dict[Node, Any]:
            before = self.parameters[0]._data
            self.llm(messages=[{"role": "user", "content": ""}])
            return {self.parameters[0]: f"{before} and {self.parameters[0]._data}"}

    plain = Agent()
    agent, optimizer = adapt(plain, Reading(plain.parameters(), echo))

    async def under(value: str) -> Any:
        with overriding(agent.parameters(), {"prompt": value}), lineage(f"candidate={value}"):
            return await propose(agent, optimizer, 1)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(under(f"v{i}")) for i in range(8)]
    assert [task.result().values["prompt"] for task in tasks] == [f"v{i} and v{i}" for i in range(8)]
    assert plain.prompt.data == "start"
    assert len(optimizer._copies) == 8  # one memory each, though all have one sample


async def test_values_are_converted_by_our_types() -> None:
    """Trace's `type(old)(new)` turned "False" into True; a suggestion is converted or refused with the reason."""
    plain = Agent(prompt=True)
    agent, optimizer = adapt(plain, Optimizer(plain.parameters(), lambda messages: {"prompt0": "False"}))
    assert (await propose(agent, optimizer, 1)).values == {"prompt": False}
    optimizer.optimizer.llm = lambda messages: {"prompt0": "perhaps"}
    refused = await propose(agent, optimizer, 1)
    assert (refused.values, refused.error) == ({}, "Expected `bool`, got 'perhaps' - at $.suggestion.prompt")


async def test_code_that_does_not_compile_is_refused() -> None:
    """A code parameter of Trace keeps its name and signature."""
    plain = Agent("def route(self, x):\n    return x\n")
    plain.prompt.name = "__code:7"
    agent, _ = adapt(plain, Optimizer(plain.parameters(), echo))
    (code,) = agent.parameters()
    with pytest.raises(ParameterError, match="Expected Python source that parses"):
        code.convert("def route(self, x):\n    retrn x")
    assert code.convert("def route(self, x):\n    return 2 * x").endswith("2 * x\n")


SOURCE = "def route(self, x):\n    return x\n"


def coded() -> Agent:
    plain = Agent(SOURCE)
    plain.prompt.name = "__code:0"
    return plain


def test_code_that_trace_runs_was_silently_trained_in_this_process(tmp_path: Path) -> None:
    """A warning before training names it; `sandboxed(None)` accepts it, and any other sandbox is an error.

    A file with such code loads only with the user's permission, like other code without a sandbox.
    """
    parameters = TraceAgent(coded()).parameters()
    with pytest.warns(SandboxWarning, match="The code of __code will be trained and runs in this process"):
        assert check_code(None, parameters) == {"__code": "none"}
    with sandboxed(None):
        check_code(None, parameters)
    with sandboxed("process"), pytest.raises(ConfigError, match="got code that Trace runs in this process: __code"):
        check_code(None, parameters)
    changed = TraceAgent(coded())
    changed.parameters()[0].data = SOURCE.replace("return x", "return 2 * x")
    changed.save(tmp_path / "agent.json")
    loaded = TraceAgent(coded())
    with pytest.raises(ConfigError, match="code=True or code='ask'"):
        loaded.load(tmp_path / "agent.json")
    loaded.load(tmp_path / "agent.json", code=True)
    assert "2 * x" in loaded.parameters()[0].data


async def test_feedback_starts_at_an_agents_failure() -> None:
    """The proposal for an error with Trace's exception node starts at that node."""
    plain = Agent()
    agent, optimizer = adapt(plain, Optimizer(plain.parameters(), echo))
    ran = await run(agent, "fail")
    assert isinstance(ran.error, ValueError)
    failed = Rollout(sample_id=0, feedback="it failed", handle=ran.handle)
    proposal = await optimizer.propose([failed], Step(parameters=optimizer.parameters))
    assert proposal.values == {"prompt": "it failed after 1 of no answer"}


async def test_an_error_in_an_optimizer_is_one_instances_record() -> None:
    """An error of the optimizer fails its proposal only; a lost call is raised, as by every optimizer."""
    plain = Agent()
    agent, optimizer = adapt(plain, Optimizer(plain.parameters(), lambda messages: {}))
    proposal = await propose(agent, optimizer, 1)
    assert (proposal.values, proposal.error) == ({}, None)

    def broken(messages: Any) -> Any:
        raise RuntimeError("out of tune")

    optimizer.optimizer.llm = broken
    assert (await propose(agent, optimizer, 1)).error == "RuntimeError: out of tune"

    def lost(messages: Any) -> Any:
        raise RateLimitError("slow down", status=429)

    optimizer.optimizer.llm = lost
    with pytest.raises(RateLimitError):
        await propose(agent, optimizer, 1)
    optimizer.optimizer.llm = echo
    assert (await propose(agent, optimizer, 1)).values == {"prompt": right(1)}


async def test_an_output_that_is_not_a_node_is_reported() -> None:
    """Without a node there is no path back to the parameters."""
    plain = Agent()
    _, optimizer = adapt(plain, Optimizer(plain.parameters(), echo))
    text = Rollout(sample_id=0, output="text", handle="text")
    proposal = await optimizer.propose([text], Step(parameters=optimizer.parameters))
    assert proposal.error == "the output holds no node of Trace, so no feedback can reach the parameters"


def test_native_agents_and_optimizers_are_unchanged() -> None:
    """Only Trace's are adapted, and a Trace optimizer is refused for another agent."""
    native = Module()
    agent = as_agent(native)
    assert isinstance(agent, CalledAgent)
    assert agent.program is native
    assert as_optimizer(None, agent) is None
    with pytest.raises(ConfigError, match="Expected an agent with parameters of Trace for Optimizer, got Module"):
        adapt(native, Optimizer([], echo))
    with pytest.raises(ConfigError, match="an optimizer of the agent's own parameters, got other:0"):
        adapt(Agent(), Optimizer([Node(1, "other:0")], echo))


@pytest.mark.requirement("Trace: Trace's own optimizers and agents")
def test_parameters_have_our_interface(tmp_path: Path) -> None:
    """Their names do not depend on other nodes; values are read, written, saved and loaded as for any agent."""
    plain = Agent()
    plain.prompt.name = "prompt:17"
    agent = TraceAgent(plain)
    (prompt,) = agent.parameters()
    assert prompt.describe() == {
        "value": "start",
        "type": "str",
        "description": "How to answer.",
        "constraint": "short",
    }
    assert prompt.name == "prompt"
    write([prompt], {"prompt": "new"})
    assert plain.prompt.data == "new"
    agent.save(tmp_path / "agent.json")
    plain.prompt._data = "lost"
    agent.load(tmp_path / "agent.json")
    assert read(agent.parameters()) == {"prompt": "new"}


def opto(module: str) -> Any:
    """Return a module of Trace, or skip; its import gives many warnings that are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, reason="the extra `trace` (trace-opt) is not installed")


def number_in(text: str) -> str:
    return text.partition("feedback <")[2].partition(">")[0]


def real_model(messages: Any, **_: Any) -> Any:
    """A model in OpenAI's shape that proposes its instance's number, and records the prompt."""
    time.sleep(0.001)
    suggestion = {"reasoning": "", "suggestion": {"prompt0": f"p{number_in(messages[-1]['content'])}"}}
    text = json.dumps({**suggestion, "prompt": messages[-1]["content"]})
    real_model.prompts.append(messages[-1]["content"])  # type: ignore[attr-defined]
    return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text))])


@pytest.mark.filterwarnings("ignore")
async def test_the_real_optoprime_does_not_mix_instances() -> None:
    """Trace's own agent and OptoPrime from PyPI: in 5 times 32 concurrent instances no prompt shows another instance.

    The prompts of all rounds have the same bytes: they hold no counter of Trace's registry, which does not grow.
    """
    trace, optimizers = opto("opto.trace"), opto("opto.optimizers")
    trace.GRAPH.clear()

    @trace.model
    class Real:
        def __init__(self) -> None:
            self.prompt = trace.node("start", name="prompt", trainable=True)

        @trace.bundle()  # type: ignore[untyped-decorator]
        def step(self, state: Any, prompt: Any) -> Any:
            """Do one step."""
            return f"{prompt}/{state}"

        def forward(self, x: Any) -> Any:
            for _ in range(10):
                x = self.step(x, self.prompt)
            return x

    real: Any = Real()
    agent, optimizer = adapt(real, optimizers.OptoPrime(real.parameters(), llm=real_model))

    async def one(i: int) -> Any:
        ran = await run(agent, f"in{i}x")
        seen = Rollout(sample_id=i, output=ran.output, feedback=f"feedback <{i}>", handle=ran.handle)
        return await optimizer.propose([seen], Step(parameters=optimizer.parameters))

    rounds = []
    registered = len(trace.nodes.GRAPH)
    for _ in range(5):
        real_model.prompts = []  # type: ignore[attr-defined]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(i)) for i in range(32)]
        assert [task.result().values for task in tasks] == [{"prompt": f"p{i}"} for i in range(32)]
        prompts: list[str] = sorted(real_model.prompts, key=number_in)  # type: ignore[attr-defined]
        assert [[i for i in range(32) if f"in{i}x" in text] for text in prompts] == [
            [int(number_in(text))] for text in prompts
        ]
        rounds.append(prompts)
    assert rounds == [rounds[0]] * 5
    assert len(trace.nodes.GRAPH) == registered
    assert real.prompt.data == "start"


@pytest.mark.requirement("Trace: Trace's own optimizers and agents")
def test_the_training_loop_runs_on_a_trace_agent() -> None:
    """The trainer uses the adapted pair like any other: rollouts, proposals, rule and gate, to a changed parameter."""
    plain = Agent("bad")
    optimizer = Optimizer(plain.parameters(), lambda messages: {"prompt0": "good"})

    def guide(x: Any, output: str, info: Any) -> tuple[float, str]:
        return float(output == f"good/{x}"), "say good"

    trainer = Minibatch(plain, optimizer, rule=majority, gate=improves_on_batch(), observers=())
    result = trainer.train(guide, {"inputs": [0, 1, 2, 3], "infos": [None] * 4}, batch_size=4, test_dataset=[(7, None)])
    assert result.test_scores == [0.0, 1.0]
    assert plain.prompt.data == "good"
    assert trainer.agent is plain
