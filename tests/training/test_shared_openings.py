"""The proposals of a step share the beginning of their prompts, which a provider can cache."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from training_fakes import Adder, ScriptedModel, additions, exact, suggest

from aggregator import LLM, AggregatedUpdate
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest
from aggregator.training.proposers import LLMOptimizer, TextGradOptimizer, refine

LONG = "Add this. " * 600


class Claude(Transport):
    """Answers like Anthropic's API and records the bodies."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.bodies: list[dict[str, Any]] = []

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        self.bodies.append(json.loads(request.body))
        usage = {"input_tokens": 9, "output_tokens": 2}
        body = {"content": [{"type": "text", "text": self.text}], "stop_reason": "end_turn", "usage": usage}
        return HTTPReply(status=200, body=msgspec.json.encode(body), headers={})

    def openings(self) -> list[str]:
        """Return the marked text of each request, "" if there is none."""
        found = []
        for body in self.bodies:
            content = body["messages"][0]["content"]
            parts = [] if isinstance(content, str) else content
            found.append("".join(part["text"] for part in parts if "cache_control" in part))
        return found


def train(transport: Claude, batch_size: int, *, optimizer: Any = LLMOptimizer, **options: Any) -> None:
    llm = LLM("anthropic/claude-x", transport=transport, env={"ANTHROPIC_API_KEY": "sk-ant-test"})
    agent = Adder(label=LONG)
    run = AggregatedUpdate(agent, optimizer(llm=llm, **options), llm=ScriptedModel(suggest(amount=3)))
    run.train(exact, additions(5), batch_size=batch_size)


def test_the_instances_of_a_step_share_one_prefix() -> None:
    """It ends before the input, is the same in every call of the step, and holds the parameters."""
    transport = Claude(suggest(amount=5))
    train(transport, 4)
    (opening,) = set(transport.openings())
    assert opening.startswith("#Objective\n")
    assert LONG.strip() in opening
    assert opening.endswith("\n\n")
    assert all(body["messages"][0]["content"][1]["text"].startswith("#Input\n") for body in transport.bodies)


def test_a_single_proposal_is_not_marked() -> None:
    """Writing to the cache costs more, and no other call would read it."""
    transport = Claude(suggest(amount=5))
    train(transport, 1)
    assert set(transport.openings()) == {""}


def test_several_candidates_for_one_instance_share_it() -> None:
    """They have the same prompt."""
    transport = Claude(suggest(amount=5))
    train(transport, 1, num_candidates=2, variation=refine)
    assert "" not in transport.openings()


def test_only_the_critics_prompt_is_shared() -> None:
    """TextGrad's second prompt shows only the parameters that this instance criticised."""
    transport = Claude(suggest(label="too long"))
    train(transport, 4, optimizer=TextGradOptimizer)
    marked = [opening != "" for opening in transport.openings()]
    critics = ["You criticise" in body["system"] for body in transport.bodies]
    assert marked == critics
    assert set(marked) == {True, False}
