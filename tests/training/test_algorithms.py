"""Trace's two simpler trainers, composed of the same parts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, from_feedback, section, suggest

from aggregator.errors import ConfigError
from aggregator.training.algorithms import BasicSearchAlgorithm, MinibatchAlgorithm
from aggregator.training.proposers import LLMOptimizer


def largest_gap(messages: list[dict[str, Any]]) -> str:
    """An optimizer that reads all feedback and closes the first gap."""
    first = section(messages, "Feedback").splitlines()[0].split("]: ", 1)[1]
    if not first.startswith("expected"):
        return "TERMINATE"
    expected, got = (int(word) for word in first.replace("expected ", "").split(", got "))
    present = json.loads(section(messages, "Parameters"))["amount"]["value"]
    return suggest(amount=present + expected - got)


@pytest.mark.requirement(
    "Trace: MinibatchAlgorithm, batchify",
    "Trace: OptoprimeBatchOpt",
    "Trace's defect 31: every step drew a picture with a program that was not there",
)
def test_minibatch_algorithm_asks_once_with_all_feedback(adder: Adder) -> None:
    """One prompt holds the output and feedback of every instance; no file is written, and no `dot` binary is needed."""
    optimizer = ScriptedModel(largest_gap)
    result = MinibatchAlgorithm(adder, LLMOptimizer(llm=optimizer)).train(exact, additions(5), batch_size=4)
    assert len(optimizer.asked) == 1
    assert len(section(optimizer.asked[0], "Feedback").splitlines()) == 4
    assert optimizer.places == [("train/epoch=0/batch=0/propose", "optimizer")]
    assert adder.amount.data == 5
    assert result.train_scores == [0.0]


@pytest.mark.requirement("Trace: BasicSearchAlgorithm(num_proposals, validate_dataset)")
def test_basic_search_keeps_the_best_candidate(adder: Adder) -> None:
    """Of several proposals the one with the best validation score is applied."""
    optimizer = ScriptedModel(suggest(amount=9), suggest(amount=5), suggest(amount=7))
    search = BasicSearchAlgorithm(adder, LLMOptimizer(llm=optimizer), num_proposals=3, validate_dataset=additions(5))
    search.train(exact, additions(5), batch_size=4)
    assert adder.amount.data == 5
    assert [place for place, _ in optimizer.places] == [
        f"train/epoch=0/batch=0/candidate={i}/propose" for i in range(3)
    ]


@pytest.mark.requirement("Trace: BasicSearchAlgorithm: the current value is a candidate")
def test_basic_search_keeps_the_current_value_if_it_is_best() -> None:
    """The current value is one of the candidates."""
    agent = Adder(5)
    result = BasicSearchAlgorithm(agent, LLMOptimizer(llm=ScriptedModel(suggest(amount=9)))).train(
        exact, additions(5), batch_size=4
    )
    assert agent.amount.data == 5
    assert not result.history[0].decision.accepted


@pytest.mark.requirement("Trace: BasicSearchAlgorithm(validate_guide)")
def test_basic_search_may_validate_with_another_guide(adder: Adder) -> None:
    """validate_guide scores the candidates instead of train's guide."""
    optimizer = ScriptedModel(suggest(amount=5), suggest(amount=100))
    search = BasicSearchAlgorithm(
        adder, LLMOptimizer(llm=optimizer), num_proposals=2, validate_guide=lambda x, output, info: float(output)
    )
    search.train(exact, additions(5), batch_size=4)
    assert adder.amount.data == 100


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_num_proposals_is_a_positive_int(adder: Adder, count: Any) -> None:
    """Any other value is refused when the trainer is created."""
    with pytest.raises(ConfigError, match="Expected num_proposals to be an int of at least 1"):
        BasicSearchAlgorithm(adder, LLMOptimizer(llm=ScriptedModel(from_feedback)), num_proposals=count)


@pytest.mark.parametrize("trainer", [MinibatchAlgorithm, BasicSearchAlgorithm])
def test_a_proposal_for_a_minibatch_named_only_its_first_sample(trainer: Any) -> None:
    """Its contributors are all samples that the optimizer saw."""
    result = trainer(Adder(), LLMOptimizer(llm=ScriptedModel(suggest(amount=5)))).train(
        exact, additions(5), batch_size=4
    )
    assert result.history[0].contributors == (0, 1, 2, 3)
    assert sorted(result.provenance["amount"][0]["samples"]) == [0, 1, 2, 3]
