"""Functions that use prompts of MLflow's registry: the prompts are parameters, candidates run concurrently."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow", reason="runs in the environment mlflow of tests/environments.py")

import mlflow

from aggregator import as_model, exact_match, optimize
from aggregator.adapters.mlflow import RegisteredPrompts
from aggregator.errors import ConfigError
from aggregator.executors.work import AgentWork
from aggregator.records import Rollout, RolloutTask, Sample

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    mlflow.genai.register_prompt(name="greet", template="Say hi to {{who}}")
    mlflow.genai.register_prompt(name="other", template="Other")


def predict(who: str) -> str:
    other = mlflow.genai.load_prompt("prompts:/other/1").format()
    return f"{mlflow.genai.load_prompt('prompts:/greet/1').format(who=who)} {other}"


async def predict_async(who: str) -> str:
    await asyncio.sleep(0.01)
    return predict(who)


async def rollout(agent: Any, x: Any, **values: Any) -> Rollout:
    task = RolloutTask(sample=Sample(0, x), values=values, lineage=("test",), role="agent", capture=True)
    return await AgentWork(agent, None)(task)


@pytest.mark.parametrize("function", [predict, predict_async])
async def test_concurrent_candidates_read_their_own_templates(function: Any) -> None:
    """This holds in threads and in tasks; untrained prompts, and readers outside, get the registry's text."""
    agent = RegisteredPrompts(function, ["prompts:/greet/1"])
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(rollout(agent, {"who": f"w{i}"}, greet=f"T{i} {{{{who}}}}")) for i in range(8)]
        await asyncio.sleep(0.005)
        assert predict("Ann") == "Say hi to Ann Other"
    assert [task.result().output for task in tasks] == [f"T{i} w{i} Other" for i in range(8)]
    assert predict("Ann") == "Say hi to Ann Other"


async def test_trained_prompts_are_registered_as_new_versions_on_request(tmp_path: Path) -> None:
    agent = RegisteredPrompts(predict, ["prompts:/greet/1", "prompts:/other/1"])
    agent.apply({"greet": "Hello {{who}}!"})
    assert await agent({"who": "Ann"}) == "Hello Ann! Other"
    assert predict("Ann") == "Say hi to Ann Other"
    agent.save(tmp_path / "prompts.json")
    made = agent.register(commit_message="trained")
    assert [(one.name, one.version, one.template, one.commit_message) for one in made] == [
        ("greet", 2, "Hello {{who}}!", "trained")
    ]
    fresh = RegisteredPrompts(predict, ["prompts:/greet/1"])
    with fresh.applied({"greet": "Hey {{who}}"}) as function:
        assert function("Ann") == "Hey Ann Other"


def test_optimize_trains_the_prompt() -> None:
    agent = RegisteredPrompts(predict, ["prompts:/greet/1"])
    model = as_model(lambda messages: '{"reasoning": "", "suggestion": {"greet": "Hello {{who}}!"}}')
    rows = [({"who": f"w{i}"}, f"Hello w{i}! Other") for i in range(6)]
    result = optimize(agent, rows, guide=exact_match, model=model, run_dir=False, show=False)
    assert result.parameters == {"greet": "Hello {{who}}!"}
    assert max(one.score or 0 for one in result.validations) == 1.0


def test_functions_without_a_trainable_prompt_are_refused() -> None:
    for predict_given, prompts in (("predict", ["prompts:/greet/1"]), (predict, []), (predict, "prompts:/greet/1")):
        with pytest.raises(ConfigError, match="Expected a function and URIs of its prompts"):
            RegisteredPrompts(predict_given, prompts)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="both 'greet'"):
        RegisteredPrompts(predict, ["prompts:/greet/1", "prompts:/greet/1"])
