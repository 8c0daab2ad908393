"""AggregatedUpdate as an Opik optimizer: its own `optimize_prompt`, with items and agent of this process."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest

os.environ |= {
    "OPIK_URL_OVERRIDE": "http://127.0.0.1:9/api",
    "OPIK_TRACK_DISABLE": "true",
    "OPIK_SENTRY_ENABLE": "false",
}
pytest.importorskip("opik_optimizer", reason="runs in the environment opik of tests/environments.py")

import opik
from opik.evaluation.metrics.score_result import ScoreResult
from opik_optimizer import ChatPrompt, OptimizableAgent, constants

from aggregator import as_model
from aggregator.hosts.opik import AggregatedUpdate

pytestmark = pytest.mark.filterwarnings("ignore")


class Items(opik.Dataset):
    """A data set in this process."""

    def __init__(self, count: int = 8) -> None:
        self._items = [{"id": f"item-{i}", "who": f"w{i}", "expected": f"Hello w{i}!"} for i in range(count)]
        self._name, self._description, self._rest_client = "greetings", "", SimpleNamespace()

    def get_items(self, nb_samples: int | None = None, *_: Any, **__: Any) -> Any:
        return [dict(item) for item in self._items[:nb_samples]]

    @property
    def id(self) -> str:
        return "dataset"


class Template(OptimizableAgent):
    """Answers with its last message, filled in."""

    def invoke_agent(self, prompts: Any, dataset_item: Any, allow_tool_use: bool = False, seed: Any = None) -> str:
        (prompt,) = prompts.values()
        return str(prompt.get_messages(dataset_item)[0]["content"])


def right(dataset_item: dict[str, Any], llm_output: str) -> ScoreResult:
    expected = dataset_item["expected"]
    return ScoreResult(name="right", value=float(llm_output == expected), reason=f"expected {expected}")


def optimize(asked: list[str], text: str = "Hello {who}!", metric: Any = right, **options: Any) -> Any:
    def answer(messages: Any) -> str:
        asked.append(messages[-1]["content"])
        return json.dumps({"reasoning": "", "suggestion": {"greet_system": text, "greet_user": "now"}})

    given: dict[str, Any] = {"max_trials": 50, **options}
    optimizer = AggregatedUpdate(model=as_model(answer), run_dir=False)
    prompt = ChatPrompt(name="greet", system="Say hi to {who}", user="go")
    result = optimizer.optimize_prompt(prompt=prompt, dataset=Items(), metric=metric, agent=Template(), **given)
    found = result.prompt if isinstance(result.prompt, ChatPrompt) else result.prompt["greet"]
    return optimizer, result, prompt, [message["content"] for message in found.get_messages()]


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opik's own switch: items are evaluated here, without experiments on a server."""
    monkeypatch.setattr(constants, "ENABLE_EVALUATE_ON_DICT_ITEMS", True)


def test_the_system_message_is_trained_by_opiks_own_entry_point() -> None:
    """The metric's reasons are the feedback; the given prompt and the user message are unchanged."""
    asked: list[str] = []
    optimizer, result, prompt, texts = optimize(asked)
    assert texts == ["Hello {who}!", "go"]
    assert result.score == 1.0
    assert prompt.system == "Say hi to {who}"
    assert "right: expected Hello w" in asked[0]
    assert list(optimizer.result.parameters) == ["greet.system"]


def test_the_roles_that_opiks_call_names_are_trained() -> None:
    assert optimize([], optimize_prompts=["system", "user"])[3] == ["Hello {who}!", "now"]


def test_a_message_that_loses_its_placeholder_is_refused() -> None:
    assert optimize([], text="Hello you!")[3] == ["Say hi to {who}", "go"]


def test_the_number_of_trials_bounds_the_run() -> None:
    optimizer, _, _, _ = optimize([], max_trials=1)
    assert optimizer.result.stopped
    assert len(optimizer.result.history) <= 1
