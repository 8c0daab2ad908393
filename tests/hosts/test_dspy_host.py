"""Our algorithm and our model inside DSPy, through DSPy's own entry points: compile, LM, save, streamify."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregator import LLM, Budget, cassette, optimize, trainable
from aggregator.errors import BudgetExceededError, CassetteMissError, ConfigError, TrainingWarning
from aggregator.executors.work import AgentWork
from aggregator.llm.ledger import collecting
from aggregator.llm.models import as_completion, as_model
from aggregator.records import RolloutTask, Sample
from aggregator.simulation import SimulatedModel

dspy: Any = pytest.importorskip("dspy", reason="runs in the environment dspy of tests/environments.py")
hosts: Any = pytest.importorskip("aggregator.hosts.dspy")

ROWS = [
    ("do you sell lamps", "sales"),
    ("the invoice is wrong", "billing"),
    ("my parcel is broken", "shipping"),
    ("a refund for the invoice", "billing"),
    ("where is my parcel", "shipping"),
    ("the courier lost my parcel", "shipping"),
]
QUIET: dict[str, Any] = {"run_dir": False, "num_epochs": 2}


@pytest.fixture
def llm() -> Iterator[LLM]:
    with SimulatedModel(seed=1, wrong_rate=0.0) as server:
        yield LLM("openai/simulated-1", base_url=server.base_url, api_key="simulated")


@pytest.fixture(autouse=True)
def asked(llm: LLM) -> Iterator[Any]:
    with dspy.context(lm=hosts.lm(llm)), warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        yield dspy.settings.lm


def examples() -> list[Any]:
    return [dspy.Example(ticket=ticket, team=team).with_inputs("ticket") for ticket, team in ROWS]


def same_team(gold: Any, prediction: Any, trace: Any = None) -> Any:
    return dspy.Prediction(score=float(gold.team == prediction.team), feedback=f"Expected: {gold.team}")


def program() -> Any:
    return dspy.Predict(dspy.Signature("ticket -> team", "If no rule applies, answer sales."))


def score(trained: Any) -> float:
    judge = dspy.Evaluate(devset=examples(), metric=lambda gold, made, trace=None: gold.team == made.team)
    return float(judge(trained).score)


def test_compile_returns_a_trained_copy_and_leaves_the_student() -> None:
    student = program()
    teleprompter = hosts.AggregatedUpdate(same_team, model=dspy.settings.lm._engine_spec.model, **QUIET)
    trained = teleprompter.compile(student, trainset=examples(), valset=examples())
    assert score(student) < score(trained)
    assert student.signature.instructions == "If no rule applies, answer sales."
    assert trained._compiled
    assert not student._compiled
    assert teleprompter.result.validations[0].score < teleprompter.result.validations[-1].score


def test_compile_and_optimize_propose_the_same(llm: LLM) -> None:
    teleprompter = hosts.AggregatedUpdate(same_team, model=llm, seed=3, **QUIET)
    trained = [teleprompter.compile(program(), trainset=examples()).dump_state() for _ in range(2)]
    agent = trainable(program())
    result = optimize(agent, examples(), guide=same_team, model=llm, seed=3, show=False, **QUIET)
    assert trained[0] == trained[1] == agent.program.dump_state()
    assert [step.update for step in teleprompter.result.history] == [step.update for step in result.history]
    assert any(step.update for step in result.history)


def test_the_copy_can_be_an_outer_programs_frozen_part(llm: LLM) -> None:
    """DSPy marks compiled programs, so that the training of an outer program leaves them unchanged."""

    class Outer(dspy.Module):  # type: ignore[misc] # not typed
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.more = inner, dspy.Predict("team -> floor")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        teleprompter = hosts.AggregatedUpdate(same_team, model=llm, run_dir=False)
        trained = teleprompter.compile(dspy.ChainOfThought("ticket -> team"), trainset=examples())
    assert [parameter.name for parameter in trainable(Outer(trained)).parameters()] == ["more.instructions"]


def test_a_teacher_and_anything_but_a_program_are_refused(llm: LLM) -> None:
    teleprompter = hosts.AggregatedUpdate(same_team, model=llm)
    with pytest.raises(ConfigError, match="Expected no teacher"):
        teleprompter.compile(program(), trainset=examples(), teacher=program())
    with pytest.raises(ConfigError, match=r"Expected a dspy\.Module to compile"):
        teleprompter.compile("program", trainset=examples())


async def test_programs_calls_are_counted_sync_and_async() -> None:
    with collecting() as ledger:
        assert program()(ticket="x").team == "sales"
        made = (await program().acall(ticket="x")).team
    assert made == "sales"
    assert ledger.totals()["agent"].calls > 1


async def test_a_call_of_our_model_is_in_the_transcript_once() -> None:
    with collecting() as ledger:
        task = RolloutTask(sample=Sample(0, {"ticket": "where is it"}))
        rollout = await AgentWork(trainable(program()), None)(task)
    assert rollout.transcript.count("LLM call") == ledger.totals()["agent"].calls > 0
    assert rollout.transcript.startswith("Predict")


def test_calls_of_programs_are_recorded_and_replayed(tmp_path: Path, llm: LLM) -> None:
    with cassette(tmp_path / "tape.yaml", "all"):
        recorded = program()(ticket="the invoice").toDict()
    closed = LLM("openai/simulated-1", base_url=llm.endpoint.base_url, api_key="simulated", max_attempts=1)
    with cassette(tmp_path / "tape.yaml", "none"), dspy.context(lm=hosts.lm(closed)):
        assert program()(ticket="the invoice").toDict() == recorded
    with pytest.raises(CassetteMissError), cassette(tmp_path / "tape.yaml", "none"):
        hosts.Engine(closed).complete(request())


async def test_an_exhausted_budget_ends_the_run_through_dspys_wrapping(llm: LLM) -> None:
    poor = LLM("openai/simulated-1", base_url=llm.endpoint.base_url, api_key="simulated", budget=Budget(calls=0))
    task = RolloutTask(sample=Sample(0, {"ticket": "x"}))
    with dspy.context(lm=hosts.lm(poor)), pytest.raises(BudgetExceededError):
        await AgentWork(trainable(program()), None)(task)


def test_a_saved_program_keeps_our_model_without_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-simulated-key-1234")
    kept, loaded = program(), program()
    kept.lm = hosts.lm("openai/gpt-4o-mini", temperature=0.5)
    kept.save(tmp_path / "program.json")
    text = (tmp_path / "program.json").read_text(encoding="utf-8")
    assert "sk-simulated" not in text
    loaded.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    assert loaded.lm._engine_spec.model.model == "openai/gpt-4o-mini"
    assert loaded.lm._async_engine_spec.model.model == "openai/gpt-4o-mini"
    assert (loaded.lm.kwargs["temperature"], loaded.lm.cache) == (0.5, False)


def test_a_key_in_the_code_is_not_saved(tmp_path: Path, llm: LLM) -> None:
    """Saving a program whose LLM was given `api_key=`, or is a function, is an error that names the cause."""
    kept = program()
    kept.lm = hosts.lm(llm)
    with pytest.raises(ConfigError, match="api_key"):
        kept.save(tmp_path / "program.json")
    kept.lm = hosts.lm(lambda messages: "x")
    with pytest.raises(ConfigError, match="Expected an LLM behind a program that is saved"):
        kept.save(tmp_path / "program.json")


def request(**config: Any) -> Any:
    lm15 = dspy.lm15
    return lm15.Request(
        model="openai/simulated-1",
        system="If no rule applies, answer sales and nothing else at all.",
        messages=(lm15.Message.user("where is it"),),
        config=lm15.Config(**config),
    )


async def test_streams_carry_the_same_text_in_pieces(llm: LLM) -> None:
    """Sync and async streams have the same events, text and usage as the whole answer."""
    whole = hosts.Engine(llm).complete(request())
    events = list(hosts.Engine(llm).stream(request()))
    awaited = [event async for event in hosts.AsyncEngine(llm).stream(request())]
    assert events == awaited
    assert "".join(event.delta.text for event in events if event.type == "delta") == whole.text
    assert (events[0].type, events[-1].type) == ("start", "end")
    assert events[-1].usage.input_tokens == whole.usage.input_tokens


async def test_dspys_own_streaming_works() -> None:
    with dspy.context(adapter=dspy.JSONAdapter()):
        streamed = dspy.streamify(program())
        found = [piece async for piece in streamed(ticket="where is it")]
    assert found[-1].team == "sales"


def test_options_of_a_request_reach_the_model(tmp_path: Path, llm: LLM) -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object", "properties": {"team": {}}}}
    with cassette(tmp_path / "tape.yaml", "all"):
        hosts.Engine(llm).complete(request(max_tokens=50, temperature=0.5, seed=4, response_format=schema))
    text = (tmp_path / "tape.yaml").read_text(encoding="utf-8").replace(" ", "").replace("max_completion_", "max_")
    for option in ('"max_tokens":50', '"temperature":0.5', '"seed":4', '"json_schema"'):
        assert option in text, option


async def test_a_dspy_model_proposes_and_merges_like_any_callable(llm: LLM) -> None:
    """Its answer is a list of strings."""
    model = as_model(hosts.lm(llm))
    messages = [{"role": "system", "content": "If no rule applies, answer sales."}, {"role": "user", "content": "x"}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert (await model.complete(messages)).text == "sales"
    assert as_completion([{"text": "sales", "logprobs": None}]).text == "sales"
