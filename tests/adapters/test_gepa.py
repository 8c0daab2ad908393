"""GEPA's adapters as agents, with the real package: batches of rollouts, records, scores, errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from aggregator import as_agent, optimize, trainable
from aggregator.adapters.gepa import GepaAgent
from aggregator.errors import ConfigError
from aggregator.records import Proposal, Rollout, RolloutTask, Sample
from aggregator.training.step import Step

default_adapter: Any = pytest.importorskip(
    "gepa.adapters.default_adapter.default_adapter", reason="runs in the environment gepa of tests/environments.py"
)
core: Any = pytest.importorskip("gepa.core.adapter")

SEED = {"system_prompt": "Answer sales"}


def last_word(messages: Sequence[Mapping[str, str]]) -> str:
    return messages[0]["content"].split()[-1]


def rows(*teams: str) -> list[dict[str, Any]]:
    return [{"input": f"ticket {i}", "answer": team, "additional_context": {}} for i, team in enumerate(teams)]


class Scored:
    """An adapter without a base class of GEPA's: two components, several scores, and settings for a test."""

    def __init__(self, score: float = 0.5, *, missing: int = 0, reflects: bool = True) -> None:
        self.score, self.missing, self.reflects = score, missing, reflects
        self.inside = self.most = 0
        self.batches: list[list[Any]] = []

    def evaluate(self, batch: list[Any], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.batches.append(list(batch))
        threading.Event().wait(0.01)
        self.inside -= 1
        count = len(batch) - self.missing
        return core.EvaluationBatch(
            outputs=[f"{candidate['a']} {candidate['b']} {x}" for x in batch],
            scores=[self.score] * count,
            trajectories=list(batch) if capture_traces else None,
            objective_scores=[{"cost": 2.0}] * count,
        )

    def make_reflective_dataset(self, candidate: dict[str, str], found: Any, components: list[str]) -> Any:
        if not self.reflects:
            raise ValueError("No valid predictions found for any module.")
        (name,) = components
        return {
            name: [
                {"Inputs": {"q": trace}, "Generated Outputs": output, "Feedback": f"{name} of {trace}", "note": "x\ny"}
                for trace, output in zip(found.trajectories, found.outputs, strict=True)
            ]
        }


async def evaluate(agent: Any, data: Any, guide: Any = lambda x, output, info: 0.0, **values: Any) -> list[Rollout]:
    step = Step.of(agent, guide=guide, samples=data)
    return list(await step.evaluate(values, step.samples, fresh=True))


async def own(agent: GepaAgent, data: Sequence[Any], **values: Any) -> list[Rollout]:
    """Run an agent that scores itself, as a trainer does."""
    tasks = [RolloutTask(sample=Sample(i, x), values=values, lineage=(f"sample={i}",)) for i, x in enumerate(data)]
    return [rollout async for _, rollout in agent.rollouts(tasks, None)]


async def test_an_adapter_scores_itself_and_its_record_is_the_transcript() -> None:
    agent = trainable(default_adapter.DefaultAdapter(model=last_word), candidate=SEED)
    wrong, right = await own(agent, rows("billing", "sales"))
    assert (wrong.score, right.score) == (0.0, 1.0)
    assert "The correct answer is 'billing'." in wrong.feedback
    assert wrong.transcript == "system_prompt:\n  Inputs: ticket 0\n  Generated Outputs: sales"
    assert wrong.output == {"full_assistant_response": "sales"}


async def test_one_call_takes_all_instances_of_one_candidate_and_calls_do_not_overlap() -> None:
    adapter = Scored()
    agent = trainable(adapter, candidate={"a": "1", "b": "2"})
    async with asyncio.TaskGroup() as group:
        made = [group.create_task(own(agent, ["x", "y"], a=str(i))) for i in range(4)]
    assert [[run.output for run in one.result()] for one in made] == [[f"{i} 2 x", f"{i} 2 y"] for i in range(4)]
    assert adapter.batches == [["x", "y"]] * 4
    assert adapter.most == 1


async def test_every_component_gives_its_record_and_objectives_are_further_scores() -> None:
    (run,) = await own(trainable(Scored(), candidate={"a": "1", "b": "2"}), ["x"])
    assert run.feedback == "a of x\nb of x"
    assert run.transcript.startswith('a:\n  Inputs: {"q":"x"}\n  Generated Outputs: 1 2 x\n  note: |\n    x\n    y\nb:')
    assert run.scores["cost"] == 2.0


async def test_an_adapter_without_a_record_still_scores() -> None:
    (run,) = await own(trainable(Scored(reflects=False), candidate={"a": "1", "b": "2"}), ["x"])
    assert (run.score, run.feedback, run.transcript) == (0.5, "", "")


async def test_the_second_half_of_a_pair_was_lost() -> None:
    """Without a guide an adapter is the only one that can use it: it gets the whole pair."""
    adapter = Scored()
    task = RolloutTask(sample=Sample(0, "question", "answer"), values={}, lineage=("sample=0",))
    agent = trainable(adapter, candidate={"a": "1", "b": "2"})
    assert [run.x async for _, run in agent.rollouts([task], None)] == ["question"]
    assert adapter.batches == [[("question", "answer")]]


async def test_a_guide_replaces_the_adapters_score() -> None:
    agent = trainable(Scored(), candidate={"a": "1", "b": "2"})
    (run,) = await evaluate(agent, [("x", "info")], lambda x, output, info: (0.25, f"{output} {info}"))
    assert (run.score, run.feedback) == (0.25, "1 2 x info")


async def test_an_invalid_score_loses_its_instance() -> None:
    (run,) = await own(trainable(Scored(float("nan")), candidate={"a": "1", "b": "2"}), ["x"])
    assert run.failure is not None
    assert (run.score, run.failure.stage) == (None, "guide")


async def test_too_few_scores_end_the_run() -> None:
    with pytest.raises(ConfigError, match="an output and a score for each of 2 instances"):
        await own(trainable(Scored(missing=1), candidate={"a": "1", "b": "2"}), ["x", "y"])


@pytest.mark.parametrize("candidate", [None, {}, {"a": 1}, "text", {1: "a"}])
def test_a_seed_candidate_is_required(candidate: Any) -> None:
    with pytest.raises(ConfigError, match=r"Expected candidate=\{'name': 'text'\} with a GEPA adapter"):
        trainable(Scored(), candidate=candidate)
    with pytest.raises(ConfigError, match="Expected candidate="):
        as_agent(default_adapter.DefaultAdapter(model=last_word))


def test_an_adapter_is_trained_in_one_call() -> None:
    class Follow:
        async def propose(self, rollouts: Sequence[Rollout], step: Step) -> Proposal:
            assert step.values == agent_values[-1]
            return Proposal(values={"system_prompt": f"Answer {rollouts[0].feedback.split(chr(39))[1]}"})

    agent = trainable(default_adapter.DefaultAdapter(model=last_word), candidate=SEED)
    agent_values = [dict(SEED)]
    result = optimize(
        agent,
        rows(*["billing"] * 5),
        guide=None,
        optimizer=Follow(),
        model=lambda messages: "",
        run_dir=False,
        show=False,
    )
    assert agent.candidate == result.best_parameters == {"system_prompt": "Answer billing"}
    assert [one.score for one in result.validations] == [0.0, 1.0]


def test_no_guide_and_no_own_score_is_refused() -> None:
    with pytest.raises(ConfigError, match="Expected a guide"):
        optimize("Answer {x}", [{"x": "1"}] * 3, guide=None, model=lambda messages: "", run_dir=False, show=False)
