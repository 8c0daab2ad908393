"""The repr of public objects in a prompt or a log: what they are, never an address."""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from aggregator import (
    LLM,
    AggregatedUpdate,
    Budget,
    DataLoader,
    Image,
    LLMJudge,
    LLMMerge,
    LLMOptimizer,
    Module,
    Observer,
    ParameterNode,
    Playbook,
    Proposal,
    Step,
    as_agent,
    as_model,
    bundle,
    cassette,
    lineage,
    model,
    transcript,
)
from aggregator.executors import LocalExecutor, ProcessExecutor
from aggregator.gates import always, both, improves_on_batch, improves_on_validation, leak_guard, max_edit
from aggregator.guides import ExactMatch, KeywordHints, NumericMatch, RegexMatch
from aggregator.observing import ConsoleLogger, ProgressBar, from_logger
from aggregator.optimizers import OPROOptimizer, TextGradOptimizer
from aggregator.rules import LLMChoice, chain, dedupe, majority, top_k, tree_merge
from aggregator.searches import beam, greedy, priority
from aggregator.simulation import SimulatedModel
from aggregator.testing import FakeTransport
from aggregator.training.schedules import cosine, linear

KEY = "sk-abcdefghijklmnopqrstuvwx"


class Router(Module):
    def __init__(self) -> None:
        self.rule = ParameterNode("Answer.")
        self.parts = [ParameterNode(3), ParameterNode(4, name="k")]

    @bundle(trainable=True)
    def answer(self, x: str) -> str:
        return x


@model
class Greeter:
    def __init__(self) -> None:
        self.word = ParameterNode("Hello")


def answer(x: str, *, rule: str = "Answer.") -> str:
    return rule + x


def hello(messages: Any) -> str:
    return "hello"


LLM_SHOWN = "LLM('openai/gpt-4o-mini')"


def llm() -> LLM:
    return LLM("openai/gpt-4o-mini", api_key=KEY)


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (llm(), LLM_SHOWN),
        (as_model(hello), "as_model(hello)"),
        (Router(), "<Router with parameters answer__code, rule, parts.0, k>"),
        (Greeter(), "<Greeter with parameters word>"),
        (Module(), "<Module>"),
        (Budget(usd=0.5, calls=3), "Budget(usd=0.5, calls=3)"),
        (lineage("train", "epoch=0", role="optimizer"), "lineage('train/epoch=0', role='optimizer')"),
        (ExactMatch(str.casefold, key="answer"), "ExactMatch(str.casefold, key='answer')"),
        (RegexMatch("a+", whole=True), "RegexMatch('a+', whole=True)"),
        (KeywordHints({"a": "b"}, required=True), "KeywordHints({'a': 'b'}, required=True)"),
        (NumericMatch(abs_tol=0.5, last=True), "NumericMatch(rel_tol=1e-09, abs_tol=0.5, last=True)"),
        (LLMJudge(llm(), criteria="It is polite."), f"LLMJudge({LLM_SHOWN}, criteria='It is polite.')"),
        (ConsoleLogger(), "ConsoleLogger()"),
        (ProgressBar(), "ProgressBar()"),
        (Observer(), "Observer()"),
        (from_logger(ConsoleLogger(), 2), "from_logger(ConsoleLogger(), frequency=2)"),
        (SimulatedModel(seed=3), "SimulatedModel(seed=3)"),
        (DataLoader([(1, 2), (3, 4)], 2), "<DataLoader of 2 samples, batch_size=2>"),
        (LLMOptimizer(llm=llm()), f"LLMOptimizer({LLM_SHOWN})"),
        (OPROOptimizer(llm=llm()), f"OPROOptimizer({LLM_SHOWN})"),
        (TextGradOptimizer(llm=llm()), f"TextGradOptimizer({LLM_SHOWN})"),
        (LLMMerge(llm()), f"LLMMerge({LLM_SHOWN})"),
        (LLMChoice(llm()), f"LLMChoice({LLM_SHOWN})"),
        (greedy, "greedy"),
        (beam(3), "beam(3, num_proposals=2)"),
        (priority(8, num_proposals=3), "priority(8, num_proposals=3)"),
        (LocalExecutor(8), "LocalExecutor(8)"),
        (ProcessExecutor(2), "ProcessExecutor(2)"),
        (as_agent(Router()), "as_agent(<Router with parameters answer__code, rule, parts.0, k>)"),
        (as_agent(answer), "as_agent(answer)"),
        (as_agent("Classify: {ticket}", model=hello), "<TemplateAgent with parameters prompt>"),
        (as_agent({"rule": "Answer."}, evaluator=lambda values, row: 1.0), "<EvaluatedValues with parameters rule>"),
        (Image("https://example.com/cat.png", detail="low"), "Image('https://example.com/cat.png', detail='low')"),
        (Image(b"GIF8" + b"x" * 9_000, media_type="image/gif"), f"Image(b'GIF8{'x' * 74}..., media_type='image/gif')"),
        (Playbook(["Be brief."], name="rules"), "Playbook(['Be brief.'], name='rules')"),
        (transcript(), "transcript()"),
        (cassette("a.yaml", "none"), "cassette('a.yaml', mode='none')"),
        (FakeTransport("hello"), "<FakeTransport: 1 step, 0 requests>"),
        (Step.of(Router()), "<Step 0 of epoch 0: 0 samples, parameters answer__code, rule, parts.0, k>"),
        (
            AggregatedUpdate(Router(), LLMOptimizer(llm=llm()), llm=llm()),
            f"AggregatedUpdate(<Router with parameters answer__code, rule, parts.0, k>, LLMOptimizer({LLM_SHOWN}))",
        ),
    ],
)
def test_an_objects_repr_describes_it(made: Any, shown: str) -> None:
    """The repr has the class and its arguments, and neither an address nor a key."""
    assert repr(made) == shown
    assert KEY not in shown


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (chain(dedupe, top_k(3)), "chain(dedupe, top_k(3))"),
        (tree_merge(majority, fan_in=4), "tree_merge(majority, fan_in=4)"),
        (improves_on_batch(0.1), "improves_on_batch(0.1)"),
        (both(always, improves_on_batch()), "both(always, improves_on_batch(0.0))"),
        (
            improves_on_validation([(1, 2)], 0.1, significance=0.05),
            "improves_on_validation(threshold=0.1, significance=0.05)",
        ),
        (linear(1.0), "linear(1.0, 0.0)"),
        (cosine(1.0, 0.5), "cosine(1.0, 0.5)"),
        (max_edit(0.5), "max_edit(0.5)"),
        (leak_guard(words=8), "leak_guard(words=8)"),
    ],
)
def test_a_functions_repr_is_the_call_that_made_it(made: Any, name: str) -> None:
    """It was "chain.<locals>.chained"; errors, `RunInfo` and the repr name it."""
    assert made.__qualname__ == name
    assert name in repr(made)


def test_a_printed_answer_shows_its_text_and_no_unknown_counts() -> None:
    """`print(llm("Say hello."))` filled ten lines with the raw body and fields that are None."""
    answer = llm_with(FakeTransport("Hello."))("Say hello.")
    usage = f"Usage(input_tokens={answer.usage.input_tokens}, output_tokens={answer.usage.output_tokens})"
    assert repr(answer.usage) == usage
    assert str(answer) == f"Completion('Hello.', finish_reason='stop', usage={usage}, model='gpt-4o-mini')"
    assert repr(answer.choices[0].message) == "Message(content='Hello.')"
    assert repr(Proposal(values={"k": 3})) == "Proposal(values={'k': 3})"


def llm_with(transport: FakeTransport) -> LLM:
    return LLM("openai/gpt-4o-mini", api_key=KEY, transport=transport)


def test_no_prompt_is_a_default_argument() -> None:
    """The signatures of optimizers and rules had up to 2,577 characters."""
    parts = [LLMOptimizer, OPROOptimizer, TextGradOptimizer, LLMMerge, LLMChoice, LLMJudge, AggregatedUpdate]
    assert {part.__name__: n for part in parts if (n := len(str(signature(part)))) > 1_000} == {}
    defaults = [parameter.default for part in parts for parameter in signature(part).parameters.values()]
    assert [default for default in defaults if isinstance(default, str) and len(default) > 60] == []


def test_an_open_objects_repr_counts_its_content(tmp_path: Path) -> None:
    """A tape shows its exchanges, a transcript its operations, a server its address."""
    with cassette(tmp_path / "a.yaml", mode="all") as tape, transcript() as seen, SimulatedModel() as server:
        assert repr(tape) == f"<Tape {str(tmp_path / 'a.yaml')!r}: 0 recorded, 0 of them played>"
        Router().answer("x")
        assert repr(seen) == "<Transcript of 1 operations and calls>"
        assert repr(server) == f"<SimulatedModel at {server.base_url}>"


def test_a_repr_does_not_name_parameters() -> None:
    """Reading an agent's repr does not change the agent."""
    agent = Router()
    repr(agent)
    assert (agent.rule.named, agent.rule.name) == (False, "parameter")


def test_a_misspelt_name_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    """`aggregator.AggregateUpdate` is an error that names AggregatedUpdate, in the faces too."""
    for module, typo, name in (
        ("aggregator", "AggregateUpdate", "AggregatedUpdate"),
        ("aggregator.rules", "majorty", "majority"),
    ):
        with pytest.raises(AttributeError) as caught:
            getattr(import_module(module), typo)
        sys.__excepthook__(AttributeError, caught.value, None)
        assert f"Did you mean: '{name}'?" in capsys.readouterr().err
