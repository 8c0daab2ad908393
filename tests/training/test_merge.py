"""Merging by a model, in one call and as a tree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from training_fakes import ScriptedModel, first_suggestion, section, suggest

from aggregator.agents.parameters import ParameterNode
from aggregator.errors import APIConnectionError, AuthenticationError, ConfigError
from aggregator.records import Proposal, Values
from aggregator.training.merge import LLMMerge, confidences, group_proposals, tree_merge, worst_first
from aggregator.training.step import Step

CURRENT: Values = {"k": 1, "text": "a"}
PARAMETERS: list[ParameterNode[Any]] = [ParameterNode(1, name="k"), ParameterNode("a", name="text")]


def proposal(i: int, score: float | None = 0.0, **values: Any) -> Proposal:
    return Proposal(values=values, score=score, sample_ids=(i,))


async def merge(rule: Any, proposals: Sequence[Proposal], stepsize: float = 0.5) -> Sequence[Proposal]:
    merged: Sequence[Proposal] = await rule(proposals, Step(values=CURRENT, parameters=PARAMETERS, stepsize=stepsize))
    return merged


async def test_conflicting_values_are_merged_by_the_model() -> None:
    """The merged proposal has the model's values, and the samples of its sources."""
    model = ScriptedModel(suggest(k=4))
    (merged,) = await merge(LLMMerge(model), [proposal(3, k=4), proposal(1, k=5), proposal(2)])
    assert merged.values == {"k": 4}
    assert merged.sample_ids == (1, 3)
    assert merged.support == 2
    assert model.places == [("aggregate", "aggregator")]


async def test_identical_proposals_are_one_with_support() -> None:
    """Two agree and one does not: two blocks, the first with support 2."""
    model = ScriptedModel(first_suggestion)
    await merge(LLMMerge(model), [proposal(0, k=4), proposal(1, k=5), proposal(2, k=4)])
    assert "support: 2" in section(model.asked[0], "SuggestedValue_1")
    assert "#SuggestedValue_3" not in model.asked[0][-1]["content"]


async def test_proposals_for_different_parameters_need_no_call() -> None:
    """There is nothing to weigh: both are applied."""
    model = ScriptedModel("never asked")
    (merged,) = await merge(LLMMerge(model), [proposal(0, k=4), proposal(1, text="b")])
    assert merged.values == {"k": 4, "text": "b"}
    assert model.asked == []


async def test_a_parameter_that_all_proposals_repeat_was_rewritten() -> None:
    """A model that repeats every value proposes to change only those that differ."""
    model = ScriptedModel(suggest(k=6, text="french"))
    (merged,) = await merge(LLMMerge(model), [proposal(0, k=4, text="a"), proposal(1, k=5, text="a")])
    assert merged.values == {"k": 6}
    assert "text" not in section(model.asked[0], "SuggestedValue_1")


async def test_a_repeated_value_is_a_vote_where_another_value_is_proposed() -> None:
    """The model sees it, and may keep the value."""
    model = ScriptedModel(suggest(text="a"))
    await merge(LLMMerge(model), [proposal(0, text="a"), proposal(1, text="b")])
    assert '"a"' in section(model.asked[0], "SuggestedValue_1")


async def test_proposals_that_repeat_everything_need_no_call() -> None:
    """There is nothing to change."""
    model = ScriptedModel("never asked")
    assert list(await merge(LLMMerge(model), [proposal(0, k=1, text="a"), proposal(1, k=1)])) == []
    assert model.asked == []


async def test_terminate_changes_nothing() -> None:
    """The model may decide that nothing should change."""
    (merged,) = await merge(LLMMerge(ScriptedModel("TERMINATE")), [proposal(0, k=4), proposal(1, k=5)])
    assert merged.values == {}
    assert merged.error is None


async def test_a_lost_call_is_a_failure_a_permanent_error_is_raised() -> None:
    """A lost call is counted; an error that a retry cannot mend ends the run."""
    proposals = [proposal(0, k=4), proposal(1, k=5)]
    (merged,) = await merge(LLMMerge(ScriptedModel(APIConnectionError("reset"))), proposals)
    assert [(record.stage, record.error) for record in merged.failures] == [("aggregation", "APIConnectionError")]
    with pytest.raises(AuthenticationError):
        await merge(LLMMerge(ScriptedModel(AuthenticationError("no", status=401))), proposals)


def test_confidence_by_evidence() -> None:
    """Support and score scale the stepsize; the best of the batch keeps it whole."""
    proposals = [
        Proposal(values={"k": 1}, score=1.0, support=2),
        Proposal(values={"k": 2}, score=0.0, support=2),
        Proposal(values={"k": 3}, score=None, support=1),
    ]
    assert confidences(proposals, 0.8, "constant") == [0.8, 0.8, 0.8]
    assert confidences(proposals, 0.8, "evidence") == pytest.approx([0.8, 0.4, 0.2])
    assert confidences(proposals, 0.8, lambda given, stepsize: [stepsize / 2] * len(given)) == [0.4] * 3


def test_an_unknown_confidence_is_refused() -> None:
    """A typo is a ConfigError that lists the choices."""
    with pytest.raises(ConfigError, match="Expected confidence 'constant', 'evidence' or a function"):
        LLMMerge(ScriptedModel("x"), confidence="evidense")  # type: ignore[arg-type]


def join_all(messages: list[dict[str, Any]]) -> str:
    """An aggregator that joins the texts of all suggestions, and so loses nothing."""
    texts = []
    for i in range(1, 100):
        block = section(messages, f"SuggestedValue_{i}")
        if not block:
            break
        texts.append(json.loads(block[block.index("{") :])["text"])
    return suggest(text="+".join(texts))


@pytest.mark.parametrize("count", [2, 3, 8, 9, 17, 40])
async def test_tree_merge_drops_nothing_and_keeps_its_fan_in(count: int) -> None:
    """Every proposal reaches the root, the worst first, and no prompt holds more than the fan-in."""
    model = ScriptedModel(join_all)
    proposals = [proposal(i, score=float(i), text=str(i)) for i in reversed(range(count))]
    (merged,) = await merge(tree_merge(LLMMerge(model), fan_in=3), proposals)
    assert merged.values["text"].split("+") == [str(i) for i in range(count)]
    assert merged.sample_ids == tuple(range(count))
    assert merged.support == count
    assert all("#SuggestedValue_4" not in messages[-1]["content"] for messages in model.asked)


async def test_tree_merge_without_proposals() -> None:
    """The result is empty, and no call is made."""
    assert await merge(tree_merge(LLMMerge(ScriptedModel("never asked"))), [proposal(0)]) == []


async def test_tree_merge_keeps_the_failure_of_a_group() -> None:
    """If every group fails, the failure is the result."""
    rule = tree_merge(LLMMerge(ScriptedModel(APIConnectionError("reset"))), fan_in=2)
    (merged,) = await merge(rule, [proposal(i, k=i) for i in range(2, 6)])
    assert merged.values == {}
    assert merged.failures[0].error == "APIConnectionError"


def test_groups_respect_the_token_limit() -> None:
    """Long values make smaller groups, but at least two proposals each."""
    proposals = [proposal(i, text="x" * 4000) for i in range(6)]
    assert [len(group) for group in group_proposals(proposals, fan_in=8, max_tokens=3100)] == [3, 3]
    assert [len(group) for group in group_proposals(proposals, fan_in=8, max_tokens=10)] == [2, 2, 2]


def test_worst_first_is_stable() -> None:
    """Unknown scores come first, equal ones in sample order."""
    proposals = [proposal(0, 1.0, k=1), proposal(1, 0.0, k=1), proposal(2, None, k=1), proposal(3, 0.0, k=1)]
    assert [p.sample_id for p in worst_first(proposals)] == [2, 1, 3, 0]


def test_fan_in_below_two_is_refused() -> None:
    """A tree of fan-in 1 never ends."""
    with pytest.raises(ConfigError, match="fan_in of at least 2"):
        tree_merge(LLMMerge(ScriptedModel("x")), fan_in=1)
