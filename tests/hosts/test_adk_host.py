"""AggregatedUpdate as an ADK agent optimizer, with a sampler that runs the agents."""

from __future__ import annotations

import json
import warnings
from collections.abc import AsyncGenerator
from typing import Any

import pytest

pytest.importorskip("google.adk", reason="runs in the environment adk of tests/environments.py")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ADK declares its fields as pydantic 1 did
    from google.adk.agents import LlmAgent
    from google.adk.models.base_llm import BaseLlm
    from google.adk.models.llm_response import LlmResponse
    from google.adk.optimization.data_types import UnstructuredSamplingResult
    from google.adk.optimization.sampler import Sampler
    from google.adk.runners import InMemoryRunner
    from google.genai import types

    from aggregator.hosts.adk import AggregatedUpdate

from aggregator import as_model
from aggregator.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


class Obedient(BaseLlm):
    """Answers with its instruction, or transfers to `refunds` if possible."""

    model: str = "obedient"

    async def generate_content_async(self, llm_request: Any, stream: bool = False) -> AsyncGenerator[LlmResponse, None]:
        tools = [one.name for tool in llm_request.config.tools or () for one in tool.function_declarations or ()]
        system = str(llm_request.config.system_instruction)
        part = types.Part(text=system.split("\n", maxsplit=1)[0])
        if "transfer_to_agent" in tools and "Route." in system:
            target = types.FunctionCall(name="transfer_to_agent", args={"agent_name": "refunds"})
            part = types.Part(function_call=target)
        yield LlmResponse(content=types.Content(role="model", parts=[part]))


class Service(Sampler[UnstructuredSamplingResult]):
    """Runs a candidate on each example: 1 if it answers "Refund gladly."."""

    def __init__(self, train: int = 8) -> None:
        self.train = train
        self.batches: list[tuple[str, int]] = []

    def get_train_example_ids(self) -> list[str]:
        return [f"train-{i}" for i in range(self.train)]

    def get_validation_example_ids(self) -> list[str]:
        return ["validation-0", "validation-1"]

    async def sample_and_score(
        self, candidate: Any, example_set: Any = "validation", batch: Any = None, capture_full_eval_data: bool = False
    ) -> UnstructuredSamplingResult:
        self.batches.append((example_set, len(batch)))
        assert all(one.startswith(example_set) for one in batch)
        scores, data = {}, {}
        for example in batch:
            runner = InMemoryRunner(agent=candidate, app_name="service")
            session = await runner.session_service.create_session(app_name="service", user_id="u")
            message = types.Content(role="user", parts=[types.Part(text=example)])
            texts = [
                part.text
                async for event in runner.run_async(user_id="u", session_id=session.id, new_message=message)
                for part in (event.content.parts if event.content else ())
                if part.text
            ]
            scores[example] = float(texts[-1] == "Refund gladly.")
            data[example] = {"input": example, "output": texts[-1], "expected": "Refund gladly."}
        return UnstructuredSamplingResult(scores=scores, data=data)


def team() -> LlmAgent:
    refunds = LlmAgent(name="refunds", model=Obedient(), instruction="Refuse.", description="Refunds.")
    return LlmAgent(name="root", model=Obedient(), instruction="Route.", sub_agents=[refunds])


def suggest(asked: list[str]) -> Any:
    def answer(messages: Any) -> str:
        asked.append(messages[-1]["content"])
        return json.dumps({"reasoning": "", "suggestion": {"refunds_instruction": "Refund gladly."}})

    return as_model(answer)


async def test_sub_agents_are_trained_by_adks_own_interface() -> None:
    """The sampler gets clones with its examples by set; the given agent is unchanged."""
    agent, service, asked = team(), Service(), list[str]()
    optimizer = AggregatedUpdate(model=suggest(asked), run_dir=False)
    result = await optimizer.optimize(agent, service)
    (best,) = result.optimized_agents
    assert best.overall_score == 1.0
    assert best.optimized_agent.sub_agents[0].instruction == "Refund gladly."
    assert best.optimized_agent.sub_agents[0].parent_agent is best.optimized_agent
    assert agent.sub_agents[0].instruction == "Refuse."
    assert {kind for kind, _ in service.batches} == {"train", "validation"}
    assert ("train", 4) in service.batches
    assert "expected: Refund gladly." in asked[0]


async def test_the_same_seed_gives_the_same_proposals() -> None:
    asked: list[list[str]] = [[], []]
    for one in asked:
        await AggregatedUpdate(model=suggest(one), run_dir=False, seed=3).optimize(team(), Service())
    assert asked[0] == asked[1]


async def test_a_sampler_without_training_examples_is_refused() -> None:
    with pytest.raises(ConfigError, match="Expected training examples from the sampler"):
        await AggregatedUpdate(model=suggest([]), run_dir=False).optimize(team(), Service(train=0))
