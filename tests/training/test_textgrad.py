"""TextGrad's optimizer, native: first a criticism, then values that answer it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from training_fakes import Adder, ScriptedModel, additions, exact, section, suggest

from aggregator.agents.parameters import ParameterNode, read
from aggregator.errors import APIConnectionError
from aggregator.records import Decision, Rollout, StepReport
from aggregator.training.algorithms import AggregatedUpdate, MinibatchAlgorithm
from aggregator.training.prompts import CRITIC_SYSTEM_PROMPT, GRADIENT_SYSTEM_PROMPT
from aggregator.training.proposers import TextGradOptimizer, refine
from aggregator.training.step import Step

PARAMETERS: list[ParameterNode[Any]] = [ParameterNode(3, name="search.k"), ParameterNode("Answer.", name="instruction")]
STEP = Step(parameters=PARAMETERS, values=read(PARAMETERS))
ROLLOUT = Rollout(sample_id=4, output="out", score=0.25, feedback="the source is missing", transcript="search(k=3)")


@pytest.mark.requirement("Trace: TextGrad")
async def test_the_criticism_replaces_the_feedback() -> None:
    """The critic sees the feedback, the second prompt the criticism; the typed values are the proposal."""
    model = ScriptedModel(suggest(search_k="Too few results."), suggest(search_k="7"))
    proposal = await TextGradOptimizer(llm=model).propose([ROLLOUT], STEP)
    critic, changer = model.asked
    assert [critic[0]["content"], changer[0]["content"]] == [CRITIC_SYSTEM_PROMPT, GRADIENT_SYSTEM_PROMPT]
    assert section(critic, "Feedback") == "the source is missing"
    assert section(changer, "Feedback") == "search.k: Too few results."
    assert section(changer, "Transcript") == section(critic, "Transcript") == "search(k=3)"
    assert model.places == [("criticise", "optimizer"), ("propose", "optimizer")]
    assert (proposal.values, proposal.sample_id, proposal.score) == ({"search.k": 7}, 4, 0.25)
    assert proposal.feedback == "the source is missing"
    assert proposal.reasoning.splitlines() == ["search.k: Too few results.", "because"]


async def test_only_criticised_parameters_may_change() -> None:
    """A parameter without criticism is not in the second prompt, and a value for it is refused."""
    model = ScriptedModel(suggest(instruction="Too short.", search_k=" "), suggest(instruction="Cite.", search_k=9))
    proposal = await TextGradOptimizer(llm=model).propose([ROLLOUT], STEP)
    assert "search.k" not in section(model.asked[1], "Parameters")
    assert "search.k" in section(model.asked[0], "Parameters")
    assert proposal.values == {"instruction": "Cite."}
    assert "search_k" in (proposal.error or "")


@pytest.mark.parametrize("reply", ["TERMINATE", suggest(), suggest(instruction="", search_k=None)])
async def test_without_criticism_there_is_no_second_call(reply: str) -> None:
    """The proposal is empty after one call, without an error."""
    model = ScriptedModel(reply)
    proposal = await TextGradOptimizer(llm=model).propose([ROLLOUT], STEP)
    assert (len(model.asked), proposal.values, proposal.error) == (1, {}, None)


async def test_a_criticism_must_be_text() -> None:
    """A number as criticism is requested once more; then it counts as none, and the error says so."""
    model = ScriptedModel(suggest(search_k=7))
    proposal = await TextGradOptimizer(llm=model).propose([ROLLOUT], STEP)
    assert len(model.asked) == 2
    assert proposal.values == {}
    assert proposal.error == "Expected `str`, got 7 - at $.suggestion.search_k"


async def test_the_critic_may_be_another_model() -> None:
    """Like TextGrad's backward engine; the optimizer's own model then only writes the values."""
    critic, model = ScriptedModel(suggest(search_k="Too few.")), ScriptedModel(suggest(search_k=7))
    proposal = await TextGradOptimizer(llm=model, critic=critic).propose([ROLLOUT], STEP)
    assert (len(critic.asked), len(model.asked), proposal.values) == (1, 1, {"search.k": 7})


async def test_earlier_updates_are_in_the_second_prompt() -> None:
    """This is TextGrad's momentum: the critic's prompt does not have them."""
    tried = StepReport(
        epoch=0,
        step=0,
        sample_ids=(0,),
        scores=(0.0,),
        score=0.0,
        decision=Decision(accepted=True),
        update={"search.k": 2},
    )
    model = ScriptedModel(suggest(search_k="Too few."), suggest(search_k=7))
    await TextGradOptimizer(llm=model).propose([ROLLOUT], replace(STEP, history=[tried]))
    assert section(model.asked[0], "History") == ""
    assert section(model.asked[1], "History") == 'step 0, accepted: {"search.k":2}'


async def test_candidates_answer_one_criticism() -> None:
    """Variations and selections work as with LLMOptimizer; the critic is asked once."""
    model = ScriptedModel(suggest(search_k="Too few."), suggest(search_k=5), suggest(search_k=8))
    proposal = await TextGradOptimizer(llm=model, variation=refine).propose([ROLLOUT], STEP)
    assert [place for place, _ in model.places] == ["criticise", "propose/candidate=0", "propose/candidate=1"]
    assert proposal.values == {"search.k": 8}


def gradient(messages: list[dict[str, Any]]) -> str:
    """A critic that repeats the first gap in its feedback, and a model that closes it."""
    feedback = section(messages, "Feedback")
    expected, got = (int(word) for word in feedback.split("expected ")[1].split("\n")[0].split(", got "))
    if messages[0]["content"] == CRITIC_SYSTEM_PROMPT:
        return suggest(amount=f"expected {expected}, got {got}")
    return suggest(amount=1 + expected - got)


@pytest.mark.requirement("Trace: TextGrad's gradient reduction")
def test_a_minibatch_has_one_gradient() -> None:
    """Under MinibatchAlgorithm one criticism is drawn from the feedback of all instances (gradient reduction)."""
    model = ScriptedModel(gradient)
    MinibatchAlgorithm(agent := Adder(), TextGradOptimizer(llm=model)).train(exact, additions(5), batch_size=4)
    assert len(model.asked) == 2
    assert len(section(model.asked[0], "Feedback").splitlines()) == 4
    assert agent.amount.data == 5


def test_each_instance_has_its_own_gradient_under_aggregated_update() -> None:
    """There are two calls each, distinguished by lineage; equal proposals need no merge."""
    model = ScriptedModel(gradient)
    trainer = AggregatedUpdate(agent := Adder(), TextGradOptimizer(llm=model), llm=ScriptedModel("never asked"))
    trainer.train(exact, additions(5, 3), batch_size=3)
    assert sorted(place for place, _ in model.places) == [
        f"train/epoch=0/batch=0/sample={i}/{call}" for i in range(3) for call in ("criticise", "propose")
    ]
    assert agent.amount.data == 5


def test_a_lost_criticism_is_a_lost_proposal() -> None:
    """The run continues, and the failure is in the result."""
    model = ScriptedModel(APIConnectionError("reset"), gradient)
    trainer = AggregatedUpdate(agent := Adder(), TextGradOptimizer(llm=model), llm=ScriptedModel("never asked"))
    result = trainer.train(exact, additions(5, 3), batch_size=3)
    assert [(record.stage, record.error) for record in result.failures] == [("proposal", "APIConnectionError")]
    assert agent.amount.data == 5
