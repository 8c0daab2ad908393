"""Repairs of replies, and merges that change only what was proposed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from training_fakes import ScriptedModel, suggest

from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import (
    AuthenticationError,
    BadRequestError,
    ContentFilterError,
    ContextLengthError,
    LLMError,
    ServerError,
    TrainingError,
    TruncatedError,
)
from aggregator.records import Choice, Completion, Message, Proposal
from aggregator.training.algorithms import AggregatedUpdate
from aggregator.training.asking import ask
from aggregator.training.merge import LLMChoice, LLMMerge, tree_merge
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.step import Step

ASKED = [{"role": "user", "content": "Q"}]


class Three(Module):
    def __init__(self) -> None:
        self.k = ParameterNode(1, description="a number")
        self.text = ParameterNode("keep this instruction as it is")
        self.other = ParameterNode("other")

    def forward(self, x: int) -> int:
        return x


def wrong(x: int, output: int, info: int) -> tuple[float, str]:
    return 0.0, "wrong"


@pytest.mark.parametrize(
    "refusal",
    [
        ContextLengthError("request (797 tokens) exceeds the available context size", status=400),
        BadRequestError("answered 400: no", status=400),
        ContentFilterError("withheld"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_refused_repair_call_is_no_suggestion(refusal: LLMError) -> None:
    """It lost the instance, and if all were lost, ended the run."""
    llm = ScriptedModel(lambda messages: refusal if len(messages) > 2 else "no JSON at all")
    result = AggregatedUpdate(Three(), LLMOptimizer(llm=llm), llm=llm).train(
        wrong, [(i, i) for i in range(8)], batch_size=8
    )
    assert {(record.stage, record.error) for record in result.failures} == {("proposal", "SuggestionError")}
    assert len(result.failures) == 8
    assert "JSON" in result.failures[0].message


async def test_a_refused_repair_keeps_the_values_of_the_first_reply() -> None:
    """One of two values could be read."""
    llm = ScriptedModel(suggest(k="many", text="new"), ContextLengthError("too long", status=400))
    answer = await ask(llm, ASKED, Three().parameters(), max_tokens=100)
    assert answer.values == {"text": "new"}
    assert answer.error is not None
    assert "got 'many'" in answer.error


async def test_other_errors_of_a_repair_are_raised() -> None:
    """A server that is down loses the call; a wrong key ends the run."""
    for error in (ServerError("500", status=500), AuthenticationError("401", status=401)):
        with pytest.raises(type(error)):
            await ask(ScriptedModel("nothing", error), ASKED, Three().parameters(), max_tokens=100)


def test_a_wrong_key_at_the_repair_ends_the_run() -> None:
    """The first error hides nothing."""
    llm = ScriptedModel("nothing", BadRequestError("answered 400: API key not valid", status=400))
    with pytest.raises(TrainingError, match="API key not valid"):
        AggregatedUpdate(Three(), LLMOptimizer(llm=llm), llm=llm).train(wrong, [(1, 1)])


LONG = '{"reasoning": "' + "and so on " * 500
CUT = Completion(choices=(Choice(message=Message(content=LONG), finish_reason="length"),))


@pytest.mark.parametrize("cut", [CUT, TruncatedError("cut at the limit", text=LONG)], ids=["answer", "error"])
async def test_a_truncated_reply_is_requested_again_with_more_room(cut: Any) -> None:
    """It was requested under the same limit, with its whole text quoted, and truncated again."""
    llm = ScriptedModel(cut, suggest(k=3))
    assert (await ask(llm, ASKED, Three().parameters(), max_tokens=100)).values == {"k": 3}
    assert [options["max_tokens"] for options in llm.options] == [100, 200]
    assert len(json.dumps(llm.asked[1])) < 1000
    assert [message["role"] for message in llm.asked[1]] == ["user", "assistant", "user"]
    assert "much shorter" in llm.asked[1][-1]["content"]
    assert "the limit of 100 tokens" in llm.asked[1][-1]["content"]


async def test_a_second_truncated_reply_is_no_suggestion() -> None:
    """There are two calls, never a third."""
    llm = ScriptedModel(CUT, CUT)
    answer = await ask(llm, ASKED, Three().parameters(), max_tokens=100)
    assert (answer.values, len(llm.asked)) == ({}, 2)
    assert answer.error == "the reply was cut at the limit of 200 tokens"


PROPOSALS = [Proposal(values={"k": k}, sample_ids=(k,)) for k in (2, 3)]


@pytest.mark.parametrize("merge", [LLMMerge, lambda llm: tree_merge(LLMMerge(llm))])
async def test_a_merge_never_changes_other_parameters(merge: Any) -> None:
    """A real model rewrote a parameter that no proposal had touched, nine times."""
    llm = ScriptedModel(suggest(k=4, text="rewritten", other=7))
    (merged,) = await merge(llm)(PROPOSALS, Step.of(Three()))
    assert (merged.values, merged.error, len(llm.asked)) == ({"k": 4}, None, 1)


async def test_a_merge_shows_only_what_was_proposed() -> None:
    """Neither prompt nor schema has the other parameters."""
    llm = ScriptedModel(suggest(k=4))
    await LLMMerge(llm)([*PROPOSALS, Proposal(values={"other": "new"})], Step.of(Three()))
    shown = json.dumps(llm.asked[0]) + str(llm.options[0]["response_format"])
    assert "keep this instruction" not in shown
    assert "'text'" not in shown
    assert "other" in shown
    chooses = ScriptedModel(suggest(choice=1))
    await LLMChoice(chooses)(PROPOSALS, Step.of(Three()))
    assert "keep this instruction" not in json.dumps(chooses.asked[0])


def test_hooks_of_the_seed_change_only_what_was_proposed() -> None:
    """An `extract_llm_suggestion` that returns everything does not extend the update."""

    class Hooked(AggregatedUpdate):
        def extract_llm_suggestion(self, response: str, ignore_extraction_error: bool = True) -> dict[str, Any]:
            return {"k": 9, "text": "rewritten"}

    numbers = iter([2, 3])
    agent = Three()
    proposes = ScriptedModel(lambda messages: suggest(k=next(numbers)))
    merges = ScriptedModel("anything")
    Hooked(agent, LLMOptimizer(llm=proposes), llm=merges).train(wrong, [(0, 0), (1, 1)], batch_size=2)
    assert (agent.k.data, agent.text.data) == (9, "keep this instruction as it is")
