"""How several candidates are made to differ, as in Trace's OptoPrimeMulti."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, suggest

from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError
from aggregator.records import Proposal, Rollout
from aggregator.training.algorithms import AggregatedUpdate
from aggregator.training.merge import last_of
from aggregator.training.prompts import ALTERNATIVE_PROMPT, PROPOSER_SYSTEM_PROMPT, REFINE_PROMPT
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.rules import majority
from aggregator.training.step import Step
from aggregator.training.variations import (
    Question,
    Variation,
    alternatives,
    experts,
    refine,
    seeds,
    temperatures,
)

PARAMETERS = [ParameterNode(1, name="k")]
STEP = Step(parameters=PARAMETERS, values={"k": 1})
ROLLOUT = Rollout(sample_id=4, output="out", score=0.25, feedback="more of it", transcript="search(k=1)")


async def proposed(*replies: Any, **options: Any) -> tuple[Proposal, ScriptedModel]:
    model = ScriptedModel(*replies)
    return await LLMOptimizer(llm=model, **options).propose([ROLLOUT], STEP), model


async def test_one_candidate_is_asked_as_it_always_was() -> None:
    """Without a variation: no seed, no lineage of its own, and what `temperature` says."""
    _, model = await proposed(suggest(k=2), temperature=0.4)
    assert model.places == [("propose", "optimizer")]
    assert (model.options[0]["temperature"], "seed" in model.options[0]) == (0.4, False)


@pytest.mark.requirement("Trace: OptoPrimeMulti: temperature_variation")
async def test_temperatures_are_spread_from_the_highest_to_the_lowest() -> None:
    """Evenly, in candidates of their own lineage; the majority is taken."""
    proposal, model = await proposed(
        suggest(k=5), suggest(k=9), suggest(k=9), num_candidates=3, variation=temperatures(1.2, 0.2)
    )
    assert [options["temperature"] for options in model.options] == [1.2, 0.7, 0.2]
    assert [place for place, _ in model.places] == [f"propose/candidate={i}" for i in range(3)]
    assert proposal.values == {"k": 9}


@pytest.mark.requirement("Trace: OptoPrimeMulti: self_refinement")
async def test_a_refinement_sees_the_candidate_before_and_the_last_is_taken() -> None:
    """The conversation goes on with the former answer, that one only, and the request to improve it."""
    proposal, model = await proposed(suggest(k=2), suggest(k=3), suggest(k=4), num_candidates=3, variation=refine)
    first, second, third = model.asked
    assert second[: len(first)] == third[: len(first)] == first
    assert [json.loads(asked[-2]["content"])["suggestion"] for asked in (second, third)] == [{"k": 2}, {"k": 3}]
    assert [asked[-1]["content"] for asked in (second, third)] == [REFINE_PROMPT] * 2
    assert len(third) == len(second) == len(first) + 2
    assert proposal.values == {"k": 4}


async def test_a_refinement_of_no_change_is_shown_as_terminate() -> None:
    """Where the last candidate declines, the last that asked for anything is taken."""
    proposal, model = await proposed(suggest(k=2), "TERMINATE", "TERMINATE", num_candidates=3, variation=refine)
    assert model.asked[2][-2] == {"role": "assistant", "content": "TERMINATE"}
    assert proposal.values == {"k": 2}


@pytest.mark.requirement("Trace: OptoPrimeMulti: iterative_alternatives")
async def test_an_alternative_sees_all_before_and_a_model_chooses() -> None:
    """Each must go another way than all of them; what is chosen is taken as it is."""
    proposal, model = await proposed(
        suggest(k=2), suggest(k=3), suggest(k=4), suggest(choice=2), num_candidates=3, variation=alternatives
    )
    third = model.asked[2]
    shown = [json.loads(turn["content"])["suggestion"] for turn in third if turn["role"] == "assistant"]
    assert shown == [{"k": 2}, {"k": 3}]
    assert [turn["content"] for turn in third if turn["role"] == "user"][1:] == [ALTERNATIVE_PROMPT] * 2
    assert model.places[3] == ("choose", "aggregator")
    assert (proposal.values, proposal.support, proposal.sample_ids) == ({"k": 3}, 1, (4,))


@pytest.mark.requirement("Trace: OptoPrimeMulti: multi_experts, experts list, moa")
def test_experts_speak_in_front_of_the_system_prompt_and_a_model_merges() -> None:
    """Mixture of agents: one candidate for each persona, one answer made of all."""
    model = ScriptedModel(suggest(amount=2), suggest(amount=3), suggest(amount=5))
    optimizer = LLMOptimizer(llm=model, variation=experts("You know the law.", "You write plainly."))
    trainer = AggregatedUpdate(agent := Adder(), optimizer, llm=ScriptedModel("never asked"))
    trainer.train(exact, additions(5, 1))
    systems = [asked[0]["content"] for asked in model.asked[:2]]
    assert systems == [f"{who}\n\n{PROPOSER_SYSTEM_PROMPT}" for who in ("You know the law.", "You write plainly.")]
    assert model.places[2] == ("train/epoch=0/batch=0/sample=0/aggregate", "aggregator")
    assert agent.amount.data == 5


async def test_experts_come_round_again_where_more_candidates_are_wanted() -> None:
    """The third of three candidates is the first of two personas once more."""
    _, model = await proposed(suggest(k=2), variation=experts("Ada", "Bob"), num_candidates=3, select=majority)
    assert [asked[0]["content"][:3] for asked in model.asked] == ["Ada", "Bob", "Ada"]


@pytest.mark.requirement("Trace: OptoPrimeMulti: parallel calls")
@pytest.mark.parametrize(("variation", "together"), [(seeds, 3), (temperatures(), 3), (refine, 1), (alternatives, 1)])
async def test_what_need_not_wait_is_asked_at_once(variation: Variation, together: int) -> None:
    """Only variations whose questions show former answers are asked one after the other."""
    running, most = 0, 0

    class Slow:
        async def complete(self, messages: Any, **options: Any) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            for _ in range(5):
                await asyncio.sleep(0)
            running -= 1
            return await ScriptedModel(suggest(k=7)).complete(messages, **options)

    await LLMOptimizer(llm=Slow(), num_candidates=3, variation=variation).propose([ROLLOUT], STEP)
    assert most == together


@pytest.mark.parametrize("variation", [seeds, temperatures(), experts("a", "b")])
async def test_the_order_of_completion_does_not_matter(variation: Variation) -> None:
    """Concurrent candidates are told apart by their number, whichever is answered first."""
    chosen = set()
    for delays in ([9, 0, 4], [0, 4, 9], [4, 9, 0]):
        waits = iter(delays)
        replies = [suggest(k=2), suggest(k=3), suggest(k=4)]
        model = ScriptedModel(*replies, jitter=lambda waits=waits: next(waits, 0))  # type: ignore[misc]
        optimizer = LLMOptimizer(llm=model, num_candidates=3, variation=variation, select=last_of)
        chosen.add((await optimizer.propose([ROLLOUT], STEP)).values["k"])
    assert chosen == {4}


async def test_a_variation_of_ones_own_is_one_function() -> None:
    """It says what candidate i is asked."""

    def shorter(messages: Any, i: int, count: int, before: Sequence[Proposal]) -> Question:
        words = [{**messages[0], "content": f"Use {10 * (count - i)} words."}, *messages[1:]]
        return Question(messages=words, temperature=0.1 * i)

    _, model = await proposed(suggest(k=2), variation=Variation(name="shorter", ask=shorter), num_candidates=2)
    assert [asked[0]["content"] for asked in model.asked] == ["Use 20 words.", "Use 10 words."]
    assert [options["temperature"] for options in model.options] == [0.0, 0.1]


@pytest.mark.parametrize(
    ("variation", "count"), [(seeds, 1), (temperatures(), 2), (refine, 2), (alternatives, 2), (experts("a"), 1)]
)
def test_a_variation_says_how_many_candidates_it_takes(variation: Variation, count: int) -> None:
    """So that a variation alone is never without effect."""
    assert LLMOptimizer(llm=ScriptedModel("x"), variation=variation).num_candidates == count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"variation": refine, "num_candidates": 1}, "at least 2 for refine, got 1"),
        ({"variation": experts("a", "b"), "num_candidates": 1}, "at least 2 for experts, got 1"),
        ({"variation": "refine"}, "seeds, temperatures.*got 'refine'"),
        ({"variation": temperatures}, "Expected a variation"),
        ({"select": "majority"}, "Expected a rule"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_the_optimizer_is_made(options: dict[str, Any], expected: str) -> None:
    """The error says what was expected and what came."""
    with pytest.raises(ConfigError, match=expected):
        LLMOptimizer(llm=ScriptedModel("x"), **options)


@pytest.mark.parametrize("personas", [(), (["a", "b"],), ("a", "")])
def test_personas_are_texts(personas: Any) -> None:
    """A list instead of its items would be one persona of brackets."""
    with pytest.raises(ConfigError, match="Expected personas as text"):
        experts(*personas)


@pytest.mark.parametrize(
    ("highest", "lowest"),
    [(0.0, 1.0), (1.0, -0.1), (float("nan"), 0.0), (float("inf"), 0.0), ("hot", 0.0)],
)
def test_temperatures_go_down_to_0_at_most(highest: Any, lowest: Any) -> None:
    """The other way round, below 0, or no number: refused."""
    with pytest.raises(ConfigError, match="0 <= lowest <= highest"):
        temperatures(highest, lowest)
