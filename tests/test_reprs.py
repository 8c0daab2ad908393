"""What public objects show of themselves in a prompt or a log: what they are, never where in memory they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aggregator import (
    LLM,
    Budget,
    DataLoader,
    LLMJudge,
    Module,
    Observer,
    ParameterNode,
    as_model,
    bundle,
    cassette,
    lineage,
    model,
    transcript,
)
from aggregator.guides import ExactMatch, KeywordHints, NumericMatch, RegexMatch
from aggregator.observing import ConsoleLogger, ProgressBar, from_logger
from aggregator.simulation import SimulatedModel

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
    ],
)
def test_an_object_says_what_it_is(made: Any, shown: str) -> None:
    """The repr names the class and what it was made with, and holds neither an address nor a key."""
    assert repr(made) == shown
    assert KEY not in shown


def test_what_is_open_says_what_is_in_it(tmp_path: Path) -> None:
    """A tape its exchanges, a transcript its operations, a server its address."""
    with cassette(tmp_path / "a.yaml", mode="all") as tape, transcript() as seen, SimulatedModel() as server:
        assert repr(tape) == f"<Tape {str(tmp_path / 'a.yaml')!r}: 0 recorded, 0 of them played>"
        Router().answer("x")
        assert repr(seen) == "<Transcript of 1 operations and calls>"
        assert repr(server) == f"<SimulatedModel at {server.base_url}>"


def test_a_repr_does_not_name_parameters() -> None:
    """Looking at an agent changes nothing of it."""
    agent = Router()
    repr(agent)
    assert (agent.rule.named, agent.rule.name) == (False, "parameter")
