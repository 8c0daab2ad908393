"""Playbook: a list of texts that training edits item by item."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import AggregatedUpdate, ConfigError, LLMOptimizer, Module, ParameterNode, Playbook
from aggregator.agents.parameters import overriding
from aggregator.agents.playbook import Item, Items
from aggregator.errors import ParameterError
from aggregator.testing import ScriptedModel, suggestion


class Coach(Module):
    """Answers with its tips, for the guide to check."""

    def __init__(self, tips: Sequence[str] = ("Be brief.", "Be kind."), limit: int | None = None) -> None:
        self.tips = Playbook(tips, limit=limit)

    async def forward(self, x: str) -> str:
        return str(self.tips)


def wrong(x: str, output: str, info: Any) -> tuple[float, str]:
    return 0.0, f"wrong for {x}"


def ids(playbook: Playbook) -> list[str]:
    return [item.id for item in playbook.data]


def texts(items: Items) -> list[str]:
    return [item.text for item in items]


def combined(*edits: list[dict[str, str]], tips: Sequence[str] = ("Be brief.", "Be kind.")) -> Items:
    """Return the items after proposals of these edits, proposal i from sample i."""
    playbook = Playbook(tips)
    return playbook.combine(playbook.data, [(playbook.convert(own), 1.0, (i,)) for i, own in enumerate(edits)])


def test_ids_are_derived_from_the_first_text() -> None:
    """Equal texts have equal ids everywhere; an update keeps the id."""
    one, other = Playbook(["Be brief."]), Playbook(["Be brief."])
    (found,) = one.convert([{"op": "UPDATE", "id": ids(one)[0], "text": "Be very brief."}])
    assert ids(one) == ids(other)
    assert (found.id, found.text) == (ids(one)[0], "Be very brief.")


def test_edits_of_a_suggestion() -> None:
    """Each operation changes one item; the others are unchanged."""
    playbook = Playbook(["Be brief.", "Be kind.", "Be sure."])
    brief, kind, sure = ids(playbook)
    items = playbook.convert(
        [
            {"op": "ADD", "text": "Be calm."},
            {"op": "UPDATE", "id": brief, "text": "Be short."},
            {"op": "DELETE", "id": kind},
            {"op": "HELPFUL", "id": sure},
            {"op": "HARMFUL", "id": brief},
        ]
    )
    assert [(item.text, item.helpful, item.harmful) for item in items] == [
        ("Be short.", 0, 1),
        ("Be sure.", 1, 0),
        ("Be calm.", 0, 0),
    ]
    assert texts(playbook.data) == ["Be brief.", "Be kind.", "Be sure."]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ("rewritten as a whole", r"Expected `array`, got `str`|Expected .*array.* got"),
        (["rewritten"], r"got `str`.*\[0\]|\[0\]"),
        ([{"op": "REWRITE", "text": "x"}], r"REWRITE|op"),
        ([{"op": "ADD"}], r"Expected a text to ADD, got None - at \$\.suggestion\.\w+\[0\]\.text"),
        ([{"op": "ADD", "text": "  "}], r"Expected a text to ADD, got '  '"),
        ([{"op": "DELETE", "id": "zz"}], r"Expected the id of an item \('\w{6}', '\w{6}'\), got 'zz' - at .*\[0\]\.id"),
        ([{"op": "UPDATE", "text": "x"}], r"Expected the id of an item .*, got None"),
        ([{"op": "ADD", "text": "x", "why": "y"}], "why"),
    ],
)
def test_an_invalid_edit(edits: Any, message: str) -> None:
    """A whole new list, an unknown operation or id, and a missing text are refused with their path."""
    with pytest.raises(ParameterError, match=message):
        Playbook(["Be brief.", "Be kind."]).convert(edits)


def test_proposals_are_combined_item_by_item() -> None:
    """Additions of equal text become one item of both samples; nothing else is rewritten."""
    add = [{"op": "ADD", "text": "Be calm."}]
    items = combined(add, [*add, {"op": "ADD", "text": "Be fast."}])
    assert [(item.text, item.samples) for item in items] == [
        ("Be brief.", ()),
        ("Be kind.", ()),
        ("Be calm.", (0, 1)),
        ("Be fast.", (1,)),
    ]


def test_the_text_with_the_most_support_wins() -> None:
    """Of several new texts of an item the one with the most weight is used, or the earlier of equal ones."""
    brief = Playbook(["Be brief."]).data[0].id

    def update(text: str) -> list[dict[str, str]]:
        return [{"op": "UPDATE", "id": brief, "text": text}]

    tips = ["Be brief."]
    assert texts(combined(update("a"), update("b"), update("b"), tips=tips)) == ["b"]
    assert texts(combined(update("a"), update("b"), tips=tips)) == ["a"]
    assert combined(update("a"), update("b"), update("b"), tips=tips)[0].samples == (1, 2)


def test_a_deletion_needs_more_weight_than_the_other_proposals() -> None:
    """One proposal deletes an item that no other one keeps; a change or a HELPFUL of equal weight keeps it."""
    brief = Playbook(["Be brief."]).data[0].id
    delete, helpful = [{"op": "DELETE", "id": brief}], [{"op": "HELPFUL", "id": brief}]
    other = [{"op": "ADD", "text": "Be calm."}]
    assert texts(combined(delete, other)) == ["Be kind.", "Be calm."]
    assert texts(combined(delete, helpful)) == ["Be brief.", "Be kind."]
    assert texts(combined(delete, delete, helpful)) == ["Be kind."]


def test_counts_add_up() -> None:
    """Each proposal that names an item counts once."""
    brief = Playbook(["Be brief."]).data[0].id
    items = combined(*[[{"op": "HELPFUL", "id": brief}]] * 3, [{"op": "HARMFUL", "id": brief}])
    assert (items[0].helpful, items[0].harmful) == (3, 1)


def test_the_least_useful_items_are_removed_first() -> None:
    """Beyond the limit the items with the lowest helpful - harmful are removed, the older of equal ones first."""
    playbook = Playbook(["a", "b", "c"], limit=3)
    a, b, _ = ids(playbook)
    items = playbook.convert([{"op": "HELPFUL", "id": a}, {"op": "HARMFUL", "id": b}, {"op": "ADD", "text": "d"}])
    assert texts(items) == ["a", "c", "d"]
    assert texts(Playbook(["a", "b", "c"], limit=2).data) == ["b", "c"]


def test_an_invalid_limit() -> None:
    """The limit is an int of at least 1."""
    with pytest.raises(ConfigError, match="limit"):
        Playbook(["a"], limit=0)


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=4), max_size=4),
    st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=4),
)
def test_items_without_an_edit_are_unchanged(added: list[list[str]], deleted: list[list[int]]) -> None:
    """They keep text and place, and every added text is there once."""
    tips = ["one", "two", "three"]
    known = [item.id for item in Playbook(tips).data]
    edits = [[{"op": "ADD", "text": text} for text in dict.fromkeys(own)] for own in added]
    edits += [[{"op": "DELETE", "id": known[i]} for i in dict.fromkeys(own)] for own in deleted]
    gone = {tips[i] for own in deleted for i in own}
    wanted = list(dict.fromkeys(text for own in added for text in own))
    assert texts(combined(*edits, tips=tips)) == [*(tip for tip in tips if tip not in gone), *wanted]


def test_training_edits_a_playbook_without_a_merge_call() -> None:
    """A minibatch's proposals are combined without a model, and the record names the samples."""
    agent = Coach()
    brief, kind = ids(agent.tips)
    optimizer = ScriptedModel(
        suggestion(tips=[{"op": "ADD", "text": "Be calm."}, {"op": "HELPFUL", "id": kind}]),
        suggestion(tips=[{"op": "ADD", "text": "Be calm."}, {"op": "DELETE", "id": brief}]),
    )
    merge = ScriptedModel("TERMINATE")
    trainer = AggregatedUpdate(agent, LLMOptimizer(llm=optimizer), llm=merge)
    result = trainer.train(wrong, [("a", 1), ("b", 2)], batch_size=2, max_concurrency=1)
    assert (texts(agent.tips.data), merge.asked) == (["Be kind.", "Be calm."], [])
    assert agent.tips.data[1].samples == (0, 1)
    assert result.history[0].contributors == (0, 1)
    prompt = optimizer.asked[0][-1]["content"]
    assert f'"id": "{kind}"' in prompt
    assert '{\\"op\\": \\"ADD\\"' in prompt


def test_other_parameters_are_merged_by_the_trainers_rule() -> None:
    """The rule gets the other parameters only."""

    class Both(Coach):
        def __init__(self) -> None:
            super().__init__()
            self.style = ParameterNode("plain")

    agent = Both()
    add = [{"op": "ADD", "text": "Be calm."}]
    optimizer = ScriptedModel(suggestion(tips=add, style="short"), suggestion(tips=add, style="long"))
    merge = ScriptedModel(suggestion(style="medium"))
    AggregatedUpdate(agent, LLMOptimizer(llm=optimizer), llm=merge).train(
        wrong, [("a", 1), ("b", 2)], batch_size=2, max_concurrency=1
    )
    assert (texts(agent.tips.data)[-1], agent.style.data) == ("Be calm.", "medium")
    assert "Be calm." not in merge.asked[0][-1]["content"].partition("#SuggestedValue_1")[2]


def test_a_playbook_can_be_saved_and_loaded(tmp_path: Any) -> None:
    """The artefact holds the items with ids, counts and samples."""
    agent = Coach()
    agent.tips.data = agent.tips.convert([{"op": "HELPFUL", "id": ids(agent.tips)[0]}])
    agent.save(tmp_path / "agent.json")
    fresh = Coach([])
    fresh.load(tmp_path / "agent.json")
    assert fresh.tips.data == agent.tips.data
    assert json.loads((tmp_path / "agent.json").read_text())["parameters"]["tips"][0]["helpful"] == 1


def test_a_candidate_is_tried_without_changing_the_playbook() -> None:
    """Overrides hold items like any other value."""
    agent = Coach()
    with overriding(agent.parameters(), {"tips": (Item(id="x", text="Be calm."),)}):
        assert str(agent.tips) == "- Be calm."
    assert str(agent.tips) == "- Be brief.\n- Be kind."


def test_a_text_was_taken_for_a_list_of_letters() -> None:
    """A playbook of one text is a list, too."""
    with pytest.raises(ParameterError, match=r"Expected a list of texts, got the text 'Be brief.'; write Playbook"):
        Playbook("Be brief.")


def test_an_unknown_edit_says_what_was_expected() -> None:
    """The model reads the error when it is asked once more."""
    playbook = Playbook(["Be brief."], name="tips")
    for edits, reason in (
        ([{"op": "add", "text": "x"}], r"Expected one of the values of the schema, got 'add' - at \$.*\.op"),
        (
            [{"ADD": "x"}],
            "Expected all required fields, got none named `op`|Expected the fields of the schema, got the",
        ),
    ):
        with pytest.raises(ParameterError, match=reason):
            playbook.convert(edits)
