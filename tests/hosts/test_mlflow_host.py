"""AggregatedUpdate inside `mlflow.genai.optimize_prompts`, with an MLflow registry in a file."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mlflow", reason="runs in the environment mlflow of tests/environments.py")

import mlflow
from mlflow.entities import Feedback
from mlflow.genai.scorers import scorer

from aggregator import as_model
from aggregator.adapters.mlflow import prompt_parameter
from aggregator.errors import ConfigError, ParameterError
from aggregator.hosts.mlflow import AggregatedUpdate, _Evaluations
from aggregator.records import Sample

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [{"inputs": {"who": f"w{i}"}, "expectations": {"expected_response": f"Hello w{i}!"}} for i in range(8)]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_GENAI_EVAL_SKIP_TRACE_VALIDATION", "True")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    mlflow.set_experiment("prompts")


@scorer
def right(outputs: Any, expectations: Any) -> Feedback:
    expected = expectations["expected_response"]
    return Feedback(value=float(outputs == expected), rationale=f"expected {expected}")


@mlflow.trace
def predict(who: str) -> str:
    return str(mlflow.genai.load_prompt("prompts:/greet/1").format(who=who))


def suggest(*templates: Any) -> Any:
    """A model that suggests these templates in order, and records its prompts."""
    left = list(templates)

    def answer(messages: Any) -> str:
        answer.asked.append(messages[-1]["content"])  # type: ignore[attr-defined]
        return json.dumps({"reasoning": "", "suggestion": {"greet": left.pop(0) if len(left) > 1 else left[0]}})

    answer.asked = []  # type: ignore[attr-defined]
    return answer


def optimize(model: Any, template: Any = "Say hi to {{who}}", **options: Any) -> Any:
    prompt = mlflow.genai.register_prompt(name="greet", template=template)
    optimizer = AggregatedUpdate(model=as_model(model), run_dir=False, **options)
    arguments = {"predict_fn": predict, "train_data": ROWS, "scorers": [right], "prompt_uris": [prompt.uri]}
    return optimizer, mlflow.genai.optimize_prompts(optimizer=optimizer, **arguments)


def test_a_registered_prompt_is_trained_and_registered_as_a_new_version() -> None:
    """Rationales are the feedback, MLflow's trace is the transcript, scores are logged to MLflow's open run."""
    model = suggest("Hello {{who}}!")
    optimizer, result = optimize(model)
    assert [(one.version, one.template) for one in result.optimized_prompts] == [(2, "Hello {{who}}!")]
    assert (result.initial_eval_score, result.final_eval_score) == (0.0, 1.0)
    assert mlflow.genai.load_prompt("prompts:/greet/1").template == "Say hi to {{who}}"
    assert "right: expected Hello w" in model.asked[0]
    assert "returned: Say hi to w" in model.asked[0]
    run = mlflow.search_runs(output_format="list")[0]
    assert run.data.metrics["train_score"] in {0.0, 1.0}
    assert optimizer.result.history


@scorer
def brief(outputs: Any) -> float:
    return 1.0 if len(outputs) < 10 else 0.5


def test_the_scores_of_each_scorer_were_empty() -> None:
    """They are means over the validation part, like the score itself, before training and with the best templates."""
    prompt = mlflow.genai.register_prompt(name="greet", template="Say hi to {{who}}")
    optimizer = AggregatedUpdate(model=as_model(suggest("Hello {{who}}!")), run_dir=False)
    result = mlflow.genai.optimize_prompts(
        predict_fn=predict, train_data=ROWS, scorers=[right, brief], prompt_uris=[prompt.uri], optimizer=optimizer
    )
    assert (result.initial_eval_score, result.final_eval_score) == (0.25, 1.0)
    assert result.initial_eval_score_per_scorer == {"right": 0.0, "brief": 0.5}
    assert result.final_eval_score_per_scorer == {"right": 1.0, "brief": 1.0}
    run = mlflow.search_runs(output_format="list")[0]
    assert run.data.metrics["final_eval_score.right"] == 1.0


def test_a_template_that_loses_its_variable_is_refused() -> None:
    """MLflow would score it silently; the model gets the reason, and the old template is kept."""
    model = suggest("Hello you!")
    _, result = optimize(model)
    assert [one.template for one in result.optimized_prompts] == ["Say hi to {{who}}"]
    assert any("{{who}}" in asked.rpartition("Expected")[2] for asked in model.asked)


def test_a_chat_prompt_stays_a_list_of_messages() -> None:
    template = [{"role": "system", "content": "Greet."}, {"role": "user", "content": "{{who}}"}]
    parameter = prompt_parameter("greet", json.dumps(template))
    assert parameter.data == template
    new = [{"role": "system", "content": "Greet warmly."}, {"role": "user", "content": "{{who}}"}]
    assert parameter.convert(new) == new
    for broken in ("Greet {{who}}", new[:1], [{"role": "user", "content": "{{who}}"}] * 2):
        with pytest.raises(ParameterError):
            parameter.convert(broken)


@pytest.mark.skipif(
    tuple(map(int, mlflow.__version__.split(".")[:2])) < (3, 16),
    reason="MLflow itself refuses chat prompts before 3.16",
)
def test_a_chat_prompt_is_trained() -> None:
    template = [{"role": "system", "content": "Greet."}, {"role": "user", "content": "Say hi to {{who}}"}]
    better = [{"role": "system", "content": "Greet."}, {"role": "user", "content": "Hello {{who}}!"}]

    def predict_chat(who: str) -> str:
        return str(mlflow.genai.load_prompt("prompts:/greet/1").format(who=who)[-1]["content"])

    prompt = mlflow.genai.register_prompt(name="greet", template=template)
    result = mlflow.genai.optimize_prompts(
        predict_fn=predict_chat,
        train_data=ROWS,
        prompt_uris=[prompt.uri],
        scorers=[right],
        optimizer=AggregatedUpdate(model=as_model(suggest(better)), run_dir=False),
    )
    assert result.optimized_prompts[0].template == better


def test_an_error_of_predict_fn_is_a_failure_without_output() -> None:
    def broken(who: str) -> str:
        template = mlflow.genai.load_prompt("prompts:/greet/1").template
        if who == "w3":
            raise KeyError("lamp")
        return str(template.replace("{{who}}", who))

    prompt = mlflow.genai.register_prompt(name="greet", template="Say hi to {{who}}")
    optimizer = AggregatedUpdate(model=as_model(suggest("Hello {{who}}!")), run_dir=False, validate=0)
    mlflow.genai.optimize_prompts(
        predict_fn=broken, train_data=ROWS, prompt_uris=[prompt.uri], scorers=[right], optimizer=optimizer
    )
    result: Any = optimizer.result
    assert {(one.error, one.sample_id) for one in result.failures if one.stage == "agent"} == {("PredictError", 3)}


async def test_eval_fn_gets_all_instances_of_a_candidate_in_one_call() -> None:
    """MLflow's `eval_fn` is not thread-safe, and runs the instances in its own pool."""
    seen: list[tuple[dict[str, str], int]] = []
    busy = threading.Lock()

    record = SimpleNamespace(
        outputs="a", expectations=None, trace=None, rationales={}, score=1.0, individual_scores={"right": 1.0}
    )

    def eval_fn(templates: dict[str, str], rows: list[Any]) -> Any:
        assert busy.acquire(blocking=False)
        seen.append((templates, len(rows)))
        busy.release()
        return [record] * len(rows)

    evaluate = _Evaluations(eval_fn, set())
    found = await evaluate({"greet": "x"}, [Sample(i, {}, {}) for i in range(5)])
    assert seen == [({"greet": "x"}, 5)]
    assert [(one.score, one.scores) for one in found] == [(1.0, {"right": 1.0})] * 5


def test_no_training_signal_is_an_error() -> None:
    prompt = mlflow.genai.register_prompt(name="greet", template="Say hi to {{who}}")
    optimizer = AggregatedUpdate(model=as_model(suggest("x")), run_dir=False)
    with pytest.raises(ConfigError, match="Expected train_data= and scorers="):
        mlflow.genai.optimize_prompts(predict_fn=predict, train_data=[], prompt_uris=[prompt.uri], optimizer=optimizer)
    with pytest.raises(ConfigError, match="Expected scorers="):
        mlflow.genai.optimize_prompts(
            predict_fn=predict, train_data=ROWS, prompt_uris=[prompt.uri], optimizer=optimizer
        )


def test_the_same_seed_gives_the_same_proposals() -> None:
    asked = []
    for _ in range(2):
        model = suggest("Hello {{who}}!", "Hello {{who}}.", "Hello {{who}}!")
        optimize(model)
        asked.append(model.asked)
    assert asked[0] == asked[1]
