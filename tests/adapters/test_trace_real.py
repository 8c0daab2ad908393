"""Agents and optimizers of the real Trace package, run with `make test-trace`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import warnings
from typing import Any

import pytest

from aggregator import (
    AggregatedUpdate,
    BasicSearchAlgorithm,
    ConfigError,
    LLMOptimizer,
    MinibatchAlgorithm,
    PrioritySearch,
    Rollout,
    as_model,
)
from aggregator.adapters.agents import as_agent
from aggregator.adapters.frameworks import require_version
from aggregator.adapters.trace import NEWEST, OLDEST
from aggregator.adapters.trace_optimizer import as_optimizer
from aggregator.agents.parameters import overriding
from aggregator.executors.work import AgentWork
from aggregator.records import RolloutTask, Sample
from aggregator.training.step import Step

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def opto() -> Any:
    """Return Trace's package without nodes, or skip; its import gives many warnings that are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("opto.optimizers", reason="the extra `trace` (trace-opt) is not installed")
    import opto.optimizers
    import opto.trace

    opto.trace.GRAPH.clear()
    return opto


def make(opto: Any, forward: Any, prompt: str = "hi") -> Any:
    """Return a Trace agent with one parameter, a traced operation `say`, an async one `tell`, and this forward."""

    class Speaker(opto.trace.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.prompt = opto.trace.node(prompt, name="prompt", trainable=True)

        @opto.trace.bundle()  # type: ignore[untyped-decorator]
        def say(self, prompt: Any, x: Any) -> Any:
            """Return the prompt and the input."""
            time.sleep(0.002)
            return f"{prompt} {x}"

        @opto.trace.bundle()  # type: ignore[untyped-decorator]
        async def tell(self, prompt: Any, x: Any) -> Any:
            """Return the prompt and the input, later."""
            await asyncio.sleep(0.001)
            return f"{prompt} {x}"

    Speaker.forward = forward
    return Speaker()


def say(self: Any, x: Any) -> Any:
    return self.say(self.prompt, x)


async def await_say(self: Any, x: Any) -> Any:
    await asyncio.sleep(0.001)
    return self.say(self.prompt, x)


async def await_tell(self: Any, x: Any) -> Any:
    return await self.tell(self.prompt, x)


def return_tell(self: Any, x: Any) -> Any:
    return self.tell(self.prompt, x)


async def tell_in_a_task(self: Any, x: Any) -> Any:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(self.tell(self.prompt, x))
    return task.result()


@dataclasses.dataclass
class Reply:
    """A user's own class of output."""

    text: Any
    sources: list[Any]


def reply(self: Any, x: Any) -> Any:
    return Reply(self.say(self.prompt, x), [self.say(self.prompt, "source"), "plain"])


OUTPUTS = {
    "tuple": (lambda self, x: (self.say(self.prompt, x), self.say(self.prompt, 2)), ("hi 1", "hi 2")),
    "dict": (lambda self, x: {"a": self.say(self.prompt, x), "b": {"c": [x]}}, {"a": "hi 1", "b": {"c": [1]}}),
    "list": (lambda self, x: [[self.say(self.prompt, x)], "plain"], [["hi 1"], "plain"]),
    "dataclass": (reply, Reply("hi 1", ["hi source", "plain"])),
}


async def no_thread(*_: Any) -> Any:
    raise AssertionError("an agent of Trace has threads of its own")


async def run(agent: Any, x: Any) -> Any:
    return await agent.run(RolloutTask(sample=Sample(0, x), values={}), no_thread)


def suggest(value: str) -> Any:
    """A model that suggests this value for the one variable, and records its prompts."""

    def answer(messages: Any) -> str:
        answer.asked.append(messages[-1]["content"])  # type: ignore[attr-defined]
        return json.dumps({"reasoning": "", "answer": "", "suggestion": {"prompt0": value}})

    answer.asked = []  # type: ignore[attr-defined]
    return answer


def right(x: Any, output: str, info: Any) -> tuple[float, str]:
    return float(output == info), f"expected <{info}>"


@pytest.mark.requirement("Trace: reading an output made other instances fail")
def test_reading_an_output_does_not_make_other_instances_fail(opto: Any) -> None:
    """Trace records globally what an operation reads, so an output is read while no other instance is inside Trace."""
    llm = as_model(lambda messages: '{"suggestion": {}}')
    for _ in range(3):
        trainer = AggregatedUpdate(make(opto, say), LLMOptimizer(llm=llm), llm=llm)
        result = trainer.train(lambda x, output, info: 0.5, [(f"q{i}", "") for i in range(24)], batch_size=24)
        assert result.failures == ()


@pytest.mark.parametrize("forward", [say, await_say, await_tell, return_tell, tell_in_a_task])
async def test_a_forward_may_be_async_and_candidates_are_separate(opto: Any, forward: Any) -> None:
    """Coroutines are awaited, with their candidate's values on the nodes all the time."""
    plain = make(opto, forward)
    agent: Any = as_agent(plain)

    async def trial(value: str, i: int) -> Any:
        with overriding(agent.parameters(), {"prompt": value}):
            ran = await run(agent, i)
        return ran.error or (ran.output, opto.trace.nodes.Node in type(ran.handle).__mro__)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(trial(f"v{i % 3}", i)) for i in range(24)]
    assert [task.result() for task in tasks] == [(f"v{i % 3} {i}", True) for i in range(24)]
    assert plain.prompt.data == "hi"


async def test_a_cancelled_instance_releases_the_lock(opto: Any) -> None:
    """The next instance runs, whether the first was cancelled while waiting for Trace or inside it."""

    async def forward(self: Any, x: Any) -> Any:
        await asyncio.sleep(30 if x == "hang" else 0)
        return self.say(self.prompt, x)

    agent = as_agent(make(opto, forward))
    async with asyncio.TaskGroup() as group:
        inside, waiting = [group.create_task(run(agent, x)) for x in ("hang", "later")]
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.sleep(0.05)
        inside.cancel()
    async with asyncio.timeout(10):
        assert (await run(agent, 1)).output == "hi 1"


@pytest.mark.parametrize(("forward", "expected"), OUTPUTS.values(), ids=OUTPUTS)
async def test_outputs_of_several_nodes_are_plain_data_and_accept_feedback(
    opto: Any, forward: Any, expected: Any
) -> None:
    """The guide sees the nodes' values; feedback on the whole output reaches the parameters through each of them."""
    plain, llm = make(opto, forward), suggest("hello")
    agent: Any = as_agent(plain)
    optimizer = as_optimizer(opto.optimizers.OptoPrime(plain.parameters(), llm=as_model(llm)), agent)
    ran = await run(agent, 1)
    assert ran.output == expected
    seen = Rollout(sample_id=0, output=ran.output, feedback="more", handle=ran.handle)
    proposal = await optimizer.propose([seen], Step(parameters=optimizer.parameters))
    assert (proposal.values, proposal.error) == ({"prompt": "hello"}, None)
    assert "output0 = output(" in llm.asked[0]


@pytest.mark.requirement("Trace: MinibatchAlgorithm and searches with Trace's optimizers")
@pytest.mark.parametrize("trainer", [MinibatchAlgorithm, BasicSearchAlgorithm, PrioritySearch])
@pytest.mark.parametrize("forward", [say, OUTPUTS["tuple"][0]], ids=["node", "tuple"])
def test_trainers_that_propose_for_a_minibatch_learn(opto: Any, trainer: Any, forward: Any) -> None:
    """A Trace optimizer gets all outputs and all feedback of the minibatch, each under its own name."""
    agent, llm = make(opto, forward), suggest("hello")
    data = [(x, "hello you") for x in ("you", "you")] * 2

    def guide(x: Any, output: Any, info: Any) -> tuple[float, str]:
        return right(x, output if isinstance(output, str) else output[0], info)

    optimizer = opto.optimizers.OptoPrime(agent.parameters(), llm=as_model(llm))
    result = trainer(agent, optimizer).train(guide, data, batch_size=2, num_epochs=2)
    assert [failure for failure in result.failures if failure.stage == "proposal"] == []
    assert agent.prompt.data == "hello"
    assert "expected <hello you>\nID [" in llm.asked[0]
    first, second = ("say0 = ", "say1 = ") if forward is say else ("say2 = ", "say3 = ")
    assert first in llm.asked[0]
    assert second in llm.asked[0]


async def test_several_proposals_can_be_made_from_one_rollout(opto: Any) -> None:
    """Trace propagates feedback through a graph once; here the graph is kept, with its names."""
    plain, llm = make(opto, say), suggest("hello")
    agent: Any = as_agent(plain)
    optimizer = as_optimizer(opto.optimizers.OptoPrime(plain.parameters(), llm=as_model(llm)), agent)
    rollouts = [Rollout(sample_id=i, feedback="more", handle=(await run(agent, i)).handle) for i in range(2)]
    step: Any = Step(parameters=optimizer.parameters)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(optimizer.propose(rollouts, step)) for _ in range(3)]
    single = await optimizer.propose(rollouts[1:], step)
    assert [task.result().values for task in tasks] == [{"prompt": "hello"}] * 3
    assert single.values == {"prompt": "hello"}
    assert len(set(llm.asked[:3])) == 1
    assert {rollout.handle.name for rollout in rollouts} == {rollouts[0].handle.name}


async def test_prompts_hold_no_addresses(opto: Any) -> None:
    """Each traced method has the agent itself as a node; its address would change every run's prompts."""
    plain, llm = make(opto, say), suggest("hello")
    agent: Any = as_agent(plain)
    optimizer = as_optimizer(opto.optimizers.OptoPrime(plain.parameters(), llm=as_model(llm)), agent)
    seen = Rollout(sample_id=0, feedback="more", handle=(await run(agent, 1)).handle)
    await optimizer.propose([seen], Step(parameters=optimizer.parameters))
    assert "Speaker object>" in llm.asked[0]
    assert " at 0x" not in llm.asked[0]
    assert (await run(agent, 2)).output == "hi 2"


async def test_feedback_belongs_to_its_instance_after_the_model_was_called(opto: Any) -> None:
    """Trace's TextGrad reads feedback between its calls, after other instances have stored theirs."""

    class Late(opto.optimizers.optimizer.Optimizer):  # type: ignore[misc]
        llm = staticmethod(lambda: time.sleep(0.005))

        def _step(self, *args: Any, **kwargs: Any) -> Any:
            self.llm()
            (node,) = self.parameters
            return {node: " ".join(one.user_feedback for many in node.feedback.values() for one in many)}

    plain = make(opto, say)
    agent: Any = as_agent(plain)
    inner = Late(plain.parameters())
    inner.llm = inner.llm
    optimizer = as_optimizer(inner, agent)

    async def one(i: int) -> Any:
        seen = Rollout(sample_id=i, feedback=f"feedback {i}", handle=(await run(agent, i)).handle)
        return (await optimizer.propose([seen], Step(parameters=optimizer.parameters))).values

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(i)) for i in range(12)]
    assert [task.result() for task in tasks] == [{"prompt": f"feedback {i}"} for i in range(12)]
    assert dict(plain.prompt.feedback) == {}


def test_graphs_are_freed(opto: Any) -> None:
    """Trace's parameters keep every operation that read them; here they do so for one instance."""
    agent = make(opto, say)
    llm = as_model(suggest("hello"))
    optimizer = opto.optimizers.OptoPrime(agent.parameters(), llm=llm)
    AggregatedUpdate(agent, optimizer, llm=llm).train(right, [("you", "hello you")] * 4, batch_size=4)
    assert list(agent.prompt.children) == []


def test_an_unsupported_version_lists_the_supported_ones() -> None:
    """Versions before 0.1.3 need another library for their models; versions after 0.2 are unknown."""
    for version in ("0.1.2.2", "0.3.0"):
        with pytest.raises(ConfigError, match=r"from 0\.1\.3 and below 0\.3, got " + version):
            require_version("trace-opt", OLDEST, NEWEST, version=version)
    for version in ("0.1.3", "0.1.3.9", "0.2.0"):
        require_version("trace-opt", OLDEST, NEWEST, version=version)


def test_an_overridden_forward_of_a_trainer_does_not_race(opto: Any) -> None:
    """It calls the user's own agent, whose registries all instances share."""
    llm = as_model(lambda messages: '{"suggestion": {}}')

    class Own(AggregatedUpdate):
        def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: Any = 0) -> Any:
            score, feedback = guide(x, agent(x).data, info)
            return {agent.prompt: f"hello {feedback}"}, score

    trainer = Own(make(opto, say), LLMOptimizer(llm=llm), llm=llm)
    result = trainer.train(right, [(f"q{i}", "") for i in range(24)], batch_size=24)
    assert result.failures == ()


async def test_operations_are_the_transcript(opto: Any) -> None:
    """Our optimizer sees each operation's inputs and output, with the candidate's values."""
    model = suggest("hello")
    llm = as_model(model)

    def forward(self: Any, x: Any) -> Any:
        said = self.say(self.prompt, x)
        return said, self.say(said, "again")

    agent = as_agent(make(opto, forward))
    task = RolloutTask(sample=Sample(0, "you"), values={"prompt": "hey"}, capture=True, lineage=("test",), role="agent")
    found = await AgentWork(agent, None)(task)
    assert found.transcript.count("Speaker.say: Return the prompt and the input\n") == 2
    for part in ('prompt: "hey"', 'returned: "hey you again"'):
        assert part in found.transcript
    trainer = AggregatedUpdate(make(opto, say), LLMOptimizer(llm=llm), llm=llm)
    result = await trainer.atrain(right, [("you", "hello you")] * 2, batch_size=2)
    assert 'prompt: "hi"' in model.asked[0]
    assert not [text for text in result.warnings if "no transcript" in text]
