"""A run that was cut off continues, and ends like an unbroken one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, exact, first_suggestion, from_feedback

from aggregator.errors import ConfigError, TrainingError
from aggregator.training.algorithms import AggregatedUpdate
from aggregator.training.proposers import LLMOptimizer

DATA = [(i, i + 2 + i % 3) for i in range(12)]


class Searching(AggregatedUpdate):
    """Another trainer, which would continue from a foreign run's steps."""


class Cut(BaseException):
    """Simulates a kill: nothing in the library catches it."""


def run(run_dir: Path, *, cut_at: int | None = None, resume: bool = False, **options: Any) -> tuple[bytes, int]:
    """Train and raise Cut at the given call of the optimizer. Return result.json and the number of calls."""
    calls = 0

    def optimizer(messages: list[dict[str, Any]]) -> str:
        nonlocal calls
        calls += 1
        if calls == cut_at:
            raise Cut
        return from_feedback(messages)

    agent = options.pop("agent", None) or Adder()
    kind = options.pop("trainer", AggregatedUpdate)
    trainer = kind(agent, LLMOptimizer(llm=ScriptedModel(optimizer)), llm=ScriptedModel(first_suggestion))
    arguments = {"batch_size": 3, "num_epochs": 2, "test_dataset": DATA[:4], "eval_frequency": 2, **options}
    data = arguments.pop("data", DATA)
    trainer.train(exact, data, run_dir=run_dir, resume=resume, max_concurrency=1, **arguments)
    return (run_dir / "result.json").read_bytes(), calls


@pytest.mark.requirement("Trace: checkpoints", "Trace's defect 11: agents with operations could not be saved")
@pytest.mark.parametrize("cut_at", [1, 2, 4, 11, 12, 24])
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, cut_at: int) -> None:
    """Wherever it was cut off, the resumed run's result.json equals that of an unbroken one byte for byte."""
    whole, calls = run(tmp_path / "whole")
    with pytest.raises(Cut):
        run(tmp_path / "cut", cut_at=cut_at)
    resumed, more = run(tmp_path / "cut", resume=True)
    assert resumed == whole
    assert more <= calls


def test_finished_steps_are_not_paid_for_again(tmp_path: Path) -> None:
    """After a cut in the last of eight steps only that step's calls are repeated."""
    with pytest.raises(Cut):
        run(tmp_path / "cut", cut_at=24)
    assert run(tmp_path / "cut", resume=True)[1] == 3


def test_a_finished_run_resumes_to_its_own_result(tmp_path: Path) -> None:
    """Nothing is left to do, nothing is called, and the result is the same."""
    whole, _ = run(tmp_path / "run")
    assert run(tmp_path / "run", resume=True) == (whole, 0)


def test_the_partial_result_is_on_disk(tmp_path: Path) -> None:
    """A run that was cut off leaves the result of its finished steps."""
    with pytest.raises(Cut):
        run(tmp_path / "cut", cut_at=7)
    partial = json.loads((tmp_path / "cut" / "result.json").read_bytes())
    assert len(partial["history"]) == 2


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"data": DATA[:-1]}, "train_dataset"),
        ({"test_dataset": DATA[:3]}, "test_dataset"),
        ({"seed": 5}, "seed"),
        ({"batch_size": 4}, "batch_size"),
        ({"stepsize": 0.25}, "stepsize"),
        ({"agent": Adder(9)}, "initial parameters"),
        ({"trainer": Searching}, "trainer"),
    ],
)
def test_a_changed_run_is_refused_with_the_difference(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    """Resuming with another data set, agent, trainer or seed is an error that names it."""
    with pytest.raises(Cut):
        run(tmp_path / "cut", cut_at=7)
    with pytest.raises(
        TrainingError, match=f"Expected what the run in .* was started with, got other values of .*{what}"
    ):
        run(tmp_path / "cut", resume=True, **changes)


def test_a_run_dir_is_not_overwritten(tmp_path: Path) -> None:
    """Without resume=True an existing run is not touched."""
    run(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already; give resume=True"):
        run(tmp_path / "run")


@pytest.mark.parametrize("damage", [b"", b"{", b'{"version": 1}', b"\xff\xfe"])
def test_a_damaged_checkpoint_is_an_error(tmp_path: Path, damage: bytes) -> None:
    """The TrainingError names the file and the remedy."""
    run(tmp_path / "run")
    (tmp_path / "run" / "checkpoint.json").write_bytes(damage)
    with pytest.raises(TrainingError, match="Expected a checkpoint of version 1.*cannot be read.*new run_dir"):
        run(tmp_path / "run", resume=True)


def test_a_checkpoint_of_another_version_was_accepted(tmp_path: Path) -> None:
    """Its fields may have another meaning, so it is refused."""
    run(tmp_path)
    path = tmp_path / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"version": 99}))
    with pytest.raises(TrainingError, match="Expected a checkpoint of version 1 in .*, got version 99; resume with"):
        run(tmp_path, resume=True)


@pytest.mark.requirement("Trace's defect 27: shuffle=False shuffled, by the global generator")
def test_the_global_random_generator_is_not_used(tmp_path: Path) -> None:
    """A run neither reads nor changes it."""
    random.seed(3)
    before = random.getstate()
    run(tmp_path / "run")
    assert random.getstate() == before
