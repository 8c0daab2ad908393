"""The simulated model as a server: OpenAI's format, three roles, and the same answer to the same request."""

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
from aggregator.training.asking import response_schema
from aggregator.training.prompts import aggregation_messages, proposal_messages, repair_messages

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
def test_roles_are_recognised_by_headings(messages: list[dict[str, str]], role: str) -> None:
    """The library's own prompts select the intended role."""
    assert role_of(messages) == role


def test_each_role_answers_the_librarys_own_prompts() -> None:
    """It understands the rendered prompts in all three roles."""
    assert text(STUDENT) == "billing"
    assert json.loads(text(PROPOSAL, wrong_rate=0.0)) == {
        "reasoning_instruction": "A text with charged, card is one for billing.",
        "suggestion": {"instruction": "Route the ticket.\nrefund, charged, card -> billing"},
    }
    assert json.loads(text(AGGREGATION))["suggestion"] == {"instruction": "Route.\nfee, bill -> billing", "k": 5}


@pytest.mark.parametrize(("words", "chosen"), [(("fee", "bill", "fee"), 1), (("odd", "fee", "fee"), 2), ((), 0)])
def test_a_choice_was_answered_with_new_values(words: tuple[str, ...], chosen: int) -> None:
    """If the schema asks for a number, it returns that of the suggestion with the most agreement, or 0."""
    proposals = [Proposal(values={"k": {"fee": 5, "bill": 6, "odd": 7}[word]}) for word in words]
    messages = aggregation_messages({"k": 3}, proposals, [0.5] * len(words), stepsize=0.5)
    schema = response_schema([ParameterNode(0, name="choice", type=Annotated[int, Meta(ge=0, le=3)])])
    reply = complete({"messages": messages, "response_format": schema})["choices"][0]["message"]["content"]
    assert json.loads(reply)["suggestion"] == {"choice": chosen}


def test_no_change_is_terminate() -> None:
    """It answers TERMINATE alone if the feedback says that the answer is right."""
    right = proposal_messages({"k": {"value": 1, "type": "int"}}, transcript="", output="x", score=1.0, feedback="ok")
    assert text(right) == "TERMINATE"


def test_a_schema_is_respected() -> None:
    """With a response_format the reply is JSON with every required key, and numbers are within their limits."""
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


def test_a_repaired_reply_has_no_error() -> None:
    """After a refused reply, quoted with its error, the answer is correct, at any error rate."""
    again = repair_messages(PROPOSAL, "{", "a JSON object that was cut off")
    assert text(again, wrong_rate=1.0) == text(PROPOSAL, wrong_rate=0.0)


def test_answers_depend_only_on_seed_and_request() -> None:
    """The same request gets the same answer with one seed, and seeds differ in their errors."""
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
    """Concurrent requests in shuffled order get the same bytes as in sequence."""
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


async def test_it_has_openais_format() -> None:
    """The answer has OpenAI's fields; four tokens are counted for three words."""
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
async def test_invalid_bodies_are_refused_as_by_the_api(body: bytes) -> None:
    """An invalid request gets status 400 and an error object."""
    async with SimulatedModel() as server:
        reply = await post(server, body)
    assert reply.status == 400
    assert msgspec.json.decode(reply.body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("section", ["#CurrentValue\nnothing\n", "#Parameters\n[]\n#Feedback\nExpected x"])
async def test_unreadable_sections_are_refused(section: str) -> None:
    """A prompt whose sections hold no JSON object gets status 400, not a broken connection."""
    async with SimulatedModel() as server:
        reply = await post(server, msgspec.json.encode({"messages": [{"role": "user", "content": section}]}))
    assert reply.status == 400


def test_an_answer_is_cut_at_the_token_limit() -> None:
    """An answer beyond max_tokens is truncated, and its finish reason is the limit."""
    choice = complete({"messages": PROPOSAL, "max_tokens": 8}, wrong_rate=0.0)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert count_tokens(choice["message"]["content"]) <= 8


async def test_a_stream_has_the_same_answer() -> None:
    """The streamed chunks join to the same text, with usage at the end and [DONE] last."""
    body = {"messages": PROPOSAL, "stream": True}
    async with SimulatedModel() as server:
        reply = await post(server, msgspec.json.encode(body))
    events = [line.removeprefix(b"data: ") for line in reply.body.split(b"\n\n") if line]
    assert events == stream_events(complete(body))
    chunks = [msgspec.json.decode(event) for event in events[:-1]]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]
    assert "".join(pieces) == complete(body)["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == complete(body)["usage"]


async def test_latency_applies_to_each_answer() -> None:
    """Each answer takes the given seconds; a refusal takes none."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async with SimulatedModel(latency=0.25, sleep=sleep) as server:
        for body in (msgspec.json.encode({"messages": STUDENT}), b"{", msgspec.json.encode({"messages": PROPOSAL})):
            await post(server, body)
    assert waited == [0.25, 0.25]


def test_it_works_from_synchronous_code_too() -> None:
    """A plain `with` starts and stops the server, and the address exists only inside it."""
    model = SimulatedModel()
    with model as server:
        assert server.base_url.startswith("http://127.0.0.1:")
    with pytest.raises(ConfigError, match="started server"):
        _ = model.base_url


def test_an_invalid_error_rate_is_refused() -> None:
    """wrong_rate is in [0, 1]."""
    with pytest.raises(ConfigError, match="wrong_rate"):
        SimulatedModel(wrong_rate=15)


def test_the_readmes_cassette_failed_on_its_second_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each simulated model has its own port, so a second run must not replay the first one's requests."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = (part for part in readme.split("```") if part.startswith("python\nfrom aggregator import cassette\n"))
    monkeypatch.chdir(tmp_path)
    code = "from aggregator import LLM\n" + example.removeprefix("python\n")
    for _ in range(2):
        exec(code, {"SimulatedModel": SimulatedModel})
