"""DSPy programs as agents, with the real package: what is trained, copies, metrics, transcripts, errors, saving."""

from __future__ import annotations

import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aggregator import AggregatedUpdate, ParameterNode, as_agent, trainable
from aggregator.errors import AuthenticationError, ConfigError, GuideError, RateLimitError, TrainingWarning
from aggregator.executors.work import AgentWork
from aggregator.guides import ExactMatch, exact_match, metric
from aggregator.guides.calling import Metric, as_guide
from aggregator.records import Proposal, Rollout, RolloutTask, Sample
from aggregator.text import as_text, show
from aggregator.training.batches import samples
from aggregator.training.step import Step

dspy: Any = pytest.importorskip("dspy", reason="needs DSPy: python tests/environments.py --run dspy -- -m pytest")


class Engine:
    """A model of lm15 that fills every output field of the prompt with the instructions' last word."""

    def __init__(self, fails: Exception | None = None, says: str | None = None) -> None:
        self.fails, self.says, self.asked = fails, says, 0

    def complete(self, request: Any) -> Any:
        self.asked += 1
        if self.fails is not None:
            raise self.fails
        system = request.system if isinstance(request.system, str) else request.system[0].text
        word = system.strip().split()[-1]
        text = f"[[ ## team ## ]]\n{word}\n\n[[ ## completed ## ]]" if self.says is None else self.says
        return dspy.lm15.Response(
            id=None,
            model=request.model,
            message=dspy.lm15.Message.assistant(text),
            finish_reason="stop",
            usage=dspy.lm15.Usage(input_tokens=1, output_tokens=1),
        )


def program(instructions: str = "Answer sales") -> Any:
    return dspy.Predict(dspy.Signature("ticket -> team", instructions))


def examples(*teams: str) -> list[Any]:
    return [dspy.Example(ticket=f"ticket {i}", team=team).with_inputs("ticket") for i, team in enumerate(teams)]


def same_team(gold: Any, prediction: Any, trace: Any = None) -> Any:
    return dspy.Prediction(score=float(gold.team == prediction.team), feedback=f"Expected: {gold.team}")


@pytest.fixture
def engine() -> Any:
    made = Engine()
    with dspy.context(lm=dspy.LM("scripted/x", engine=made)):
        yield made


async def evaluate(agent: Any, data: Any, **values: Any) -> list[Rollout]:
    step = Step.of(agent, guide=same_team, samples=data)
    return list(await step.evaluate(values, step.samples, fresh=True))


async def roll_out(agent: Any, x: Any, **options: Any) -> Rollout:
    values = {parameter.name: parameter.data for parameter in agent.parameters()}
    return await AgentWork(agent, None)(RolloutTask(sample=Sample(0, x), values=values, **options))


def test_instructions_fields_and_demos_are_typed_parameters() -> None:
    agent = trainable(dspy.ChainOfThought("ticket -> team"), train=["instructions", "fields", "demos"])
    names = [parameter.name for parameter in agent.parameters()]
    assert names == [
        "predict.instructions",
        "predict.ticket.desc",
        "predict.reasoning.desc",
        "predict.team.desc",
        "predict.demos",
    ]
    assert agent.parameters_dict()["predict.team.desc"].data == ""
    with pytest.raises(ValueError, match="Expected `str`"):
        agent.parameters_dict()["predict.demos"].convert([{"ticket": "x", "team": 7}])


def test_accepted_values_are_written_into_the_program_which_saves_them(tmp_path: Path) -> None:
    trained = dspy.ChainOfThought("ticket -> team")
    agent = trainable(trained, train=["instructions", "fields", "demos"])
    demo = {"ticket": "t", "reasoning": "r", "team": "x"}
    agent.apply({"predict.instructions": "Route.", "predict.team.desc": "a team", "predict.demos": [demo]})
    trained.save(tmp_path / "program.json")
    loaded = dspy.ChainOfThought("ticket -> team")
    loaded.load(tmp_path / "program.json")
    assert loaded.predict.signature.instructions == "Route."
    assert loaded.predict.signature.fields["team"].json_schema_extra["desc"] == "a team"
    assert [dict(one) for one in loaded.predict.demos] == [demo]


def test_a_field_without_a_description_keeps_dspys() -> None:
    """DSPy's own `${name}` is not replaced by an empty text."""
    trained = program()
    agent = trainable(trained, train=["fields"])
    agent.apply({"team.desc": "a team"})
    agent.apply({"team.desc": ""})
    assert trained.signature.fields["team"].json_schema_extra["desc"] == "${team}"


@pytest.mark.usefixtures("engine")
async def test_concurrent_candidates_run_on_copies() -> None:
    trained = program()
    agent = trainable(trained)
    step = Step.of(agent, guide=same_team, samples=examples("a", "b"))
    teams = [
        [run.output.team for run in await step.evaluate({"instructions": f"Answer {word}"}, step.samples)]
        for word in ("one", "two")
    ]
    assert teams == [["one", "one"], ["two", "two"]]
    assert trained.signature.instructions == "Answer sales"


class Helper:
    """An object that a program uses: it cannot be copied, and counts its calls."""

    def __init__(self) -> None:
        self.lock, self.asked = threading.Lock(), 0

    def search(self, query: str) -> str:
        """Search for a query."""
        with self.lock:
            self.asked += 1
        return query


@pytest.mark.usefixtures("engine")
async def test_a_copys_methods_are_its_own_and_its_objects_are_shared() -> None:
    class Uses(dspy.Module):  # type: ignore[misc] # not typed
        def __init__(self, helper: Helper) -> None:
            super().__init__()
            self.route, self.helper, self.index = program(), {"one": helper}, bytearray(8)
            self.tools = [dspy.Tool(helper.search), dspy.Tool(self.own)]

        def own(self, ticket: str) -> str:
            return str(self.route(ticket=ticket).team)

        def forward(self, ticket: str) -> Any:
            assert self.helper["one"].search(ticket) == self.tools[0](query=ticket)
            return dspy.Prediction(team=self.tools[1](ticket=ticket))

    helper = Helper()
    agent = trainable(Uses(helper))
    assert agent.isolation == "copy"
    teams = [run.output.team for run in await evaluate(agent, examples("a"), **{"route.instructions": "Answer one"})]
    assert (teams, helper.asked) == (["one"], 2)


@pytest.mark.usefixtures("engine")
async def test_a_program_that_cannot_be_copied_runs_one_rollout_at_a_time() -> None:
    class Whole(dspy.Module):  # type: ignore[misc] # not typed
        def __init__(self) -> None:
            super().__init__()
            self.route = program()

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def forward(self, ticket: str) -> Any:
            return self.route(ticket=ticket)

    whole = Whole()
    with pytest.warns(TrainingWarning, match="cannot be copied as a whole, so rollouts run one after the other"):
        agent = as_agent(whole)
    assert (agent.isolation, agent.max_concurrency) == ("serial", 1)
    (name,) = [parameter.name for parameter in agent.parameters()]
    assert [run.output.team for run in await evaluate(agent, examples("a"), **{name: "Answer one"})] == ["one"]
    assert whole.route.signature.instructions == "Answer sales"


def test_frozen_modules_are_not_trained() -> None:
    class Two(dspy.Module):  # type: ignore[misc] # not typed
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = dspy.ChainOfThought("a -> b"), dspy.ChainOfThought("b -> c")
            self.first._compiled = True

    two = Two()
    assert [parameter.name for parameter in trainable(two).parameters()] == ["second.predict.instructions"]
    two.second._compiled = True
    with pytest.raises(ConfigError, match="got predictors of compiled modules only"):
        trainable(two)


@pytest.mark.usefixtures("engine")
async def test_a_number_in_a_module_is_trained_with_the_texts() -> None:
    class Several(dspy.Module):  # type: ignore[misc] # not typed
        def __init__(self) -> None:
            super().__init__()
            self.times, self.route = ParameterNode(1), program()

        def forward(self, ticket: str) -> Any:
            return dspy.Prediction(team=self.route(ticket=ticket).team * self.times.data)

    agent = trainable(Several())
    assert [parameter.name for parameter in agent.parameters()] == ["route.instructions", "times"]
    (run,) = await evaluate(agent, examples("a"), times=3)
    assert run.output.team == "salessalessales"


async def test_the_cache_of_dspy_hides_no_call(engine: Engine) -> None:
    """Rollouts with the same request are separate calls."""
    agent = trainable(program())
    for _ in range(2):
        await roll_out(agent, {"ticket": "the same"})
    assert engine.asked == 2


async def test_a_reply_that_cannot_be_parsed_is_feedback() -> None:
    with dspy.context(lm=dspy.LM("scripted/x", engine=Engine(says="no fields")), adapter=dspy.JSONAdapter()):
        run = await roll_out(trainable(program()), {"ticket": "x"}, min_score=0.0)
    assert run.failure is not None
    assert (run.failure.error, run.failure.infrastructure, run.failure.where) == ("AgentReplyError", False, "")
    assert run.score == 0.0
    assert "no fields" in run.feedback
    assert "team" in run.feedback


@pytest.mark.parametrize("name", ["RateLimitError", "TransportError", "ServerError", "TimeoutError"])
async def test_a_lost_call_is_not_feedback(name: str) -> None:
    error = getattr(dspy.lm15, name)("too many")
    with dspy.context(lm=dspy.LM("scripted/x", engine=Engine(fails=error), num_retries=0)):
        run = await roll_out(trainable(program()), {"ticket": "x"})
    assert run.failure is not None
    assert run.failure.infrastructure
    assert run.feedback == ""


async def test_errors_of_a_key_and_of_our_own_engine_end_the_run() -> None:
    for error, expected in ((dspy.lm15.AuthError("bad key"), AuthenticationError), (ConfigError("mine"), ConfigError)):
        lm = dspy.LM("scripted/x", engine=Engine(fails=error), num_retries=0)
        with dspy.context(lm=lm), pytest.raises(expected):
            await roll_out(trainable(program()), {"ticket": "x"})


async def test_an_engine_that_hides_our_error_of_a_lost_call_loses_it() -> None:
    """DSPy wraps the RateLimitError of its engine; it is still an infrastructure failure."""
    with dspy.context(lm=dspy.LM("scripted/x", engine=Engine(fails=RateLimitError("429")), num_retries=0)):
        run = await roll_out(trainable(program()), {"ticket": "x"})
    assert run.failure is not None
    assert (run.failure.error, run.failure.infrastructure) == ("RateLimitError", True)


async def test_without_a_model_the_run_ends_at_once() -> None:
    with pytest.raises(ConfigError, match=r"dspy\.configure\(lm="):
        await roll_out(trainable(program()), {"ticket": "x"})


async def test_the_transcript_shows_predictors_tools_and_calls_once(engine: Engine) -> None:
    run = await roll_out(trainable(program(), output="team"), {"ticket": "my parcel"})
    assert run.output == "sales"
    assert run.transcript.startswith('Predict\n  ticket: "my parcel"\n  LLM call\n    system: |')
    assert run.transcript.count("LLM call") == engine.asked == 1
    assert run.transcript.rstrip().endswith('returned: {"team": "sales"}')


async def test_async_programs_are_awaited() -> None:
    class Async(dspy.Module):  # type: ignore[misc] # not typed
        def __init__(self) -> None:
            super().__init__()
            self.route = program()

        async def aforward(self, ticket: str) -> Any:
            return dspy.Prediction(team=f"{ticket} {self.route.signature.instructions}")

    with dspy.context(lm=dspy.LM("scripted/x", engine=Engine())):
        run = await roll_out(trainable(Async()), {"ticket": "t"})
    assert run.output.team == "t Answer sales"


def test_examples_are_data() -> None:
    """`x` are the inputs, `info` is the Example; one that names no inputs is refused with the remedy."""
    (one,) = samples(examples("billing"))
    assert (one.x, one.info.team) == ({"ticket": "ticket 0"}, "billing")
    with pytest.raises(ConfigError, match=r"train_dataset\[0\]; call example.with_inputs"):
        samples([dspy.Example(ticket="t", team="x")])


async def test_exact_match_compares_one_field_and_refuses_whole_predictions() -> None:
    prediction, (example,) = dspy.Prediction(team="billing"), examples("billing")
    assert ExactMatch(key="team")("x", prediction, example)[0] == 1.0
    assert ExactMatch(key="team")("x", "sales", example)[0] == 0.0
    for output, info in ((prediction, example), ("billing", example), (prediction, "billing")):
        with pytest.raises(GuideError, match=r"ExactMatch\(key="):
            exact_match("x", output, info)


def test_examples_and_predictions_are_shown_as_their_fields() -> None:
    (example,) = examples("billing")
    assert show([example]) == '[{"ticket": "ticket 0", "team": "billing"}]'
    assert as_text(dspy.Prediction(team="billing")) == '{"team":"billing"}'


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("x", [{"ticket": "t", "team": "label"}, "t"])
async def test_rows_and_single_inputs_fill_the_programs_arguments(x: Any) -> None:
    run = await roll_out(trainable(program()), x)
    assert run.failure is None
    assert "label" not in run.transcript


@pytest.mark.parametrize(
    "function", [same_team, lambda gold, prediction, trace, name, inner: same_team(gold, prediction)]
)
async def test_a_metric_of_dspy_is_a_guide(function: Any, engine: Engine) -> None:
    agent = trainable(program())
    step = Step.of(agent, guide=function, samples=examples("billing"))
    (run,) = await step.evaluate({}, step.samples)
    assert (run.score, run.feedback) == (0.0, "Expected: billing")


class Judge(dspy.Module):  # type: ignore[misc] # not typed
    """A metric that is a module, like dspy.evaluate.SemanticF1."""

    def forward(self, example: Any, pred: Any, trace: Any = None) -> Any:
        """Return a score."""
        return float(example.team == pred.team)


class Stricter(Judge):
    """It inherits its judgement."""


@pytest.mark.parametrize(
    "given",
    [Judge(), Stricter(), partial(dspy.evaluate.answer_exact_match, frac=1.0), same_team, Judge().forward],
    ids=["module", "subclass", "partial", "function", "method"],
)
def test_metrics_of_every_form_are_recognised(given: Any) -> None:
    assert isinstance(as_guide(given), Metric)


def test_guides_are_left_as_they_are() -> None:
    """Only DSPy's metrics are wrapped."""
    for guide in (exact_match, lambda x, output, info: 1.0, partial(lambda a, x, output, info: 1.0, 1), print):
        assert as_guide(guide) is guide


def test_a_metric_of_two_arguments_and_a_module_become_guides() -> None:
    guide = metric(lambda gold, prediction: gold.team == prediction.team)
    assert guide("x", dspy.Prediction(team="a"), examples("a")[0]) is True
    assert guide("x", dspy.Prediction(team="a"), {"team": "a"}) is True  # a row with named columns
    scored = metric(lambda gold, prediction: dspy.Prediction(score=1.0, objective_scores={"cost": 2.0}))
    assert dict(scored("x", None, None).named) == {"cost": 2.0}


@pytest.mark.parametrize("train", ["instructions", [], ["instruction"]])
def test_an_unknown_part_is_refused(train: Any) -> None:
    with pytest.raises(ConfigError, match="Expected train to be a list of instructions, fields, demos"):
        trainable(program(), train=train)


def test_an_unknown_output_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="Expected output to be one of the fields 'team', got 'tema'"):
        trainable(program(), output="tema")


def test_a_program_is_trained_and_the_values_fit_another_one(engine: Engine, tmp_path: Path) -> None:
    class Always:
        """Proposes what the feedback asks for."""

        async def propose(self, rollouts: Any, step: Step) -> Proposal:
            (rollout,) = rollouts
            return Proposal(values={"instructions": f"Answer {rollout.feedback.split()[-1]}"}, support=1)

    trained = program()
    agent = trainable(trained)
    trainer = AggregatedUpdate(agent, Always(), llm=_NoModel())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        result = trainer.train(same_team, examples("billing", "billing"), batch_size=2, run_dir=tmp_path / "run")
    assert trained.signature.instructions == "Answer billing"
    assert result.parameters == {"instructions": "Answer billing"}
    other = program()
    agent.apply(other)
    assert other.signature.instructions == "Answer billing"
    with agent.applied({"instructions": "Answer one"}) as placed:
        assert placed(ticket="t").team == "one"
    assert engine.asked > 0


class _NoModel:
    """A model that is never called: all proposals agree."""

    async def complete(self, *messages: Any, **options: Any) -> Any:
        raise AssertionError("nothing to merge")
