"""Events: silent until configured, then lines for people or JSON for machines."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

import aggregator
from aggregator.errors import ConfigError
from aggregator.observing.configuring import Events, configure_logging, emit, events_file
from aggregator.records import Decision, Evaluation, RunInfo, StepReport, TrainingResult, Usage

REPORT = StepReport(
    epoch=1,
    step=7,
    sample_ids=(3, 5),
    scores=(1.0, 0.0),
    score=0.5,
    decision=Decision(accepted=True, reason="always"),
    update={"k": 3},
    proposals=1,
    usage={"agent": Usage(input_tokens=10, output_tokens=2, calls=2), "optimizer": Usage(calls=1)},
)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    logger = logging.getLogger("aggregator")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    for handler in set(logger.handlers) - set(handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level)
    logger.propagate = propagate
    structlog.reset_defaults()


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_silent_until_configured() -> None:
    """In a fresh process events print nothing, neither on standard output nor on standard error."""
    script = (
        "import structlog; from aggregator.observing.configuring import emit;"
        "from aggregator.llm.tracing import listening; emit('train.step', epoch=0); assert not listening()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_json_lines() -> None:
    """A step is one JSON object with its data, its level and an ISO time."""
    stream = io.StringIO()
    configure_logging("json", stream=stream)
    Events().step(REPORT)
    (event,) = lines(stream.getvalue())
    assert list(event)[:3] == ["timestamp", "level", "event"]  # what a reader looks for comes first
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "train.step",
        "level": "info",
        "epoch": 1,
        "step": 7,
        "score": 0.5,
        "test_score": None,
        "validation_score": None,
        "samples": 2,
        "proposals": 1,
        "failures": 0,
        "accepted": True,
        "reason": "always",
        "changed": ["k"],
        "calls": 3,
        "tokens": 12,
        "cost": None,
    }


def test_a_run_has_events_for_its_start_and_end() -> None:
    """The baseline, the end and the error that ends a run are events, as the steps are."""
    stream = io.StringIO()
    configure_logging("json", stream=stream)
    events = Events()
    events.started(
        RunInfo(
            trainer="Minibatch",
            agent="Adder",
            optimizer="LLMOptimizer",
            guide="exact",
            parameters={"k": 1},
            seed=3,
            steps=1,
            num_epochs=1,
            batch_size=1,
            train_samples=1,
        )
    )
    events.evaluation(Evaluation(step=0, score=0.25, scores=(0.25,), usage={"agent": Usage(calls=4, cost=0.5)}))
    events.finished(TrainingResult(parameters={}, best_parameters={}, initial_parameters={}, history=[REPORT]))
    events.failed(ConfigError("Expected a guide"))
    started, baseline, finished, failed = lines(stream.getvalue())
    assert (started["event"], started["agent"], started["parameters"]) == ("train.started", "Adder", {"k": 1})
    assert (baseline["event"], baseline["score"], baseline["calls"], baseline["cost"]) == (
        "train.evaluation",
        0.25,
        4,
        0.5,
    )
    assert (finished["event"], finished["steps"], finished["test_score"]) == ("train.finished", 1, None)
    assert (failed["event"], failed["error"], failed["message"]) == ("train.failed", "ConfigError", "Expected a guide")


def test_the_clients_events_are_logged_too() -> None:
    """The client's events have its logger's name, and the application's context variables."""
    from aggregator.llm import tracing

    stream = io.StringIO()
    configure_logging("json", stream=stream)
    assert tracing.listening()
    with structlog.contextvars.bound_contextvars(run="r1"):
        tracing.event("llm.call", model="m", error=None)
    (event,) = lines(stream.getvalue())
    assert (event["event"], event["model"], event["run"]) == ("llm.call", "m", "r1")


def test_console_lines_have_no_escape_codes_in_a_pipe() -> None:
    """For a stream that is not a terminal a console line is plain text."""
    stream = io.StringIO()
    configure_logging(stream=stream)
    emit("train.step", epoch=2)
    assert "train.step" in stream.getvalue()
    assert "epoch=2" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_configuring_again_replaces() -> None:
    """The second call replaces the destination; events are not written twice."""
    first, second = io.StringIO(), io.StringIO()
    configure_logging("json", stream=first)
    configure_logging("json", stream=second)
    emit("train.step")
    assert (first.getvalue(), len(lines(second.getvalue()))) == ("", 1)


def test_level_filters() -> None:
    """Events below the level are left out."""
    stream = io.StringIO()
    configure_logging("json", level="ERROR", stream=stream)
    emit("train.step")
    assert stream.getvalue() == ""


def test_a_path_is_appended_to(tmp_path: Path) -> None:
    """Its folders are created."""
    for _ in range(2):
        configure_logging("json", path=tmp_path / "deep" / "log.jsonl")
        emit("train.step")
    assert len(lines((tmp_path / "deep" / "log.jsonl").read_text())) == 2


def test_events_file_holds_the_block(tmp_path: Path) -> None:
    """Only events inside the block are in the file, and nothing stays configured after it."""
    with events_file(tmp_path / "events.jsonl"):
        emit("inside")
    emit("outside")
    assert [event["event"] for event in lines((tmp_path / "events.jsonl").read_text())] == ["inside"]
    assert not structlog.is_configured()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "xml"}, "'console' or 'json', got 'xml'"),
        ({"level": "LOUD"}, "got level='LOUD'"),
        ({"stream": io.StringIO(), "path": "x"}, "got both"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    """The error says what was expected, and nothing is configured."""
    with pytest.raises(ConfigError, match=message):
        configure_logging(**arguments)
    assert not structlog.is_configured()


def test_unwritable_path(tmp_path: Path) -> None:
    """A path that cannot be written raises an AggregatorError."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can be written"):
        configure_logging(path=tmp_path / "file" / "log")


def test_configure_logging_is_public() -> None:
    """The name is exported by the package."""
    assert aggregator.configure_logging is configure_logging
