"""The simulated model as a server: OpenAI's shapes, three roles, and the same answer to the same request."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from msgspec import Meta

from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError
from aggregator.llm.schemas import mismatch
from aggregator.llm.transport import AiohttpTransport
from aggregator.records import HTTPReply, HTTPRequest, Proposal
from aggregator.simulation.model import SimulatedModel, complete, count_tokens, role_of, stream_events
from aggregator.training.prompts import aggregation_messages, proposal_messages, repair_messages
from aggregator.training.schemas import response_schema

STUDENT = [
    {"role": "system", "content": "refund -> billing\nIf no rule applies, answer sales."},
    {"role": "user", "content": "my refund please"},
]
TRANSCRIPT = """\
TicketRouter.clean: Prepare the text.
  ticket: my card was charged
  returned: my card was charged
LLM call
  system: |
    Route the ticket.
    refund -> billing
  user: my card was charged
  reply: sales"""
PROPOSAL = proposal_messages(
    {"instruction": {"value": "Route the ticket.\nrefund -> billing", "type": "str"}},
    transcript=TRANSCRIPT,
    output="sales",
    score=0.0,
    feedback='Expected "billing", got "sales".',
)
AGGREGATION = aggregation_messages(
    {"instruction": "Route.", "k": 3},
    [Proposal(values={"instruction": f"Route.\n{word} -> billing", "k": 5}) for word in ("fee", "bill")],
    [0.5, 0.5],
    stepsize=0.5,
)


def text(messages: list[dict[str, Any]], **options: Any) -> str:
    answer: str = complete({"model": "m", "messages": messages}, **options)["choices"][0]["message"]["content"]
    return answer


async def post(server: SimulatedModel, body: bytes, path: str = "/chat/completions") -> HTTPReply:
    async with AiohttpTransport() as transport:
        request = HTTPRequest(url=server.base_url + path, body=body, headers={"content-type": "application/json"})
        return await transport.send(request)


@pytest.mark.parametrize(
    ("messages", "role"), [(STUDENT, "agent"), (PROPOSAL, "optimizer"), (AGGREGATION, "aggregator")]
)
def test_roles_are_told_by_headings(messages: list[dict[str, str]], role: str) -> None:
    """The library's own prompts put the model in the role they are meant for."""
    assert role_of(messages) == role


def test_each_role_answers_the_librarys_own_prompts() -> None:
    """The prompts as they are rendered are understood in all three roles."""
    assert text(STUDENT) == "billing"
    assert json.loads(text(PROPOSAL, wrong_rate=0.0)) == {
        "reasoning_instruction": "A text with charged, card is one for billing.",
        "suggestion": {"instruction": "Route the ticket.\nrefund, charged, card -> billing"},
    }
    assert json.loads(text(AGGREGATION))["suggestion"] == {"instruction": "Route.\nfee, bill -> billing", "k": 5}


@pytest.mark.parametrize(("words", "chosen"), [(("fee", "bill", "fee"), 1), (("odd", "fee", "fee"), 2), ((), 0)])
def test_a_choice_was_answered_with_new_values(words: tuple[str, ...], chosen: int) -> None:
    """Where the schema asks for a number it gives that of the suggestion that most agree with, 0 for none."""
    proposals = [Proposal(values={"k": {"fee": 5, "bill": 6, "odd": 7}[word]}) for word in words]
    messages = aggregation_messages({"k": 3}, proposals, [0.5] * len(words), stepsize=0.5)
    schema = response_schema([ParameterNode(0, name="choice", type=Annotated[int, Meta(ge=0, le=3)])])
    reply = complete({"messages": messages, "response_format": schema})["choices"][0]["message"]["content"]
    assert json.loads(reply)["suggestion"] == {"choice": chosen}


def test_no_change_is_terminate() -> None:
    """Feedback that says right is answered with TERMINATE alone."""
    right = proposal_messages({"k": {"value": 1, "type": "int"}}, transcript="", output="x", score=1.0, feedback="ok")
    assert text(right) == "TERMINATE"


def test_a_schema_is_kept_to() -> None:
    """With a response_format the reply is JSON, every required key is there, and numbers stay within limits."""
    parameters: list[ParameterNode[Any]] = [
        ParameterNode("a -> b", name="rules"),
        ParameterNode(60, name="length", type=Annotated[int, Meta(le=80)]),
    ]
    schema = response_schema(parameters)
    components = {parameter.name: parameter.describe() for parameter in parameters}
    for transcript, score in (("", 1.0), ("LLM call\n  user: an odd word …\n  reply: y", 0.0)):
        messages = proposal_messages(components, transcript=transcript, output="y", score=score, feedback="Expected z")
        for seed in range(10):
            body = {"messages": messages, "response_format": schema}
            reply = json.loads(complete(body, seed=seed, wrong_rate=1.0)["choices"][0]["message"]["content"])
            assert mismatch(reply, schema["json_schema"]["schema"]) is None


def test_asked_again_it_does_not_err() -> None:
    """A reply that was refused with its error quoted is answered soundly, at any rate of errors."""
    again = repair_messages(PROPOSAL, "{", "a JSON object that was cut off")
    assert text(again, wrong_rate=1.0) == text(PROPOSAL, wrong_rate=0.0)


def test_answers_depend_on_seed_and_request_alone() -> None:
    """The same request gets the same answer under one seed, and the seeds differ in what they get wrong."""
    requests = [
        proposal_messages(
            {"rules": {"value": "a -> b", "type": "str"}},
            transcript=f"LLM call\n  user: word{'x' * i} other\n  reply: y",
            output="y",
            score=0.0,
            feedback="Expected b",
        )
        for i in range(40)
    ]
    first = [text(messages, seed=1, wrong_rate=0.5) for messages in requests]
    order = list(range(len(requests)))
    random.Random(3).shuffle(order)
    shuffled = {i: text(requests[i], seed=1, wrong_rate=0.5) for i in order}
    assert [shuffled[i] for i in range(len(requests))] == first
    assert [text(messages, seed=2, wrong_rate=0.5) for messages in requests] != first


def test_order_and_concurrency_do_not_matter_over_http() -> None:
    """Requests sent at once, in a shuffled order, get the bytes that they get one by one."""
    bodies = [
        msgspec.json.encode({"model": "m", "messages": [*PROPOSAL, {"role": "system", "content": str(i)}]})
        for i in range(20)
    ]

    async def scenario() -> tuple[list[bytes], dict[int, bytes]]:
        async with SimulatedModel(seed=5, wrong_rate=0.5) as server:
            alone = [(await post(server, body)).body for body in bodies]
            order = list(enumerate(bodies))
            random.Random(1).shuffle(order)
            async with asyncio.TaskGroup() as group:
                tasks = {i: group.create_task(post(server, body)) for i, body in order}
            assert server.calls == {"agent": 0, "optimizer": 40, "aggregator": 0}
            return alone, {i: task.result().body for i, task in tasks.items()}

    with asyncio.Runner() as runner:
        alone, together = runner.run(scenario())
    assert [together[i] for i in range(len(bodies))] == alone


async def test_speaks_openais_shape() -> None:
    """The answer has OpenAI's fields; tokens are counted as four for three words."""
    async with SimulatedModel() as server:
        reply = await post(server, msgspec.json.encode({"model": "simulated-1", "messages": STUDENT, "n": 2}))
    answer = msgspec.json.decode(reply.body)
    assert reply.status == 200
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["billing", "billing"]
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "simulated-1"
    words = sum(count_tokens(message["content"]) for message in STUDENT)
    assert answer["usage"] == {"prompt_tokens": words, "completion_tokens": 2, "total_tokens": words + 2}


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"messages": []}', b'{"messages": ["hi"]}'])
async def test_refuses_bodies_as_the_api_does(body: bytes) -> None:
    """A body that is no request gets status 400 and an error object."""
    async with SimulatedModel() as server:
        reply = await post(server, body)
    assert reply.status == 400
    assert msgspec.json.decode(reply.body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("section", ["#CurrentValue\nnothing\n", "#Parameters\n[]\n#Feedback\nExpected x"])
async def test_refuses_sections_it_cannot_read(section: str) -> None:
    """A prompt whose sections hold no JSON object gets status 400, not a broken connection."""
    async with SimulatedModel() as server:
        reply = await post(server, msgspec.json.encode({"messages": [{"role": "user", "content": section}]}))
    assert reply.status == 400


def test_cuts_at_the_token_limit() -> None:
    """An answer beyond max_tokens is cut, and says so."""
    choice = complete({"messages": PROPOSAL, "max_tokens": 8}, wrong_rate=0.0)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert count_tokens(choice["message"]["content"]) <= 8


async def test_streams_the_same_answer() -> None:
    """Streamed pieces make up the very text, with usage at the end and [DONE] last."""
    body = {"messages": PROPOSAL, "stream": True}
    async with SimulatedModel() as server:
        reply = await post(server, msgspec.json.encode(body))
    events = [line.removeprefix(b"data: ") for line in reply.body.split(b"\n\n") if line]
    assert events == stream_events(complete(body))
    chunks = [msgspec.json.decode(event) for event in events[:-1]]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]
    assert "".join(pieces) == complete(body)["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == complete(body)["usage"]


async def test_latency_is_waited_for_each_answer() -> None:
    """Each answer takes the seconds it was told to take; a refusal takes none."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async with SimulatedModel(latency=0.25, sleep=sleep) as server:
        for body in (msgspec.json.encode({"messages": STUDENT}), b"{", msgspec.json.encode({"messages": PROPOSAL})):
            await post(server, body)
    assert waited == [0.25, 0.25]


def test_serves_synchronous_code_too() -> None:
    """A plain `with` starts and stops the server, and the address is only there in between."""
    model = SimulatedModel()
    with model as server:
        assert server.base_url.startswith("http://127.0.0.1:")
    with pytest.raises(ConfigError, match="started server"):
        _ = model.base_url


def test_refuses_a_rate_that_is_none() -> None:
    """wrong_rate is a share."""
    with pytest.raises(ConfigError, match="wrong_rate"):
        SimulatedModel(wrong_rate=15)


def test_the_readmes_cassette_failed_on_its_second_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each simulated model has a port of its own, so that what a reader runs twice must not replay the first one's."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = (part for part in readme.split("```") if part.startswith("python\nfrom aggregator import cassette\n"))
    monkeypatch.chdir(tmp_path)
    code = "from aggregator import LLM\n" + example.removeprefix("python\n")
    for _ in range(2):
        exec(code, {"SimulatedModel": SimulatedModel})
