"""Checks: what refuses a single value before anything is run, and what happens to a refused value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_fakes import ScriptedModel, section, suggest

from aggregator import AggregatedUpdate, ConfigError, LLMOptimizer, Module, ParameterNode, bundle
from aggregator.agents.code import CodeParameter
from aggregator.records import Sample
from aggregator.text import placeholders
from aggregator.training import gates
from aggregator.training.gates import edited_tokens, keeps_placeholders, leak_guard, max_edit
from aggregator.training.step import Check, Step

TEXT = ParameterNode("a text", name="prompt")
WORDS = st.lists(st.sampled_from(["one", "two", "{x}", "{{y}}", "$z", ",", "{'k': 1}"]), max_size=12).map(" ".join)


class Template(Module):
    """Answers with its own template, for the guide to check."""

    def __init__(self, template: str = "Q: {question}") -> None:
        self.prompt = ParameterNode(template)

    async def forward(self, x: str) -> str:
        return self.prompt.data


def wrong(x: str, output: str, info: Any) -> tuple[float, str]:
    return 0.0, f"wrong: {x}"


def train(agent: Module, replies: Sequence[str], **options: Any) -> tuple[Any, ScriptedModel]:
    """Train one step on one sample with an optimizer that gives these replies in order."""
    llm = ScriptedModel(*replies)
    result = AggregatedUpdate(agent, LLMOptimizer(llm=llm), llm=llm, **options).train(wrong, [("who?", "me")])
    return result, llm


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{question}", ["{question}"]),
        ("{question!r:>10} {user.name} {items[0]} {0}", ["{question}", "{user.name}", "{items[0]}", "{0}"]),
        ("{{question}} and {{ question }}", ["{{question}}"]),
        ("$question ${question} costs $5 or $$question", ["$question"]),
        ('Reply {"team": "sales", "k": {"a": 1}} or {} or {a b}.', []),
        ("{question} {question}", ["{question}"]),
        ("{fråga}", ["{fråga}"]),
    ],
)
def test_what_counts_as_a_placeholder(text: str, found: list[str]) -> None:
    """The three common template languages are recognised; JSON, money and doubled signs are text."""
    assert placeholders(text) == found


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("Q: {question}", "Answer briefly.", "without '{question}'"),
        ("Q: {question}", "Q: {{question}}", "without '{question}'"),
        ("Q: {{question}}", "Q: {{ query }}", "without '{{question}}'"),
        ("Q: $question", "Q: $query", "without '$question'"),
        ("Q: {question}", "{style} Q: {question}", "got '{style}', which nothing fills in"),
        ("Be brief.", "Be brief, {user}.", "Expected a text with no placeholders, got '{user}'"),
        ("Be brief.", " \n", "Expected a text, got an empty one"),
    ],
)
def test_a_template_lost_its_placeholder(before: str, after: str, reason: str) -> None:
    """A text that loses or invents a placeholder, or is empty, is refused with what was expected and what it got."""
    assert reason in str(keeps_placeholders(before, after, TEXT, Step()))


@given(WORDS, WORDS)
def test_a_text_with_the_same_placeholders_is_kept(before: str, after: str) -> None:
    """The check refuses exactly the texts whose set of placeholders differs, and empty ones."""
    same = set(placeholders(before)) == set(placeholders(after)) and not (before.strip() and not after.strip())
    assert (keeps_placeholders(before, after, TEXT, Step()) is None) == same


def test_source_code_and_other_types_have_no_placeholders() -> None:
    """An f-string in trained code is not a template; numbers and lists are not checked."""

    class Agent(Module):
        @bundle(trainable=True)
        def greet(self, name: str) -> str:
            return f"Hello {name}"

    (code,) = Agent().parameters()
    assert isinstance(code, CodeParameter)
    assert keeps_placeholders(code.data, code.data.replace("{name}", "{name} {name!r}"), code, Step()) is None
    assert keeps_placeholders(["{x}"], ["{y}"], ParameterNode(["{x}"]), Step()) is None
    assert keeps_placeholders(3, 4, ParameterNode(3), Step()) is None


def test_a_refused_value_is_requested_once_more_with_the_reason() -> None:
    """The second reply is used; the model saw why the first one was refused, and which placeholders to keep."""
    agent = Template()
    result, llm = train(agent, [suggest(prompt="Answer."), suggest(prompt="Answer {question} briefly.")])
    asked = [messages[-1]["content"] for messages in llm.asked]
    assert agent.prompt.data == "Answer {question} briefly."
    assert "keep {question}" in section(llm.asked[0], "Parameters")
    assert "without '{question}' - at $.suggestion.prompt" in asked[1]
    assert (len(asked), result.failures) == (2, ())


def test_a_value_refused_twice_is_left_out() -> None:
    """The run continues with the current value, and the record has the reason."""
    agent = Template()
    result, llm = train(agent, [suggest(prompt="Answer."), suggest(prompt="Answer.")])
    assert (agent.prompt.data, len(llm.asked)) == ("Q: {question}", 2)
    assert [(record.stage, record.error) for record in result.failures] == [("proposal", "SuggestionError")]
    assert "without '{question}'" in result.failures[0].message


def test_other_values_of_the_same_reply_are_kept() -> None:
    """Only the refused value is dropped."""

    class Two(Template):
        def __init__(self) -> None:
            super().__init__()
            self.style = ParameterNode("plain")

    agent = Two()
    train(agent, [suggest(prompt="Answer.", style="short")] * 2)
    assert (agent.prompt.data, agent.style.data) == ("Q: {question}", "short")


@pytest.mark.parametrize("options", [{"checks": []}, {"checks": ()}])
def test_an_empty_list_turns_the_checks_off(options: dict[str, Any]) -> None:
    """`checks=[]` accepts every value of the right type."""
    agent = Template()
    train(agent, [suggest(prompt="Answer.")], **options)
    assert agent.prompt.data == "Answer."


def test_custom_checks_are_added_to_the_placeholder_check() -> None:
    """A list adds to `keeps_placeholders`; a refused value has the reason of the first check that refuses it."""

    def no_shouting(before: Any, after: Any, parameter: ParameterNode[Any], step: Step) -> str | None:
        return "Expected a quiet text, got capitals" if str(after).isupper() else None

    agent = Template("Q: {question}")
    result, _ = train(agent, [suggest(prompt="Q"), suggest(prompt="WHO? {QUESTION}")], checks=[no_shouting])
    assert "without '{question}'" in result.failures[0].message
    agent = Template("who")
    result, _ = train(agent, [suggest(prompt="WHO")] * 2, checks=[no_shouting])
    assert result.failures[0].message.startswith("Expected a quiet text, got capitals - at $.suggestion.prompt")


@pytest.mark.parametrize("given", ["max_edit", [0.2], [lambda before: None], {"a": 1}])
def test_an_invalid_list_of_checks(given: Any) -> None:
    """It is refused at construction."""
    with pytest.raises(ConfigError, match="Expected"):
        AggregatedUpdate(Template(), LLMOptimizer(llm=ScriptedModel(str)), llm=ScriptedModel(str), checks=given)


def test_a_check_must_return_a_reason_or_none() -> None:
    """Any other result is an error."""
    with pytest.raises(ConfigError, match="Expected a reason or None from the check"):
        train(Template(), [suggest(prompt="Q: {question}?")], checks=[lambda *_: True])


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ("a b c d", "a b c d", 0),
        ("a b c d", "a b c d e", 1),
        ("a b c d", "a c d", 1),
        ("a b, c", "a b; c", 1),
        ("", "a b", 2),
    ],
)
def test_the_size_of_an_edit(before: str, after: str, changed: int) -> None:
    """Words and punctuation marks count one each, added, removed or replaced."""
    tokens = [gates._TOKEN.findall(text) for text in (before, after)]
    assert edited_tokens(*tokens) == changed


def test_an_edit_budget_bounds_an_update() -> None:
    """A fifth of a long text may change, and at least 20 tokens of a short one; other types are not bounded."""
    check, long = max_edit(0.2), " ".join(f"w{i}" for i in range(1_000))
    assert check(long, f"{long} {'x ' * 200}", TEXT, Step()) is None
    assert "at most 200 of the 1000 tokens, got one that changes 201" in str(
        check(long, f"{long} {'x ' * 201}", TEXT, Step())
    )
    assert check("a b", "x " * 20, TEXT, Step()) is None
    assert check("a b", "x " * 21, TEXT, Step()) is not None
    assert check(1, 2, ParameterNode(1), Step()) is None


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), "0.2", True])
def test_an_invalid_edit_budget(share: Any) -> None:
    """`max_edit` is a number in (0, 1]."""
    with pytest.raises(ConfigError, match=r"Expected max_edit\(share\) in \(0, 1\]"):
        max_edit(share)


SAMPLES = [
    Sample(0, {"text": "The parcel from Basel never arrived at our door."}, "refund the customer at once please"),
    Sample(1, ["My invoice shows a sum that I do not owe"], None),
]


@pytest.mark.parametrize(
    "after",
    [
        "E.g. the PARCEL from Basel never arrived",
        "Say: refund the customer at once!",
        ["keep it short", "invoice shows a sum that"],
        {"example": "parcel, from Basel, never: arrived"},
    ],
)
def test_training_data_was_copied_into_the_prompt(after: Any) -> None:
    """Five consecutive words of an input or an answer are refused, in any case and punctuation, also inside lists."""
    step = Step(samples=SAMPLES)
    assert "training data" in str(leak_guard()("Be kind.", after, TEXT, step))


def test_allowed_quotes_of_the_training_data() -> None:
    """Four words, text of the initial or the current value, and parameters marked as demonstrations are allowed."""
    quoted = "the parcel from Basel never arrived"
    check, step = leak_guard(), Step(samples=SAMPLES, initial={"prompt": f"E.g. {quoted}."})
    assert check("Be kind.", "parcel from Basel never", TEXT, Step(samples=SAMPLES)) is None
    assert check(quoted, f"Mind: {quoted}", TEXT, Step(samples=SAMPLES)) is None
    assert check("Be kind.", f"Again: {quoted}", TEXT, step) is None
    examples = ParameterNode([""], name="examples", demonstrations=True)
    assert check([""], [quoted], examples, Step(samples=SAMPLES)) is None


def test_the_whole_training_set_is_guarded_if_it_is_given() -> None:
    """With `data` samples of other minibatches count, too."""
    check = leak_guard([(sample.x, sample.info) for sample in SAMPLES])
    assert check("Be kind.", "invoice shows a sum that", TEXT, Step()) is not None


def test_an_instance_of_an_earlier_minibatch_was_copied() -> None:
    """In a run the whole training set is guarded, not only the samples that a proposal saw."""
    agent = Template("Be kind.")
    llm = ScriptedModel(suggest(prompt="Be kind. and who asked that of me"))
    trainer = AggregatedUpdate(agent, LLMOptimizer(llm=llm), llm=llm, checks=[leak_guard()])
    result = trainer.train(wrong, [("and who asked that of me", "me"), ("a word", "b")], batch_size=1)
    assert agent.prompt.data == "Be kind."
    assert len(result.failures) == 2


@pytest.mark.parametrize("words", [1, 0, 2.0, "5", True])
def test_an_invalid_leak_guard(words: Any) -> None:
    """`words` is an int of at least 2."""
    with pytest.raises(ConfigError, match="Expected leak_guard"):
        leak_guard(words=words)


@pytest.mark.parametrize("check", [max_edit(0.5), leak_guard(), leak_guard([("who is it that asks this", 1)])])
def test_guards_refuse_within_a_run(check: Check) -> None:
    """The package's checks work as `checks=[...]` of a trainer; `leak_guard()` gets the step's samples."""
    agent = Template("Be kind.")
    text = "Be kind. who is it that asks this? who asked that of me? " + "again " * 30
    llm = ScriptedModel(suggest(prompt=text))
    trainer = AggregatedUpdate(agent, LLMOptimizer(llm=llm), llm=llm, checks=[check])
    result = trainer.train(wrong, [("and who asked that of me", "me")])
    assert (agent.prompt.data, len(llm.asked), len(result.failures)) == ("Be kind.", 2, 1)
