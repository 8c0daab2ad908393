"""What observers see of a run: every event in order, and what happens if one of them raises."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, first_suggestion, from_feedback, suggest

from aggregator import (
    AggregatedUpdate,
    ConfigError,
    LLMOptimizer,
    MinibatchAlgorithm,
    PrioritySearch,
    StepReport,
    TrainingError,
)
from aggregator.errors import AuthenticationError, TrainingWarning
from aggregator.observing.observer import EVENTS, Observer
from aggregator.records import Evaluation, FullStepReport, RunInfo, TrainingResult, Usage
from aggregator.training.checkpoints import load_result

DATA = additions(5)


class Diary(Observer):
    """Records every event."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        for event in EVENTS:
            setattr(self, event, lambda record, event=event: self.seen.append((event, record)))

    def of(self, event: str) -> list[Any]:
        return [record for name, record in self.seen if name == event]


class Ahead(AggregatedUpdate):
    """Overrides `forward` and runs the agent through the library."""

    async def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
        return await super().aforward(agent, x, guide, info, verbose)


class Alone(AggregatedUpdate):
    """Overrides `forward` and runs the agent by itself."""

    async def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
        return {"amount": 5}, guide(x, await agent(x), info)[0]


def scripted(*replies: Any, **options: Any) -> Any:
    optimizer = LLMOptimizer(llm=ScriptedModel(*(replies or (from_feedback,))))
    return AggregatedUpdate(Adder(), optimizer, llm=ScriptedModel(first_suggestion), **options)


def test_events_of_a_run_in_order() -> None:
    """The baseline comes before the first step, the test score before its step."""
    diary = Diary()
    result = scripted(observers=[diary]).train(exact, DATA, batch_size=2, test_dataset=DATA)
    assert [event for event, _ in diary.seen if event != "rollout"] == [
        "started",
        "evaluation",
        "evaluation",
        "step",
        "evaluation",
        "step",
        "finished",
    ]
    assert diary.of("finished") == [result]
    assert diary.of("evaluation") == list(result.evaluations)
    assert [report.slim() for report in diary.of("step")] == list(result.history)


def test_validation_scores_did_not_reach_observers() -> None:
    """Neither the baseline nor later ones reached them; loggers got none either."""
    diary, lines = Diary(), Lines()
    result = scripted(observers=[diary, lines]).train(exact, DATA, batch_size=2, validate_dataset=additions(5, 2))
    assert diary.of("validation") == list(result.validations)
    assert [one.step for one in result.validations] == [0, 1, 2]
    events = [event for event, _ in diary.seen if event in ("validation", "step")]
    assert events == ["validation", "validation", "step", "validation", "step"]
    assert [(name, data) for name, data, _ in lines.logged if "validation" in name] == [
        ("Average validation score before training", 0.0),
        ("Average validation score", 1.0),
        ("Average validation score", 1.0),
    ]


class Lines:
    """A logger in Trace's shape."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, Any, int]] = []

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        self.logged.append((name, data, step))


def test_observers_get_the_plan_of_a_run() -> None:
    """They get names, counts, seed and initial parameters; of a resumed run also its finished steps."""
    diary = Diary()
    trainer = scripted(observers=[diary], seed=7)
    trainer.train(exact, DATA, batch_size=3, num_epochs=2, test_dataset=additions(5, 3))
    assert diary.of("started") == [
        RunInfo(
            trainer="AggregatedUpdate",
            agent="Adder",
            optimizer="LLMOptimizer",
            guide="exact",
            rule="LLMMerge",
            gate="always",
            parameters={"amount": 1, "label": "sum"},
            seed=7,
            steps=4,
            num_epochs=2,
            batch_size=3,
            train_samples=4,
            test_samples=3,
        )
    ]


def test_a_resumed_run_reports_its_finished_steps(tmp_path: Path) -> None:
    """They get the steps and their calls; the baseline is not evaluated again."""

    def stop(report: StepReport) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scripted(observers=[stop]).train(exact, DATA, batch_size=2, test_dataset=DATA, run_dir=tmp_path)
    diary = Diary()
    scripted(observers=[diary]).train(exact, DATA, batch_size=2, test_dataset=DATA, run_dir=tmp_path, resume=True)
    (info,) = diary.of("started")
    assert (info.finished_steps, info.steps, info.parameters["amount"]) == (1, 2, 5)
    assert info.usage["optimizer"].calls == 2
    assert [evaluation.step for evaluation in diary.of("evaluation")] == [2]


def test_a_step_shows_the_proposal_of_every_instance() -> None:
    """Each has its lineage in the recording; an instance that is right proposes nothing."""
    diary = Diary()
    scripted(observers=[diary]).train(exact, [*additions(5, 1), *additions(1, 1)], batch_size=2)
    (report,) = diary.of("step")
    assert isinstance(report, FullStepReport)
    seen = {proposal.sample_id: proposal.values for proposal in report.all_proposals}
    assert seen == {0: {"amount": 5}, 1: {}}
    assert report.lineages == tuple(f"train/epoch=0/batch=0/sample={i}" for i in report.sample_ids)
    assert [proposal.sample_id for proposal in report.all_proposals] == list(report.sample_ids)
    assert report.proposals == 1


def test_a_search_shows_its_candidates_separately() -> None:
    """The lineage names the candidate that an instance was run with."""
    diary = Diary()
    optimizer = LLMOptimizer(llm=ScriptedModel(*[suggest(amount=amount) for amount in range(2, 50)]))
    search = PrioritySearch(Adder(), optimizer, observers=[diary], num_candidates=2, num_proposals=2)
    search.train(exact, DATA, batch_size=2, num_epochs=2)
    last = diary.of("step")[-1]
    assert len(last.all_proposals) == len(last.lineages) == len(set(last.lineages)) > len(last.sample_ids)


def test_result_history_and_checkpoint_hold_slim_reports(tmp_path: Path) -> None:
    """Their size does not depend on what the agent and the models wrote."""

    class Talkative(Adder):
        async def forward(self, x: int) -> Any:
            return (await super().forward(x), "word " * 20_000)

    def guide(x: int, output: Any, info: int) -> tuple[float, str]:
        return exact(x, output[0], info)

    diary = Diary()
    optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
    trainer = AggregatedUpdate(Talkative(), optimizer, llm=ScriptedModel(first_suggestion), observers=[diary])
    result = trainer.train(guide, additions(5, 20), batch_size=2, run_dir=tmp_path)
    assert {type(report) for report in result.history} == {StepReport}
    assert list(load_result(tmp_path / "result.json").history) == list(result.history)
    assert (tmp_path / "checkpoint.json").stat().st_size / len(result.history) < 2_000


def test_outputs_are_freed_once_their_step_is_reported() -> None:
    """Neither history nor the loop keeps rollouts: memory does not grow with the steps."""
    alive: WeakSet[Any] = WeakSet()

    class Output:
        def __init__(self, value: int) -> None:
            self.value = value
            alive.add(self)

    class Wordy(Adder):
        async def forward(self, x: int) -> Any:
            return Output(await super().forward(x))

    def guide(x: int, output: Any, info: int) -> tuple[float, str]:
        return exact(x, output.value, info)

    counted: list[int] = []

    def count(report: StepReport) -> None:
        gc.collect()
        counted.append(len(alive))

    optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
    trainer = AggregatedUpdate(Wordy(), optimizer, llm=ScriptedModel(first_suggestion), observers=[count])
    trainer.train(guide, additions(5, 20), batch_size=2, test_dataset=additions(5, 4), eval_frequency=1)
    assert len(counted) == 10
    assert max(counted) <= 2 * 2 + 4


def test_eval_frequency_0_silenced_the_logger(capsys: pytest.CaptureFixture[str]) -> None:
    """No test set is evaluated, but every step is logged; `log_frequency=0` logs nothing."""
    for options, lines in (({}, 2), ({"log_frequency": 2}, 1), ({"log_frequency": 0}, 0)):
        scripted().train(exact, DATA, batch_size=2, eval_frequency=0, verbose=True, **options)
        assert capsys.readouterr().out.count("Average train score") == lines


def test_refusals_and_the_baseline_were_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """`verbose=True` shows why an update was refused, and the score before training."""

    async def never(before: Any, after: Any, step: Any) -> Any:
        from aggregator import Decision

        return Decision(accepted=False, reason="never")

    scripted(gate=never).train(exact, DATA, batch_size=4, test_dataset=DATA, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[step 0] Average test score before training: 0"
    assert "[step 0] Update refused: never" in lines


def test_failures_were_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """Their number and the first of them are logged."""

    class Fails(Adder):
        async def forward(self, x: int) -> int:
            raise KeyError("amount")

    trainer = AggregatedUpdate(Fails(), LLMOptimizer(llm=ScriptedModel("TERMINATE")), llm=ScriptedModel(""))
    with pytest.warns(TrainingWarning, match="failed 3 times with KeyError"):
        trainer.train(exact, DATA[:3], batch_size=3, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert "[step 0] Failures: 3" in lines
    assert any(line.startswith("[step 0] First failure: agent, sample ") for line in lines)


def test_every_rollout_is_seen_as_it_ends() -> None:
    """This includes evaluations; each has its lineage, and a step's report lists its own in sample order."""
    diary = Diary()
    scripted(observers=[diary]).train(exact, DATA, batch_size=4, test_dataset=additions(5, 2))
    (report,) = diary.of("step")
    seen = {rollout.lineage: rollout for rollout in diary.of("rollout")}
    assert len(seen) == len(diary.of("rollout")) == 2 + 4 + 2
    assert [(rollout.sample_id, rollout.output) for rollout in report.rollouts] == [
        (i, i + 1) for i in report.sample_ids
    ]
    assert [seen[place].output for place in report.lineages] == [rollout.output for rollout in report.rollouts]
    assert {rollout.score for place, rollout in seen.items() if "evaluate" in place} == {0.0, 1.0}


@pytest.mark.parametrize("trainer", [Ahead, Alone])
def test_rollouts_of_an_overridden_forward(trainer: Any) -> None:
    """Rollouts made by `super().forward` are seen; without it the report has the scores only."""
    diary = Diary()
    optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
    trainer(Adder(), optimizer, llm=ScriptedModel(first_suggestion), observers=[diary]).train(exact, DATA, batch_size=4)
    (report,) = diary.of("step")
    outputs = [1, 2, 3, 4] if trainer is Ahead else []
    assert sorted(rollout.output for rollout in diary.of("rollout")) == outputs
    assert [rollout.sample_id for rollout in report.rollouts] == list(report.sample_ids)
    assert sorted(rollout.output for rollout in report.rollouts if rollout.output is not None) == outputs


@pytest.mark.parametrize("trainer", [AggregatedUpdate, MinibatchAlgorithm, Ahead])
@pytest.mark.parametrize("event", ["started", "rollout", "evaluation", "step", "finished"])
def test_an_observer_that_raises_ends_the_run(event: str, trainer: Any, tmp_path: Path) -> None:
    """`train` raises its error with its name; every finished step is on disk, and the other observers are finished."""

    class Breaks(Observer):
        pass

    def fail(record: Any) -> None:
        raise ZeroDivisionError(event)

    breaks, diary = Breaks(), Diary()
    setattr(breaks, event, fail)
    options = {} if trainer is MinibatchAlgorithm else {"llm": ScriptedModel(first_suggestion)}
    made = trainer(Adder(), LLMOptimizer(llm=ScriptedModel(from_feedback)), observers=[diary, breaks], **options)
    with pytest.raises(ZeroDivisionError) as error:
        made.train(exact, DATA, test_dataset=DATA if event == "evaluation" else None, run_dir=tmp_path)
    assert error.value.__notes__ == [f"raised in {event}() of the observer Breaks()"]
    assert len(load_result(tmp_path / "result.json").history) == len(diary.of("step"))
    assert diary.of("failed") == ([] if event == "finished" else [error.value])


def test_the_error_that_ends_a_run_reaches_every_observer() -> None:
    """For a lost key, say, observers get the error with the partial result, instead of `finished`."""

    def rejected(messages: Any) -> str:
        raise AuthenticationError("401: no such key")

    diary = Diary()
    with pytest.raises(TrainingError):
        scripted(rejected, observers=[diary]).train(exact, DATA)
    (error,) = diary.of("failed")
    assert isinstance(error, TrainingError)
    assert isinstance(error.result, TrainingResult)
    assert diary.of("finished") == []


def test_an_interrupted_run_ends_for_its_observers() -> None:
    """This includes Ctrl-C: the progress bar must end its line."""
    diary = Diary()

    def interrupt(report: StepReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scripted(observers=[diary, interrupt]).train(exact, DATA)
    assert [type(error) for error in diary.of("failed")] == [KeyboardInterrupt]


def test_observers_may_be_set_after_construction() -> None:
    """They are read when a run starts."""
    trainer, diary = scripted(observers=[]), Diary()
    trainer.observers = [diary]
    trainer.train(exact, DATA, batch_size=4)
    assert len(diary.of("step")) == 1


@pytest.mark.parametrize("observers", [[Diary], [Evaluation], "print"])
def test_an_invalid_observer_is_refused_at_construction(observers: Any) -> None:
    """No call is made."""
    with pytest.raises(ConfigError, match=r"Expected observers=\[\.\.\.\]"):
        scripted(observers=observers)


@pytest.mark.parametrize("make", [lambda seen: seen.append, lambda seen: type("S", (), {"step": seen.append})()])
def test_usage_and_cost_reach_observers(make: Callable[[Any], Any]) -> None:
    """Every form of observer gets them for each step, by role."""
    seen: list[StepReport] = []
    scripted(observers=[make(seen)]).train(exact, DATA, batch_size=4)
    assert seen[0].usage == {"optimizer": Usage(input_tokens=40, output_tokens=20, cost=0.4, calls=4)}
