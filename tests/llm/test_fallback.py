"""Fallback models: which errors trigger a fallback, and how calls are counted, recorded and replayed."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llm_fakes import BASE_URL, QUESTION, ScriptedTransport, VirtualTime, answer, failure

from aggregator import LLM, Budget, Price, as_model, cassette, lineage
from aggregator.agents.transcripts import transcript
from aggregator.errors import (
    APIConnectionError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    BudgetExceededError,
    ConfigError,
    ContentFilterError,
    ContextLengthError,
    DecodeError,
    EmptyResponseError,
    LLMError,
    NotFoundError,
    PermissionDeniedError,
    QuotaError,
    RateLimitError,
    ResponseError,
    ServerError,
    TruncatedError,
)
from aggregator.llm.budget import estimate
from aggregator.llm.fallback import FallbackLLM, fails_over
from aggregator.llm.ledger import collecting
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest


class Routed(Transport):
    """Answers by the requested model; records the models in order."""

    def __init__(self, **scripts: Any) -> None:
        self.scripts = {name: ScriptedTransport(*steps) for name, steps in scripts.items()}
        self.asked: list[str] = []

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        model = msgspec.json.decode(request.body)["model"]
        self.asked.append(model)
        return await self.scripts[model].send(request, timeout=timeout)


def client(transport: Transport, *names: str, **options: Any) -> LLM:
    virtual = VirtualTime()
    given = {"transport": transport, "clock": virtual.clock, "sleep": virtual.sleep, **options}
    return LLM([LLM(name, base_url=BASE_URL, **given) for name in names or ("a", "b")])


@pytest.mark.parametrize(
    ("error", "falls"),
    [
        (APIConnectionError("cut"), True), (APITimeoutError("late"), True), (RateLimitError("429"), True),
        (QuotaError("used up"), True), (ServerError("500"), True), (NotFoundError("gone"), True),
        (ContextLengthError("long"), True), (DecodeError("html"), True), (EmptyResponseError("none"), True),
        (ResponseError("failed"), True),
        (BadRequestError("The requested model 'x' does not exist.", status=400, code="model_not_found"), True),
        (PermissionDeniedError("no access to model", status=403, code="model_not_found"), True),
        (BadRequestError("bedrock answered 400: The provided model identifier is invalid."), True),
        (AuthenticationError("401"), False), (PermissionDeniedError("403"), False), (BadRequestError("400"), False),
        (ContentFilterError("withheld"), False), (TruncatedError("cut"), False),
    ],
)  # fmt: skip
def test_which_errors_fall_back(error: LLMError, falls: bool) -> None:
    """Faults of model, server and quota do; refused keys, invalid requests, withheld and cut answers do not."""
    assert fails_over(error) is falls


async def test_the_next_model_answers_after_all_attempts_of_the_first() -> None:
    """Server errors are retried at the first model; the answer counts the attempts of both."""
    transport = Routed(a=[failure(500)], b=[answer("hi")])
    found = await client(transport).complete(QUESTION)
    assert (found.text, found.attempts, transport.asked) == ("hi", 4, ["a", "a", "a", "b"])


@pytest.mark.parametrize(
    ("step", "asked"),
    [
        (failure(429, code="insufficient_quota"), ["a", "b"]),
        (failure(404, code="model_not_found"), ["a", "b"]),
        (failure(400, code="model_not_found"), ["a", "b"]),
        (failure(402), ["a", "b"]),
        (failure(400, "maximum context length is 8192 tokens", code="context_length_exceeded"), ["a", "b"]),
        (APIConnectionError("refused"), ["a", "a", "a", "b"]),
    ],
)
async def test_permanent_faults_fall_back_at_once(step: Any, asked: list[str]) -> None:
    """A fault that retrying cannot mend costs one request at the first model."""
    transport = Routed(a=[step], b=[answer("hi")])
    assert (await client(transport).complete(QUESTION)).text == "hi"
    assert transport.asked == asked


@pytest.mark.parametrize(
    ("step", "kind"),
    [(failure(401), AuthenticationError), (failure(403), PermissionDeniedError), (failure(400), BadRequestError)],
)
async def test_a_users_mistake_is_not_hidden(step: Any, kind: type[LLMError]) -> None:
    """With a fallback, a wrong key would silently send every call to the second model."""
    transport = Routed(a=[step], b=[answer("hi")])
    with pytest.raises(kind):
        await client(transport).complete(QUESTION)
    assert transport.asked == ["a"]


async def test_the_last_error_has_notes_on_the_others() -> None:
    """If no model answers, the last error counts all attempts and has a note on each other model."""
    transport = Routed(a=[failure(500, "first")], b=[failure(503, "second")])
    with pytest.raises(ServerError, match="second") as caught:
        await client(transport).complete(QUESTION)
    assert caught.value.attempts == 6
    assert [note for note in caught.value.__notes__ if "first" in note and "/a" in note]


async def test_a_replay_falls_back_as_its_recording_did(tmp_path: Path) -> None:
    """Each model's failures and answers have their own lineage; the replay sends nothing and spends the same."""
    path = tmp_path / "fallback.yaml"

    async def ask(llm: LLM, i: int) -> tuple[str, int, Any]:
        with lineage(f"call={i}"):
            found = await llm.complete(QUESTION)
        return found.text, found.attempts, found.usage

    async def run(transport: Transport, budget: Budget) -> list[Any]:
        prices = {"a": Price(input=1, output=1), "b": Price(input=2, output=2)}
        llm = client(transport, budget=budget, prices=prices, max_attempts=2)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(llm, i)) for i in range(6)]
        return [task.result() for task in tasks]

    bad, cut = failure(500), APIConnectionError("cut")
    steps = [bad, answer("a"), bad, bad, cut, bad, bad, answer("a"), bad, cut, answer("a")]
    live, spent, again = Routed(a=steps, b=[answer("b")]), Budget(usd=1), Budget(usd=1)
    with cassette(path, "once"):
        recorded = await run(live, spent)
    assert {text for text, *_ in recorded} == {"a", "b"}
    offline = Routed()
    with cassette(path, "none") as tape:
        assert await run(offline, again) == recorded
    assert (offline.asked, tape.report) == ([], [])
    assert again.spent == spent.spent


async def test_every_attempt_counts_in_the_budget() -> None:
    """The requests of all models count, and an exhausted budget ends the call."""
    budget = Budget(calls=4)
    transport = Routed(a=[failure(500)], b=[failure(500), answer("hi")])
    with pytest.raises(BudgetExceededError):
        await client(transport, budget=budget).complete(QUESTION)
    assert (budget.spent.calls, transport.asked) == (4, ["a", "a", "a", "b"])


async def test_usage_belongs_to_the_model_that_answered() -> None:
    """The ledger counts one answer, at its model's price."""
    prices = {"a": Price(input=100, output=100), "b": Price(input=1, output=2)}
    transport = Routed(a=[failure(404)], b=[answer("hi")])
    with collecting() as ledger:
        found = await client(transport, prices=prices).complete(QUESTION)
    assert found.usage.cost == pytest.approx((10 * 1 + 5 * 2) / 1e6)
    assert ledger.totals()["agent"].calls == 1


async def test_a_transcript_shows_one_call() -> None:
    """The agent's call with its fallbacks is one call with one answer."""
    with transcript() as shown:
        await client(Routed(a=[failure(404)], b=[answer("hi")])).complete(QUESTION)
    assert repr(shown) == "<Transcript of 1 operations and calls>"


def chunks(*texts: str, end: bytes = b"data: [DONE]\n\n") -> HTTPReply:
    events = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    finish = [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}] if end else []
    body = b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in [*events, *finish]) + end
    return HTTPReply(status=200, body=body, headers={"content-type": "text/event-stream"})


async def test_a_stream_falls_back_before_its_first_delta() -> None:
    """The next model streams; all deltas are its own, and the whole answer counts all attempts."""
    stream = client(Routed(a=[failure(500)], b=[chunks("He", "llo")])).stream(QUESTION)
    assert [delta async for delta in stream] == ["He", "llo"]
    assert (stream.completion.text, stream.completion.attempts) == ("Hello", 4)


async def test_a_stream_that_has_begun_does_not_fall_back() -> None:
    """Its deltas have been used: a second answer would be mixed with them."""
    transport = Routed(a=[chunks("He", end=b"")], b=[chunks("Hello")])
    stream = aiter(client(transport).stream(QUESTION))
    assert await anext(stream) == "He"
    with pytest.raises(APIConnectionError):
        await anext(stream)
    assert transport.asked == ["a"]


async def test_structured_output_falls_back_to_lower_forms_at_each_model() -> None:
    """Each model is asked in the forms that it supports."""
    wanted = {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]}
    transport = Routed(a=[failure(500)], b=[failure(400, "no response_format"), answer('{"k": 1}')])
    found = await client(transport).complete(QUESTION, response_format=wanted)
    assert (found.text, transport.asked) == ('{"k": 1}', ["a", "a", "a", "b", "b"])


def test_names_share_the_options() -> None:
    """Names and clients can be mixed; the options apply to the names, a client keeps its own."""
    own = LLM("openai/gpt-5", timeout=5)
    llm = LLM([own, "anthropic/claude-x"], timeout=30, max_attempts=2, env={})
    assert isinstance(llm, FallbackLLM)
    assert [model.timeout for model in llm.models] == [5, 30]
    assert (repr(llm), llm.model) == ("LLM(['openai/gpt-5', 'anthropic/claude-x'])", "openai/gpt-5")


@pytest.mark.parametrize(
    "option", [{"api_key": "sk-1"}, {"base_url": BASE_URL}, {"api": "responses"}, {"headers": {"x-key": "k"}}]
)
def test_one_key_is_never_sent_to_two_providers(option: dict[str, Any]) -> None:
    """Options of one server are given with that server's client."""
    with pytest.raises(ConfigError, match=next(iter(option))):
        LLM(["openai/gpt-5", "anthropic/claude-x"], env={}, **option)


@pytest.mark.parametrize("models", [[], [None], ["openai/gpt-5", 7]])
def test_an_invalid_list_of_models(models: Any) -> None:
    """Each entry must be a name or a client."""
    with pytest.raises(ConfigError, match="list of models"):
        LLM(models)


def test_from_synchronous_code_and_by_as_model() -> None:
    """A list is accepted wherever a model is."""
    assert client(Routed(a=[failure(404)], b=[answer("hi")]))(messages=QUESTION).text == "hi"
    assert isinstance(as_model(["openai/gpt-5", "openai/gpt-4o"]), FallbackLLM)


def test_a_nested_list_falls_back_inside_first() -> None:
    """A client of several models can be one entry of a longer list."""
    inner = client(Routed(a=[failure(404)], b=[failure(404)]))
    outer = LLM([inner, LLM("c", base_url=BASE_URL, transport=Routed(c=[answer("hi")]))])
    assert outer("Hi").attempts == 3


def test_pickling_keeps_every_model() -> None:
    """A worker gets the same list."""
    made = pickle.loads(pickle.dumps(LLM(["openai/gpt-5", "anthropic/claude-x"], timeout=9)))
    assert (repr(made), [model.timeout for model in made.models]) == (
        "LLM(['openai/gpt-5', 'anthropic/claude-x'])",
        [9, 9],
    )


def test_the_maximum_estimate_counts_every_model() -> None:
    """The likely cost is the first model's; the maximum asks all of them."""
    prices = {"a": Price(input=1, output=1), "b": Price(input=2, output=2)}
    one = estimate(LLM("a", base_url=BASE_URL, prices=prices), "Hi", max_tokens=10)
    both = estimate(client(Routed(), prices=prices), "Hi", max_tokens=10)
    assert (both.usd, both.calls) == (one.usd, one.calls)
    assert both.most_usd == pytest.approx(3 * (one.most_usd or 0))


async def test_reasoning_of_one_server_is_not_sent_to_another() -> None:
    """Encrypted reasoning is readable by its own server; the next model gets text and calls only."""
    reasoning = {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "e"}
    message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "4"}]}
    body = {"id": "r", "status": "completed", "output": [reasoning, message], "usage": {}}
    transport = ScriptedTransport(HTTPReply(status=200, body=msgspec.json.encode(body), headers={}))
    here, there = (
        LLM("m", base_url=url, api="responses", transport=transport) for url in (BASE_URL, f"{BASE_URL}/other")
    )
    first = await here.complete(QUESTION)
    await here.complete([*QUESTION, first, "Sure?"])
    await there.complete([*QUESTION, first, "Sure?"])
    assert transport.bodies()[1]["input"][1:3] == [reasoning, message]
    assert transport.bodies()[2]["input"][1] == {"role": "assistant", "content": "4"}
