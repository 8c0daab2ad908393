"""Loggers for experiment trackers, checked by reading back what they wrote."""

from __future__ import annotations

import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from aggregator.errors import ConfigError
from aggregator.observing.observer import TensorBoardLogger, WandbLogger, entry

needs_board = pytest.mark.skipif(find_spec("tensorboardX") is None, reason="the extra `tensorboard` is not installed")


def events(folder: Path) -> list[tuple[str, int, Any]]:
    """Return (tag, step, value) of every summary in a folder's event files, in order."""
    from tensorboardX.proto.event_pb2 import Event

    found: list[tuple[str, int, Any]] = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                text = value.tensor.string_val
                found.append((value.tag, event.step, text[0].decode() if text else value.simple_value))
    return found


@pytest.mark.requirement("Trace: Tensorboard logger")
@needs_board
def test_tensorboard_gets_numbers_as_scalars_and_the_rest_as_text(tmp_path: Path) -> None:
    """Scores are curves, parameters texts, lists JSON; an unknown score is no point."""
    with TensorBoardLogger(tmp_path / "board") as logger:
        logger.log("Average test score", 0.5, 0, color="green")
        logger.log("Average test score", None, 1, color="green")
        logger.log("Average test score", 0.75, 2, color="green")
        logger.log("Parameter: rule", "# Answer\n<b>sales</b>", 2, color="red")
        logger.log("Parameter: labels", ["a", "b"], 2)
        logger.log("Output", 7, 2, sample=3)
    assert events(tmp_path / "board") == [
        ("Average_test_score", 0, 0.5),
        ("Average_test_score", 2, 0.75),
        ("Parameter/rule/text_summary", 2, "    # Answer\n    <b>sales</b>\n"),
        ("Parameter/labels/text_summary", 2, '    ["a","b"]\n'),
        ("Output/sample_3", 2, 7.0),
    ]


@pytest.mark.requirement("Trace: Tensorboard logger")
@needs_board
def test_a_run_logs_to_tensorboard(tmp_path: Path) -> None:
    """As the trainer's logger it records the run, the baseline, train score, test score and each step's changes."""
    script = f"""
import json
from aggregator import AggregatedUpdate, LLMOptimizer, Module, ParameterNode
from aggregator.observing import TensorBoardLogger
from aggregator.records import Choice, Completion, Message

class Adder(Module):
    def __init__(self):
        self.amount = ParameterNode(1)
    def forward(self, x):
        return x + self.amount.data

class Five:
    async def complete(self, *messages, **options):
        return Completion(choices=(Choice(message=Message(content=json.dumps({{"suggestion": {{"amount": 5}}}}))),))

def guide(x, output, info):
    return float(output == info), "expected " + str(info)

with TensorBoardLogger({str(tmp_path)!r}) as logger:
    trainer = AggregatedUpdate(Adder(), LLMOptimizer(llm=Five()), logger=logger, llm=Five())
    trainer.train(guide, [(0, 5), (1, 6)], num_epochs=1, batch_size=2, test_dataset=[(2, 7)])
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
    (run, *seen) = events(tmp_path)
    assert run[:2] == ("Run/text_summary", 0)
    assert '"agent":"Adder"' in run[2]
    assert seen == [
        ("Average_test_score_before_training", 0, 0.0),
        ("Average_train_score", 0, 0.0),
        ("Average_test_score", 0, 1.0),
        ("Parameter/amount", 0, 5.0),
        ("Calls_so_far", 0, 0.0),
    ]


class Writer:
    """A SummaryWriter that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def add_scalar(self, *facts: Any) -> None:
        self.calls.append(facts)

    def flush(self) -> None:
        self.calls.append(("flushed",))


def test_a_given_writer_is_flushed_and_stays_open() -> None:
    """For example torch's SummaryWriter, which others write to as well."""
    with TensorBoardLogger(writer=(writer := Writer())) as logger:
        logger.log("loss", 2, 4)
    assert writer.calls == [("loss", 2.0, 4), ("flushed",)]


class Run:
    """A W&B run that records its calls."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []

    def log(self, data: dict[str, Any], step: int) -> None:
        self.logged.append((data, step))


@pytest.mark.requirement("Trace: Wandb logger")
def test_wandb_gets_numbers_and_texts_with_their_step() -> None:
    """A dict is sent as text: W&B would make a key of each of its keys."""
    logger = WandbLogger(run := Run())
    for data in (0.5, None, True, "Answer.", {"k": 1}):
        logger.log("Parameter: x", data, 3, color="red")
    assert run.logged == [({"Parameter/x": value}, 3) for value in (0.5, 1.0, "Answer.", '{"k":1}')]


@pytest.mark.requirement("Trace: Wandb logger")
def test_the_real_wandb_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, without an account; the summary holds the latest values."""
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(project="router", dir=tmp_path) as run:
        logger = WandbLogger()
        assert logger.run is run
        logger.log("Average test score", 0.5, 0)
        logger.log("Average test score", 0.75, 1)
        logger.log("Parameter: rule", "Answer.", 1)
        logger.log("Average test score", 1.0, 2)  # W&B sends a step when the next one begins
        summary = dict(run.summary)
    assert (summary["Average_test_score"], summary["Parameter/rule"]) == (0.75, "Answer.")


@pytest.mark.parametrize("number", [10**400, float("inf")])
def test_numbers_beyond_a_float_do_not_end_a_run(number: float) -> None:
    """They are logged as text, or rounded to a float."""
    assert entry("x", number)[1] in (str(10**400), float("inf"))


@pytest.mark.parametrize(("log_dir", "writer"), [(None, None), ("runs/x", Writer())])
def test_tensorboard_needs_either_a_folder_or_a_writer(log_dir: Any, writer: Any) -> None:
    """Neither, or both, is invalid."""
    with pytest.raises(ConfigError, match="Expected a log_dir or a writer"):
        TensorBoardLogger(log_dir, writer=writer)


def test_an_invalid_run_is_refused() -> None:
    """For example the project's name instead of a run."""
    with pytest.raises(ConfigError, match=r"as wandb.init\(project=...\) returns it, got 'router'"):
        WandbLogger("router")


@pytest.mark.parametrize(("module", "use"), [("tensorboardX", "TensorBoardLogger('x')"), ("wandb", "WandbLogger()")])
def test_a_missing_tracker_names_its_extra(module: str, use: str) -> None:
    """Trackers are optional, and the error gives the command to install one."""
    script = f"import sys; sys.modules[{module!r}] = None; import aggregator; aggregator.{use}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert f"pip install 'aggregated-update[{module.lower().rstrip('x')}]'" in ended.stderr
