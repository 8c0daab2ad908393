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
from aggregator.training.merge import last_of, majority
from aggregator.training.prompts import ALTERNATIVE_PROMPT, PROPOSER_SYSTEM_PROMPT, REFINE_PROMPT
from aggregator.training.proposers import (
    LLMOptimizer,
    Question,
    Variation,
    alternatives,
    experts,
    refine,
    seeds,
    temperatures,
)
from aggregator.training.step import Step

PARAMETERS = [ParameterNode(1, name="k")]
STEP = Step(parameters=PARAMETERS, values={"k": 1})
ROLLOUT = Rollout(sample_id=4, output="out", score=0.25, feedback="more of it", transcript="search(k=1)")


async def proposed(*replies: Any, **options: Any) -> tuple[Proposal, ScriptedModel]:
    model = ScriptedModel(*replies)
    return await LLMOptimizer(llm=model, **options).propose([ROLLOUT], STEP), model


async def test_one_candidate_has_the_default_prompt() -> None:
    """Without a variation there is no seed and no extra lineage, and `temperature` is sent as given."""
    _, model = await proposed(suggest(k=2), temperature=0.4)
    assert model.places == [("propose", "optimizer")]
    assert (model.options[0]["temperature"], "seed" in model.options[0]) == (0.4, False)


@pytest.mark.requirement("Trace: OptoPrimeMulti: temperature_variation")
async def test_temperatures_are_spread_from_the_highest_to_the_lowest() -> None:
    """They are spread evenly, each candidate has its lineage, and the majority is used."""
    proposal, model = await proposed(
        suggest(k=5), suggest(k=9), suggest(k=9), num_candidates=3, variation=temperatures(1.2, 0.2)
    )
    assert [options["temperature"] for options in model.options] == [1.2, 0.7, 0.2]
    assert [place for place, _ in model.places] == [f"propose/candidate={i}" for i in range(3)]
    assert proposal.values == {"k": 9}


@pytest.mark.requirement("Trace: OptoPrimeMulti: self_refinement")
async def test_a_refinement_sees_the_previous_candidate_and_the_last_is_used() -> None:
    """The conversation continues with the previous answer alone, and the request to improve it."""
    proposal, model = await proposed(suggest(k=2), suggest(k=3), suggest(k=4), num_candidates=3, variation=refine)
    first, second, third = model.asked
    assert second[: len(first)] == third[: len(first)] == first
    assert [json.loads(asked[-2]["content"])["suggestion"] for asked in (second, third)] == [{"k": 2}, {"k": 3}]
    assert [asked[-1]["content"] for asked in (second, third)] == [REFINE_PROMPT] * 2
    assert len(third) == len(second) == len(first) + 2
    assert proposal.values == {"k": 4}


async def test_a_refinement_of_no_change_is_shown_as_terminate() -> None:
    """If the last candidate declines, the last one with a change is used."""
    proposal, model = await proposed(suggest(k=2), "TERMINATE", "TERMINATE", num_candidates=3, variation=refine)
    assert model.asked[2][-2] == {"role": "assistant", "content": "TERMINATE"}
    assert proposal.values == {"k": 2}


@pytest.mark.requirement("Trace: OptoPrimeMulti: iterative_alternatives")
async def test_an_alternative_sees_all_previous_candidates_and_a_model_chooses() -> None:
    """Each must differ from all of them; the chosen one is used unchanged."""
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
def test_experts_precede_the_system_prompt_and_a_model_merges() -> None:
    """Mixture of agents: one candidate for each persona, merged into one answer."""
    model = ScriptedModel(suggest(amount=2), suggest(amount=3), suggest(amount=5))
    optimizer = LLMOptimizer(llm=model, variation=experts("You know the law.", "You write plainly."))
    trainer = AggregatedUpdate(agent := Adder(), optimizer, llm=ScriptedModel("never asked"))
    trainer.train(exact, additions(5, 1))
    systems = [asked[0]["content"] for asked in model.asked[:2]]
    assert systems == [f"{who}\n\n{PROPOSER_SYSTEM_PROMPT}" for who in ("You know the law.", "You write plainly.")]
    assert model.places[2] == ("train/epoch=0/batch=0/sample=0/aggregate", "aggregator")
    assert agent.amount.data == 5


async def test_experts_are_reused_if_more_candidates_are_requested() -> None:
    """With two personas the third candidate is the first persona's again."""
    _, model = await proposed(suggest(k=2), variation=experts("Ada", "Bob"), num_candidates=3, select=majority)
    assert [asked[0]["content"][:3] for asked in model.asked] == ["Ada", "Bob", "Ada"]


@pytest.mark.requirement("Trace: OptoPrimeMulti: parallel calls")
@pytest.mark.parametrize(("variation", "together"), [(seeds, 3), (temperatures(), 3), (refine, 1), (alternatives, 1)])
async def test_independent_candidates_are_requested_at_once(variation: Variation, together: int) -> None:
    """Only variations whose prompts show previous answers are sequential."""
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
    """Concurrent candidates are distinguished by their number, in any order of answers."""
    chosen = set()
    for delays in ([9, 0, 4], [0, 4, 9], [4, 9, 0]):
        waits = iter(delays)
        replies = [suggest(k=2), suggest(k=3), suggest(k=4)]
        model = ScriptedModel(*replies, jitter=lambda waits=waits: next(waits, 0))  # type: ignore[misc]
        optimizer = LLMOptimizer(llm=model, num_candidates=3, variation=variation, select=last_of)
        chosen.add((await optimizer.propose([ROLLOUT], STEP)).values["k"])
    assert chosen == {4}


async def test_a_custom_variation_is_one_function() -> None:
    """It returns the prompt of candidate i."""

    def shorter(messages: Any, i: int, count: int, before: Sequence[Proposal]) -> Question:
        words = [{**messages[0], "content": f"Use {10 * (count - i)} words."}, *messages[1:]]
        return Question(messages=words, temperature=0.1 * i)

    _, model = await proposed(suggest(k=2), variation=Variation(name="shorter", ask=shorter), num_candidates=2)
    assert [asked[0]["content"] for asked in model.asked] == ["Use 20 words.", "Use 10 words."]
    assert [options["temperature"] for options in model.options] == [0.0, 0.1]


@pytest.mark.parametrize(
    ("variation", "count"), [(seeds, 1), (temperatures(), 2), (refine, 2), (alternatives, 2), (experts("a"), 1)]
)
def test_a_variation_sets_the_number_of_candidates(variation: Variation, count: int) -> None:
    """A variation alone therefore always has an effect."""
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
def test_invalid_variations_are_refused_at_construction(options: dict[str, Any], expected: str) -> None:
    """The error says what was expected and what it got."""
    with pytest.raises(ConfigError, match=expected):
        LLMOptimizer(llm=ScriptedModel("x"), **options)


@pytest.mark.parametrize("personas", [(), (["a", "b"],), ("a", "")])
def test_personas_are_texts(personas: Any) -> None:
    """A list passed in place of its items is refused."""
    with pytest.raises(ConfigError, match="Expected personas as text"):
        experts(*personas)


@pytest.mark.parametrize(
    ("highest", "lowest"),
    [(0.0, 1.0), (1.0, -0.1), (float("nan"), 0.0), (float("inf"), 0.0), ("hot", 0.0)],
)
def test_temperatures_must_fall_to_0_at_the_lowest(highest: Any, lowest: Any) -> None:
    """Rising, negative and non-numeric temperatures are refused."""
    with pytest.raises(ConfigError, match="0 <= lowest <= highest"):
        temperatures(highest, lowest)
