"""The library's own features on providers that lack an option, or whose models return broken tool calls."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from llm_fakes import ScriptedTransport

from aggregator import LLM, AggregatedUpdate, LLMOptimizer, Module, ParameterNode
from aggregator.errors import BadRequestError, ConfigError, ModelWarning
from aggregator.llm.models import complete_own
from aggregator.records import HTTPReply, HTTPRequest


class Agent(Module):
    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.prompt = ParameterNode("Say it.")

    async def forward(self, x: str) -> str:
        return (await self.llm.complete(f"{self.prompt.data} {x}")).text


def claude(text: str) -> HTTPReply:
    body = {"id": "m", "content": [{"type": "text", "text": text}], "stop_reason": "end_turn"}
    return HTTPReply(status=200, body=json.dumps(body).encode(), headers={})


def test_seeds_ended_the_training_of_a_claude() -> None:
    """For an API without seeds several candidates are requested without them, with a warning, and the run continues."""
    transport = ScriptedTransport(claude('{"suggestion": {"prompt": null}}'))
    llm = LLM("anthropic/claude-sonnet-4-5", api_key="k" * 9, env={}, transport=transport)
    trainer = AggregatedUpdate(Agent(llm), LLMOptimizer(llm=llm, num_candidates=3), llm=llm)
    data = [("a", "b")] * 2
    with pytest.warns(ModelWarning, match="seed to be sent, which anthropic does not have"):
        result = trainer.train(lambda x, output, info: 0.0, data, batch_size=2, verbose=False)
    assert result.train_scores == [0.0]
    assert not [body for body in transport.bodies() if "seed" in body]


async def test_an_option_that_a_fallback_lacks_is_omitted() -> None:
    """All models of a list get the same question."""
    transport = ScriptedTransport(
        HTTPReply(status=200, body=b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}', headers={})
    )
    options: dict[str, Any] = {"api_key": "k" * 9, "env": {}, "transport": transport}
    several = LLM([LLM("openai/gpt-4o-mini", **options), LLM("anthropic/claude-sonnet-4-5", **options)])
    with pytest.warns(ModelWarning):
        await complete_own(several, "q", max_tokens=5, seed=3)
    assert "seed" not in transport.bodies()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await complete_own(LLM("openai/gpt-4o-mini", **options), "q", max_tokens=5, seed=3)
    assert transport.bodies()[1]["seed"] == 3


async def test_a_users_own_seed_is_still_an_error() -> None:
    """An option that the user gives is not dropped silently."""
    llm = LLM("anthropic/claude-sonnet-4-5", api_key="k" * 9, env={}, transport=ScriptedTransport(claude("x")))
    with pytest.raises(ConfigError, match="seed"):
        await llm.complete("q", seed=3)


async def test_broken_arguments_of_a_model_raised_a_config_error() -> None:
    """A conversation continues after a truncated tool call, on an API that requires objects."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"city": "Be'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    cut = {"choices": [{"message": message, "finish_reason": "length"}]}
    first = LLM("openai/gpt-4o-mini", api_key="k", env={}, transport=ScriptedTransport(
        HTTPReply(status=200, body=json.dumps(cut).encode(), headers={})))  # fmt: skip
    asked: list[HTTPRequest] = []

    def respond(request: HTTPRequest) -> HTTPReply:
        asked.append(request)
        return claude("Bern it is")

    second = LLM("anthropic/claude-sonnet-4-5", api_key="k", env={}, transport=ScriptedTransport(respond))
    answer = await first.complete("q")
    result = {"role": "tool", "tool_call_id": "a", "content": "arguments that are no JSON"}
    assert (await second.complete([{"role": "user", "content": "q"}, answer, result])).text == "Bern it is"
    sent = json.loads(asked[0].body)["messages"][1]["content"][0]
    assert sent["input"] == {"invalid_json": '{"city": "Be'}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("seed", "Unsupported parameter: 'seed' is not supported with this model."),
        ("seed", 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'),
        ("temperature", "Unsupported value: 'temperature' does not support 0.5 with this model."),
    ],
)
async def test_a_server_that_refuses_a_seed_ended_the_training(option: str, message: str) -> None:
    """An API may have the option, and this server or model may not: the own feature asks again without it."""
    bad = HTTPReply(status=400, body=json.dumps({"error": {"message": message}}).encode(), headers={})
    good = HTTPReply(
        status=200, body=b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}', headers={}
    )
    transport = ScriptedTransport(bad, good)
    llm = LLM("openai-compatible/m", base_url="http://x/v1", api_key="k" * 9, env={}, transport=transport)
    with pytest.warns(ModelWarning, match=f"Expected {option} to be sent"):
        completion = await complete_own(llm, "q", max_tokens=5, **{option: 0.5 if option == "temperature" else 3})
    assert completion.text == "x"
    assert [option in body for body in transport.bodies()] == [True, False]


async def test_a_refusal_of_something_else_stays() -> None:
    """Only options of the feature that the refusal names are left out."""
    bad = HTTPReply(status=400, body=b'{"error": {"message": "messages: at least one is required"}}', headers={})
    transport = ScriptedTransport(bad)
    llm = LLM("openai-compatible/m", base_url="http://x/v1", api_key="k" * 9, env={}, transport=transport)
    with pytest.raises(BadRequestError):
        await complete_own(llm, "q", max_tokens=5, seed=3)
    assert len(transport.requests) == 1
