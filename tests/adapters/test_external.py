"""Agents outside this process: what a reply may hold, and agents at an address."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from aggregator import (
    AggregatedUpdate,
    Budget,
    LLMOptimizer,
    ParameterNode,
    TrainingError,
    as_agent,
    as_model,
    cassette,
    exact_match,
    optimize,
)
from aggregator.adapters.external import ExternalError, Reported, read_reply
from aggregator.adapters.http import HTTPAgent
from aggregator.adapters.template import own_verdict
from aggregator.errors import (
    APIConnectionError,
    APITimeoutError,
    AuthenticationError,
    BudgetExceededError,
    ConfigError,
    TrainingWarning,
)
from aggregator.executors.work import AgentWork
from aggregator.llm.budget import spending
from aggregator.llm.ledger import collecting
from aggregator.llm.retry import RetryPolicy
from aggregator.records import HTTPReply, HTTPRequest, Rollout, RolloutTask, Sample
from aggregator.testing import FakeTransport, ScriptedModel, suggestion

QUICK = RetryPolicy(first_delay=0.0)


def reply(status: int = 200, **fields: Any) -> HTTPReply:
    return HTTPReply(status=status, body=json.dumps(fields).encode(), headers={})


def echo(request: HTTPRequest) -> HTTPReply:
    given = json.loads(request.body)
    return reply(output=f"{given['values']['prompt']} {given['input']}")


def agent_of(*steps: Any, **options: Any) -> HTTPAgent:
    transport = FakeTransport(*steps)
    return HTTPAgent("http://127.0.0.1:1/run", {"prompt": "hi"}, transport=transport, retry=QUICK, **options)


async def rollout(agent: Any, x: Any = "you", guide: Any = None, **values: Any) -> Rollout:
    task = RolloutTask(sample=Sample(0, x), values=values, lineage=("test",), role="agent", capture=True)
    return await AgentWork(as_agent(agent), guide)(task)


async def test_the_candidates_values_are_in_the_request() -> None:
    """Concurrent candidates share one agent; a value has the type of its seed."""
    agent = HTTPAgent(
        "http://127.0.0.1:1/run", {"prompt": "hi", "k": ParameterNode(3, name="k")}, transport=FakeTransport(echo)
    )
    assert [parameter.type for parameter in agent.parameters()] == [str, int]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(rollout(agent, prompt=f"p{i}", k=i)) for i in range(16)]
    assert [task.result().output for task in tasks] == [f"p{i} you" for i in range(16)]
    assert await agent("Ada") == "hi Ada"


async def test_trained_values_of_a_file_are_used_in_production(tmp_path: Path) -> None:
    agent = agent_of(echo)
    agent.apply({"prompt": "good day"})
    agent.save(tmp_path / "agent.json")
    agent.apply({"prompt": "hi"})
    with agent.applied(tmp_path / "agent.json") as trained:
        assert await trained("Ada") == "good day Ada"
    assert await agent("Ada") == "hi Ada"


async def test_the_agents_own_verdict_is_its_score() -> None:
    """The guide `own_verdict` takes score and feedback from the reply."""
    found = await rollout(agent_of(reply(output="a", score=0.5, feedback="shorter")), guide=own_verdict)
    assert (found.score, found.feedback) == (0.5, "shorter")
    assert found.output == Reported("a", 0.5, "shorter")
    bare = await rollout(agent_of(reply(output="a")), guide=own_verdict)
    assert bare.failure is not None
    assert bare.failure.stage == "guide"


async def test_steps_are_the_transcript_and_usage_is_counted() -> None:
    call = {"messages": [{"role": "user", "content": "a question"}], "output": "an answer"}
    steps = ["looked around", {"name": "search", "input": "lamp", "output": ["a lamp"]}, call]
    usage = {"input_tokens": 10, "output_tokens": 5, "cost": 0.25, "calls": 2}
    agent, budget = agent_of(reply(output="a", transcript=steps, usage=usage)), Budget(usd=0.4)
    with collecting() as ledger, spending(budget):
        found = await rollout(agent)
        assert "looked around" in found.transcript
        assert "search" in found.transcript
        assert "a lamp" in found.transcript
        assert "a question" in found.transcript
        assert {role: (one.total_tokens, one.cost, one.calls) for role, one in ledger.totals().items()} == {
            "agent": (15, 0.25, 2)
        }
        assert (budget.spent.usd, budget.spent.tokens, budget.spent.calls) == (0.25, 15, 2)
        assert (await rollout(agent_of(reply(output="a", transcript="plain")))).transcript.count("plain") == 1


async def test_an_exhausted_budget_stops_runs_before_they_start() -> None:
    agent = agent_of(echo)
    with spending(Budget(calls=0)), pytest.raises(BudgetExceededError):
        await rollout(agent)
    assert agent.transport.requests == []  # type: ignore[attr-defined]


async def test_an_agents_stated_error_is_its_failure() -> None:
    found = await rollout(agent_of(reply(error="no such customer", transcript="asked")))
    assert found.failure is not None
    assert (found.failure.error, found.failure.message) == ("ExternalError", "no such customer")
    assert not found.failure.infrastructure
    assert "asked" in found.transcript


BROKEN = {
    "no JSON": b"Traceback",
    "empty": b"",
    "a list": b"[1]",
    "no output": b'{"score": 1}',
    "a score of text": b'{"output": 1, "score": "good"}',
    "cut": b'{"output": "a',
    "not UTF-8": b"\xff",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
async def test_an_unreadable_reply_is_the_agents_failure(body: bytes) -> None:
    """It is never used as an output, and the error quotes it."""
    found = await rollout(agent_of(HTTPReply(status=200, body=body, headers={})))
    assert found.failure is not None
    assert found.failure.error == "ExternalError"
    assert found.failure.message.startswith("Expected ")
    assert not found.failure.infrastructure


def test_text_is_an_output_on_request() -> None:
    assert read_reply(b"yes\n", "text").output == "yes"


def test_a_null_output_is_an_output() -> None:
    """Only a reply without `output` and without `error` is malformed."""
    assert read_reply(b'{"output": null}', "json").output is None


async def test_a_lost_connection_is_retried_and_is_not_the_agents_failure() -> None:
    lost = APIConnectionError("gone")
    assert (await rollout(agent_of(lost, reply(503), echo))).output == "hi you"
    for step in (lost, reply(503), reply(429)):
        agent = agent_of(step)
        found = await rollout(agent)
        assert found.failure is not None
        assert found.failure.infrastructure
        assert found.score is None
        assert len(agent.transport.requests) == QUICK.max_attempts  # type: ignore[attr-defined]


@pytest.mark.parametrize("status", [301, 400, 422, 500])
async def test_another_status_is_the_agents_failure_with_the_end_of_the_body(status: int) -> None:
    agent = agent_of(HTTPReply(status=status, body=b"x" * 9000 + b"KeyError: 'lamp'", headers={}))
    found = await rollout(agent)
    assert found.failure is not None
    assert f"got {status}: ...xxx" in found.failure.message
    assert found.failure.message.endswith("KeyError: 'lamp'")
    assert not found.failure.infrastructure
    assert len(agent.transport.requests) == 1  # type: ignore[attr-defined]


async def test_no_reply_in_time_is_the_agents_failure() -> None:
    found = await rollout(agent_of(APITimeoutError("late"), timeout=2))
    assert found.failure is not None
    assert found.failure.message == "Expected a reply within 2 s, got none; raise timeout="
    assert not found.failure.infrastructure


async def test_a_refused_key_ends_the_run() -> None:
    with pytest.raises(AuthenticationError, match="Expected status 200 .* got 401"):
        await rollout(agent_of(reply(401)))


async def test_an_input_that_json_cannot_hold_is_named() -> None:
    found = await rollout(agent_of(echo), x=object())
    assert found.failure is not None
    assert "Expected an input that JSON can carry" in found.failure.message


def test_invalid_options_are_refused_at_construction() -> None:
    for arguments, message in [
        ({"url": "127.0.0.1:8000"}, "Expected an address"),
        ({"url": "ftp://host/x"}, "Expected an address"),
        ({"values": {}}, "Expected values to train, got none"),
        ({"values": {"a.b": "x", "a_b": "y"}}, "both 'a_b'"),
        ({"timeout": 0}, "Expected timeout to be a finite number"),
        ({"reply": "xml"}, "Expected reply 'json' or 'text'"),
    ]:
        options: dict[str, Any] = {"url": "http://127.0.0.1:1", "values": {"prompt": "hi"}, **arguments}  # type: ignore[dict-item]
        with pytest.raises(ConfigError, match=message):
            HTTPAgent(**options)


async def test_values_can_be_put_into_an_agent_at_another_address() -> None:
    """Training runs against one server, production against another."""
    agent, other = agent_of(echo), "http://127.0.0.1:2/run"
    again = agent.like(other)
    assert await again("you") == "hi you"
    assert agent.transport.requests[-1].url == other  # type: ignore[attr-defined]


def test_a_failure_of_an_external_agent_is_not_a_bug_of_this_process() -> None:
    assert not issubclass(ExternalError, (TypeError, ValueError))


RUNS: dict[str, list[Any]] = {
    "after a retry": [reply(503), echo],
    "refused": [reply(500)],
    "lost": [APIConnectionError("gone")],
    "late": [APITimeoutError("late")],
}


@pytest.mark.parametrize("steps", RUNS.values(), ids=RUNS)
async def test_a_recorded_run_replays_without_the_server(tmp_path: Path, steps: list[Any]) -> None:
    """Failed attempts, a refusal and a run without a reply in time replay as they were."""
    with cassette(tmp_path / "tape.yaml", "all"):
        recorded = await rollout(agent_of(*steps))
    silent = agent_of(AssertionError("sent"))
    with cassette(tmp_path / "tape.yaml", "none"):
        replayed = await rollout(silent)
    assert silent.transport.requests == []  # type: ignore[attr-defined]
    assert (replayed.output, replayed.failure) == (recorded.output, recorded.failure)


def test_runs_through_optimize_are_counted_once(tmp_path: Path) -> None:
    """They are counted as the agent states them; observing its requests adds nothing."""
    agent = agent_of(lambda request: reply(output="a", usage={"input_tokens": 3, "output_tokens": 1}))
    model = as_model(lambda messages: '{"suggestion": {"prompt": "hello"}}')
    rows = [(f"q{i}", "b") for i in range(4)]
    result = optimize(agent, rows, guide=exact_match, model=model, run_dir=False, show=False, validate=0)
    assert (result.usage["agent"].calls, result.usage["agent"].total_tokens) == (4, 16)


def test_an_external_agent_that_always_fails_stops_the_run() -> None:
    """Its failures were taken for feedback in every paid step, and the run ended as usual with a score of 0."""
    model = ScriptedModel(suggestion(prompt="better"))
    trainer = AggregatedUpdate(agent_of(*[reply(error="no key")] * 20), LLMOptimizer(llm=model), llm=model)
    with pytest.raises(
        TrainingError, match=r"4 rollouts in a row failed with the same error(?s:.*)ExternalError: no key"
    ):
        trainer.train(lambda x, output, info: 1.0, [(i, None) for i in range(8)], batch_size=2)
    assert model.asked == []


def test_an_external_agent_that_fails_on_some_instances_is_trained() -> None:
    """Its errors are feedback once an instance has succeeded, and the result warns of those that are left."""

    def answer(request: HTTPRequest) -> HTTPReply:
        return reply(error="no such customer") if json.loads(request.body)["input"] == 1 else echo(request)

    model = ScriptedModel(suggestion(prompt="better"))
    trainer = AggregatedUpdate(agent_of(*[answer] * 20), LLMOptimizer(llm=model), llm=model)
    with pytest.warns(TrainingWarning, match=r"agent failed 1 times with ExternalError at the call of the agent"):
        result = trainer.train(lambda x, output, info: 1.0, [(i, None) for i in range(4)], batch_size=4)
    assert result.parameters == {"prompt": "better"}
    assert len(model.asked) == 4


def test_an_agent_that_is_dropped_left_an_open_session() -> None:
    """It had a transport of its own, which was never closed, and printed a warning; now all share the process's own."""
    one, other = (HTTPAgent(f"http://127.0.0.1:{port}/run", {"prompt": "hi"}) for port in (1, 2))
    assert one.transport is other.transport
