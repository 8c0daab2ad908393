"""The native optimizers."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from training_fakes import Adder, ScriptedModel, additions, exact, from_feedback, section, suggest

from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError
from aggregator.records import Decision, Rollout, StepReport
from aggregator.training.algorithms import AggregatedUpdate
from aggregator.training.merge import LLMMerge
from aggregator.training.prompts import render
from aggregator.training.proposers import OUTPUT_LIMIT, LLMOptimizer, OPROOptimizer
from aggregator.training.step import Step

PARAMETERS = [ParameterNode(1, name="k", description="how many", constraint="a small number")]
STEP = Step(parameters=PARAMETERS, values={"k": 1})
ROLLOUT = Rollout(sample_id=4, output="out", score=0.25, feedback="more of it", transcript="search(k=1)")


def report(step: int, update: dict[str, Any], *, accepted: bool = True, **facts: Any) -> StepReport:
    decision = Decision(accepted=accepted, reason="mean score 1 -> 0", after=facts.pop("after", None))
    score = facts.pop("score", 0.0)
    return StepReport(
        epoch=0, step=step, sample_ids=(0,), scores=(score,), score=score, decision=decision, update=update, **facts
    )


@pytest.mark.requirement("Trace: GraphPropagator: the subgraph as feedback", "Trace: OptoPrime(objective)")
async def test_the_prompt_holds_this_instance_and_the_reply_is_typed() -> None:
    """Parameters, transcript, output, score and feedback are sent; the proposal has this sample's typed values."""
    model = ScriptedModel(suggest(k="7"))
    proposal = await LLMOptimizer(llm=model, objective="Be right.").propose([ROLLOUT], STEP)
    (messages,) = model.asked
    found = [section(messages, name) for name in ("Objective", "Transcript", "Output", "Score", "Feedback")]
    assert found == ["Be right.", "search(k=1)", "out", "0.25", "more of it"]
    assert '"constraint": "a small number"' in section(messages, "Parameters")
    assert (proposal.values, proposal.sample_id, proposal.score) == ({"k": 7}, 4, 0.25)


@pytest.mark.requirement("Trace: backward(retain_graph), zero_feedback, detach")
async def test_the_same_rollout_gives_the_same_prompt() -> None:
    """The optimizer keeps no state between proposals, so they depend neither on each other nor on their order."""
    model = ScriptedModel(suggest(k=7))
    optimizer = LLMOptimizer(llm=model)
    for _ in range(3):
        await optimizer.propose([ROLLOUT], STEP)
    assert model.asked[0] == model.asked[1] == model.asked[2]


@pytest.mark.requirement("Trace: OptoPrime(memory_size)")
@pytest.mark.parametrize(("size", "steps"), [(0, []), (2, ["step 2", "step 3"]), (9, ["step 0", "step 2", "step 3"])])
async def test_memory_recalls_the_latest_updates_with_their_verdicts(size: int, steps: list[str]) -> None:
    """Accepted and refused updates are recalled, the latest `memory_size`; steps without a change are not."""
    history = [report(0, {"k": 1}), report(1, {}), report(2, {"k": 2}, accepted=False), report(3, {"k": 3})]
    model = ScriptedModel("TERMINATE")
    await LLMOptimizer(llm=model, memory_size=size).propose([ROLLOUT], replace(STEP, history=history))
    lines = section(model.asked[0], "History").splitlines()
    assert [line.partition(",")[0] for line in lines] == steps
    assert all("refused (mean score 1 -> 0)" in line for line in lines if "step 2" in line)


@pytest.mark.requirement("Trace: OptoPrimeMulti(num_responses)")
async def test_several_candidates_become_one_proposal() -> None:
    """Each has its own lineage and seed; the rule, majority by default, combines them."""
    model = ScriptedModel(suggest(k=5), suggest(k=9), suggest(k=9))
    proposal = await LLMOptimizer(llm=model, num_candidates=3).propose([ROLLOUT], STEP)
    assert sorted(place for place, _ in model.places) == [f"propose/candidate={i}" for i in range(3)]
    assert sorted(options["seed"] for options in model.options) == [0, 1, 2]
    assert (proposal.values, proposal.support, proposal.sample_id) == ({"k": 9}, 1, 4)


async def test_candidates_may_be_merged_by_a_model() -> None:
    """Any rule can be used, including one that calls a model."""
    optimizer = LLMOptimizer(
        llm=ScriptedModel(suggest(k=5), suggest(k=9)),
        num_candidates=2,
        select=LLMMerge(ScriptedModel(suggest(k=7)), confidence="evidence"),
    )
    trainer = AggregatedUpdate(agent := Adder(), optimizer, rule=LLMMerge(ScriptedModel("never asked")))
    optimizer.llm = ScriptedModel(suggest(amount=5), suggest(amount=9))
    optimizer.select = LLMMerge(ScriptedModel(suggest(amount=7)))
    trainer.train(exact, [(0, 7)])
    assert agent.amount.data == 7


async def test_candidates_that_all_decline_propose_nothing() -> None:
    """If each candidate is TERMINATE, the proposal is empty."""
    proposal = await LLMOptimizer(llm=ScriptedModel("TERMINATE"), num_candidates=2).propose([ROLLOUT], STEP)
    assert proposal.values == {}


@pytest.mark.requirement("Trace: OPRO")
async def test_opro_recalls_the_best_in_ascending_order() -> None:
    """The trajectory is sorted by each update's score; refused ones without a score are left out."""
    history = [
        report(0, {"k": 1}, score=0.1),
        report(1, {"k": 2}, score=0.4, after=0.9),
        report(2, {"k": 3}, accepted=False, score=0.2),
        report(3, {"k": 4}, score=0.3, test_score=0.7),
        report(4, {"k": 5}, score=0.6),
    ]
    model = ScriptedModel("TERMINATE")
    await OPROOptimizer(llm=model).propose([ROLLOUT], replace(STEP, history=history))
    assert section(model.asked[0], "History").splitlines() == [
        'score 0.4: {"k":1}',
        'score 0.7: {"k":4}',
        'score 0.9: {"k":2}',
    ]


@pytest.mark.requirement("Trace: OptoPrime.step(mask)")
def test_parameters_of_the_optimizer_limit_what_changes(adder: Adder) -> None:
    """An optimizer created for some parameters changes no others."""
    adder.parameters()
    model = ScriptedModel(from_feedback)
    run = AggregatedUpdate(adder, LLMOptimizer([adder.amount], llm=model), llm=ScriptedModel("x"))
    result = run.train(exact, additions(5, 1))
    assert result.parameters == {"amount": 5}
    assert "label" not in section(model.asked[0], "Parameters")


@pytest.mark.parametrize("count", [0, -1, "3"])
def test_num_candidates_is_a_positive_int(count: Any) -> None:
    """Any other value is refused when the optimizer is created."""
    with pytest.raises(ConfigError, match="Expected num_candidates"):
        LLMOptimizer(llm=ScriptedModel("x"), num_candidates=count)


@pytest.mark.parametrize(
    ("output", "text"),
    [("as it is", "as it is"), ({"a": [1, None]}, '{"a":[1,null]}'), (None, "null"), (object(), "<object>")],
)
def test_outputs_are_shown_without_addresses(output: Any, text: str) -> None:
    """A prompt has the same bytes in every run."""
    assert render(output) == text


def test_a_huge_output_is_shortened() -> None:
    """Megabytes of output do not make prompts of megabytes; the prompt states how much is missing."""
    rollout = Rollout(sample_id=0, output="x" * 1_000_000, score=0.0, feedback="Too long.")
    messages = LLMOptimizer(llm=ScriptedModel("unused")).messages(rollout, STEP)
    assert sum(len(message["content"]) for message in messages) < OUTPUT_LIMIT + 10_000
    assert "[... 960000 more characters]" in messages[-1]["content"]
