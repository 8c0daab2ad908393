"""The optimizer sees the input of each instance, whatever client the agent uses."""

from __future__ import annotations

from typing import Any

import pytest
from training_fakes import ScriptedModel, section

from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.records import Rollout
from aggregator.training.algorithms import AggregatedUpdate, MinibatchAlgorithm
from aggregator.training.prompts import input_of, join_rollouts
from aggregator.training.proposers import LLMOptimizer, OPROOptimizer, TextGradOptimizer

QUESTIONS = [("Who wrote Hamlet?", ""), ("Who wrote Faust?", "")]


class OwnClient(Module):
    """Calls a model through a client that the library does not know."""

    def __init__(self) -> None:
        self.prompt = ParameterNode("Say yes.")

    def forward(self, x: Any) -> str:
        return "yes"


class Asking(OwnClient):
    def __init__(self, llm: Any) -> None:
        super().__init__()
        self.llm = llm

    def forward(self, x: Any) -> str:
        return str(self.llm(messages=[{"role": "user", "content": str(x)}]).text)


def wrong(x: Any, output: Any, info: Any) -> tuple[float, str]:
    return 0.0, "wrong"


@pytest.mark.parametrize("kind", [LLMOptimizer, OPROOptimizer, TextGradOptimizer])
def test_the_input_is_in_the_prompt(kind: Any) -> None:
    """If the agent had its own client, the prompt had neither input nor transcript."""
    llm = ScriptedModel("TERMINATE")
    result = AggregatedUpdate(OwnClient(), kind(llm=llm), llm=llm).train(wrong, QUESTIONS[:1])
    assert section(llm.asked[0], "Input") == "Who wrote Hamlet?"
    assert any("no transcript" in warning for warning in result.warnings)


def test_a_minibatch_shows_every_input() -> None:
    """Each input is under the number of its sample."""
    llm = ScriptedModel("TERMINATE")
    MinibatchAlgorithm(OwnClient(), LLMOptimizer(llm=llm)).train(wrong, QUESTIONS, batch_size=2)
    shown = section(llm.asked[0], "Input")
    assert sorted(shown.splitlines()) == ["ID [0]: Who wrote Hamlet?", "ID [1]: Who wrote Faust?"]


@pytest.mark.parametrize("x", [{"question": "Who?", "year": 1600}, ["a", "b"], 7, "short"])
def test_inputs_of_any_kind_are_shown(x: Any) -> None:
    """Inputs are shown as text, or as JSON if possible."""
    llm = ScriptedModel("TERMINATE")
    AggregatedUpdate(OwnClient(), LLMOptimizer(llm=llm), llm=llm).train(wrong, [(x, "")])
    assert section(llm.asked[0], "Input") == input_of(Rollout(sample_id=0, x=x)) != ""


def test_an_input_in_the_transcript_is_not_shown_twice() -> None:
    """The agent passed a long input on; no warning is given."""
    long = "Please tell me in one word who wrote the play in which a ghost appears on the walls of Elsinore."
    llm = ScriptedModel("TERMINATE")
    result = AggregatedUpdate(Asking(ScriptedModel("yes")), LLMOptimizer(llm=llm), llm=llm).train(wrong, [(long, "")])
    assert llm.asked[0][-1]["content"].count(long) == 1
    assert "#Input" not in llm.asked[0][-1]["content"]
    assert not any("no transcript" in warning for warning in result.warnings)


def test_joined_rollouts_keep_their_inputs() -> None:
    """The input of a rollout without one is None."""
    joined = join_rollouts([Rollout(sample_id=3, x="a"), Rollout(sample_id=4, x="b")])
    assert joined.x == "ID [3]: a\nID [4]: b"
    assert join_rollouts([Rollout(sample_id=3), Rollout(sample_id=4)]).x is None
