"""Rules that choose one of several proposals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, section, suggest

from aggregator.errors import APIConnectionError, AuthenticationError
from aggregator.records import Proposal
from aggregator.training.algorithms import AggregatedUpdate, MinibatchAlgorithm
from aggregator.training.merge import LLMChoice, best_tried, chain, last_of
from aggregator.training.prompts import CHOOSER_SYSTEM_PROMPT
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.step import Step

CURRENT = {"k": 1}


def proposals(*values: int) -> list[Proposal]:
    return [Proposal(values={"k": k}, sample_ids=(i,), feedback=f"more than {k}") for i, k in enumerate(values)]


async def choose(reply: Any, found: Sequence[Proposal], stepsize: float = 0.5) -> tuple[Sequence[Proposal], Any]:
    model = ScriptedModel(reply)
    return await LLMChoice(model)(found, Step(values=CURRENT, stepsize=stepsize)), model


@pytest.mark.requirement("Trace: OptoPrimeMulti: best_of_n")
async def test_a_model_chooses_one_proposal_unchanged() -> None:
    """Best of n: the prompt numbers the proposals, the reply gives a number, and the chosen one is not rewritten."""
    chosen, model = await choose(suggest(choice=2), proposals(4, 5, 6))
    assert chosen == proposals(4, 5, 6)[1:2]
    (messages,) = model.asked
    assert messages[0]["content"] == CHOOSER_SYSTEM_PROMPT
    assert '"k": 5' in section(messages, "SuggestedValue_2")
    assert model.places == [("choose", "aggregator")]


@pytest.mark.parametrize("reply", [suggest(choice=0), "TERMINATE"])
async def test_the_current_value_can_be_chosen(reply: str) -> None:
    """Number 0 is the current value: the proposal is empty."""
    assert (await choose(reply, proposals(4, 5)))[0] == []


@pytest.mark.parametrize("reply", [suggest(choice=3), suggest(choice="the second"), suggest(choice=-1), "k = 5"])
async def test_an_invalid_choice_is_repeated_once_and_never_guessed(reply: str) -> None:
    """A number that is too large, other words, or an empty reply choose nothing, and the error says so."""
    ((left,), model) = await choose(reply, proposals(4, 5))
    assert (left.values, left.error is None) == ({}, False)
    assert len(model.asked) == 2


@pytest.mark.parametrize(("values", "stepsize"), [((), 0.5), ((4,), 0.5), ((4, 4), 0.5), ((4, 5), 0.0)])
async def test_no_call_if_there_is_nothing_to_choose(values: tuple[int, ...], stepsize: float) -> None:
    """This holds for no proposal, one distinct proposal, and stepsize 0."""
    left, model = await choose("never asked", proposals(*values), stepsize)
    assert model.asked == []
    assert [proposal.values for proposal in left] == ([{"k": 4}] if values and stepsize else [])


async def test_a_lost_choice_is_a_failure_a_permanent_error_is_raised() -> None:
    """As with a merge, an error that a retry could mend is counted."""
    ((left,), _) = await choose(APIConnectionError("reset"), proposals(4, 5))
    assert [(record.stage, record.error) for record in left.failures] == [("aggregation", "APIConnectionError")]
    with pytest.raises(AuthenticationError):
        await choose(AuthenticationError("no", status=401), proposals(4, 5))


@pytest.mark.requirement("Trace: OptoPrimeMulti: last_of_n")
async def test_the_last_proposal_with_a_change() -> None:
    """Last of n: a candidate that declined does not undo the one before."""
    assert await last_of([*proposals(4, 5), Proposal()], Step(values=CURRENT)) == proposals(4, 5)[1:]
    assert await last_of([Proposal()], Step(values=CURRENT)) == []


@pytest.mark.requirement("Trace: OptoPrimeMulti: best_of_n")
def test_candidates_are_tried_on_their_instance() -> None:
    """Best of n by score: the agent runs with each one on this instance, and its own values do not change."""
    agent, seen = Adder(), []

    def guide(x: int, output: int, info: int) -> tuple[float, str]:
        seen.append((x, output))
        return exact(x, output, info)

    optimizer = LLMOptimizer(
        llm=ScriptedModel(suggest(amount=9), suggest(amount=5), suggest(amount=7)),
        num_candidates=3,
        select=best_tried,
    )
    AggregatedUpdate(agent, optimizer, llm=ScriptedModel("never asked")).train(guide, [(10, 15)])
    assert agent.amount.data == 5
    assert seen == [(10, 11), (10, 11), (10, 19), (10, 15), (10, 17)]


def test_candidates_for_a_minibatch_are_tried_on_all_of_it() -> None:
    """With MinibatchAlgorithm; the current values win if no candidate beats them."""
    agent = Adder(5)
    optimizer = LLMOptimizer(llm=ScriptedModel(suggest(amount=9)), num_candidates=2, select=best_tried)
    result = MinibatchAlgorithm(agent, optimizer).train(exact, [*additions(5, 3), (3, 9)], batch_size=4)
    assert agent.amount.data == 5
    assert not result.history[0].decision.accepted


def test_a_candidate_with_an_equal_score_is_not_accepted() -> None:
    """At equal scores the current values stay; of two candidates the first wins."""
    optimizer = LLMOptimizer(
        llm=ScriptedModel(suggest(amount=8), suggest(amount=9)), num_candidates=2, select=best_tried
    )

    def tried(score: Callable[[int], float]) -> int:
        agent = Adder()
        trainer = AggregatedUpdate(agent, optimizer, llm=ScriptedModel("never asked"))
        trainer.train(lambda x, output, info: (score(output), "go on"), [(0, 0)])
        optimizer.llm = ScriptedModel(suggest(amount=8), suggest(amount=9))
        return agent.amount.data

    assert tried(lambda output: 0.5) == 1
    assert tried(lambda output: float(output > 1)) == 8


async def test_selections_can_be_chained() -> None:
    """One selection accepts another's result."""
    assert (
        await chain(last_of, LLMChoice(ScriptedModel("never asked")))(proposals(4, 5), Step(values=CURRENT))
        == (proposals(4, 5)[1:])
    )
