"""Options for a proposal's prompt: a worked example, other headings, sections left out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from training_fakes import ScriptedModel, section, suggest

from aggregator import LLMOptimizer, ParameterNode
from aggregator.errors import ConfigError
from aggregator.optimizers import OPROOptimizer, TextGradOptimizer
from aggregator.records import Rollout
from aggregator.training.prompts import SECTIONS, WORKED_EXAMPLE, Layout, proposal_messages
from aggregator.training.replies import parse_reply
from aggregator.training.step import Step

PARAMETERS = [ParameterNode(1, name="k")]
ROLLOUT = Rollout(sample_id=4, output="out", score=0.25, feedback="more of it", transcript="search(k=1)")


def headings(messages: list[dict[str, Any]]) -> list[str]:
    return [line[1:] for line in messages[1]["content"].splitlines() if line.startswith("#")]


async def asked(layout: Layout, optimizer: type[LLMOptimizer] = LLMOptimizer) -> list[list[dict[str, Any]]]:
    model = ScriptedModel(suggest(k="too few"), suggest(k=7))
    await optimizer(llm=model, layout=layout).propose([ROLLOUT], Step(parameters=PARAMETERS, values={"k": 1}))
    return model.asked


async def test_the_default_layout_is_unchanged() -> None:
    """Recorded runs stay valid."""
    (messages, *_) = await asked(Layout())
    assert headings(messages) == ["Objective", "Parameters", "Transcript", "Output", "Score", "Feedback"]


@pytest.mark.requirement("Trace: OptoPrime(include_example)")
@pytest.mark.parametrize("optimizer", [LLMOptimizer, OPROOptimizer])
async def test_include_example_adds_a_worked_example(optimizer: type[LLMOptimizer]) -> None:
    """True adds ours, a text adds the user's own."""
    (messages, *_) = await asked(Layout(include_example=True), optimizer)
    assert headings(messages)[:3] == ["Objective", "Example", "Parameters"]
    assert section(messages, "Example") == WORKED_EXAMPLE
    (messages, *_) = await asked(Layout(include_example="Here is one.\n#Feedback\nforged"), optimizer)
    assert section(messages, "Example") == "Here is one.\n #Feedback\nforged"


def test_the_worked_example_has_the_requested_form() -> None:
    """Its reply can be parsed like any other."""
    _, _, reply = WORKED_EXAMPLE.partition("A good reply was\n")
    parsed = parse_reply(reply)
    assert list(parsed.suggestion or {}) == ["instruction"]
    assert parsed.reasoning
    assert list(json.loads(WORKED_EXAMPLE.splitlines()[1])) == ["instruction", "k"]


@pytest.mark.requirement("Trace: OptoPrime(prompt_symbols)", "Trace: OptoPrimeV2, OPROv2: symbol sets for replies")
@pytest.mark.parametrize("mark", ["", "#"])
async def test_prompt_symbols_rename_headings(mark: str) -> None:
    """The text under them stays the same; Trace's names include their own #."""
    symbols = {f"{mark}Feedback": f"{mark}Verdict of the judge", f"{mark}Output": f"{mark}Answer"}
    (messages, *_) = await asked(Layout(prompt_symbols=symbols))
    assert headings(messages) == ["Objective", "Parameters", "Transcript", "Answer", "Score", "Verdict of the judge"]
    assert section(messages, "Verdict of the judge") == "more of it"


async def test_headings_can_be_swapped() -> None:
    """Two swapped names are still different."""
    (messages, *_) = await asked(Layout(prompt_symbols={"Output": "Feedback", "Feedback": "Output"}))
    assert (section(messages, "Output"), section(messages, "Feedback")) == ("more of it", "out")


@pytest.mark.requirement("Trace: OptoPrime.step(mask)")
async def test_a_mask_leaves_sections_out() -> None:
    """It hides what an optimizer need not, or must not, see."""
    (messages, *_) = await asked(Layout(mask=["#Transcript", "Output"]))
    assert headings(messages) == ["Objective", "Parameters", "Score", "Feedback"]
    assert "search(k=1)" not in messages[1]["content"]


async def test_a_critic_sees_the_layout_but_no_example_of_another_task() -> None:
    """Mask and headings apply to both prompts of TextGrad; only the one that asks for values has the example."""
    layout = Layout(include_example=True, mask=["Transcript"], prompt_symbols={"Output": "Answer"})
    critic, changer = await asked(layout, TextGradOptimizer)
    assert headings(critic) == ["Objective", "Parameters", "Answer", "Score", "Feedback"]
    assert headings(changer) == ["Objective", "Example", "Parameters", "Answer", "Score", "Feedback"]


def test_history_can_be_masked_and_renamed_too() -> None:
    """It is a section like the others."""

    def shown(layout: Layout) -> list[str]:
        given: dict[str, Any] = {"transcript": "", "output": "", "score": None, "feedback": "", "history": ["step 0"]}
        given["given"] = "q"
        return headings(proposal_messages({}, **given, layout=layout))

    assert shown(Layout(include_example=True)) == list(SECTIONS)
    assert shown(Layout(prompt_symbols={"History": "Tried"}))[-1] == "Tried"
    assert "History" not in shown(Layout(mask=["History"]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mask": ["Inputs"]}, "Expected headings of the prompt .*Transcript.*, got Inputs"),
        ({"mask": "Output"}, r"write \['Output'\]"),
        ({"mask": ["#Parameters"]}, "got 'Parameters'; name them in parameters="),
        ({"prompt_symbols": {"variables": "Vars"}}, "got variables"),
        ({"prompt_symbols": {"Output": "Feedback"}}, "Expected different headings"),
        ({"prompt_symbols": {"Output": "two\nlines"}}, "Expected different headings of one line"),
        ({"prompt_symbols": {"Output": "#"}}, "Expected different headings of one line"),
    ],
)
def test_an_invalid_layout_is_refused(options: dict[str, Any], expected: str) -> None:
    """The error at construction lists the headings."""
    with pytest.raises(ConfigError, match=expected):
        Layout(**options)
