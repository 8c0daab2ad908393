"""The destination of the library's events: a console for people, or JSON lines for machines.

structlog passes the events to the standard loggers "aggregator.llm" and "aggregator.training"; this file configures
handlers of their parent, "aggregator".
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from msgspec import to_builtins

from aggregator.errors import ConfigError
from aggregator.files import make_folder, open_file
from aggregator.llm.ledger import total
from aggregator.observing.observer import Observer, shows_colors
from aggregator.records import Evaluation, RunInfo, StepReport, TrainingResult, Usage

Format = Literal["console", "json"]

_MARK = "aggregator-configured"
_logger = logging.getLogger("aggregator")


def configure_logging(
    format: Format = "console",  # noqa: A002 - the word users look for
    *,
    level: int | str = "INFO",
    stream: TextIO | None = None,
    path: str | Path | None = None,
) -> None:
    """Show the library's events: as lines for people, or as one JSON object per line.

    They are written to `stream` (default: standard error), or appended to the file at `path`. A second call replaces
    the first configuration. An application that configures structlog itself gets the events without this call. Raises
    ConfigError for an invalid argument.
    """
    if stream is not None and path is not None:
        raise ConfigError(f"Expected a stream or a path, got both (path={str(path)!r}); give one of them")
    rendering = _formatter(format, colors=path is None and shows_colors(stream or sys.stderr))
    threshold = _level(level)
    handler = logging.StreamHandler(stream) if path is None else _file(path, mode="a")
    handler.setFormatter(rendering)
    handler.set_name(_MARK)
    for old in [old for old in _logger.handlers if old.get_name() == _MARK]:
        _logger.removeHandler(old)
        old.close()
    _logger.addHandler(handler)
    _logger.setLevel(threshold)
    _logger.propagate = False
    _route()


@contextmanager
def events_file(path: str | Path) -> Iterator[None]:
    """Write every event of the block to a new file of JSON lines, in addition to the configured destination."""
    import structlog

    handler = _file(path, mode="w")
    handler.setFormatter(_formatter("json"))
    configured, level, propagate = structlog.is_configured(), _logger.level, _logger.propagate
    _logger.addHandler(handler)
    if not configured:
        _logger.setLevel(logging.INFO)
        _logger.propagate = False
        _route()
    try:
        yield
    finally:
        if not configured:
            structlog.reset_defaults()
            _logger.setLevel(level)
            _logger.propagate = propagate
        _logger.removeHandler(handler)
        handler.close()


def _route() -> None:
    """Let structlog pass its events to the standard loggers, whose handlers format them."""
    import structlog

    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )


def _formatter(format: Format, *, colors: bool = False) -> logging.Formatter:  # noqa: A002 - the same word
    import structlog

    renderers: dict[str, Any] = {
        "console": structlog.dev.ConsoleRenderer(colors=colors),
        "json": structlog.processors.JSONRenderer(default=str),
    }
    if format not in renderers:
        raise ConfigError(f"Expected format 'console' or 'json', got {format!r}")
    clean = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    return structlog.stdlib.ProcessorFormatter(processors=[clean, _leading, renderers[format]])


def _leading(_: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Put the most important fields first."""
    first = {key: event[key] for key in ("timestamp", "level", "event") if key in event}
    return {**first, **event}


def _level(level: int | str) -> int:
    try:
        return logging.Handler(level).level
    except (ValueError, TypeError) as error:
        raise ConfigError(f"Expected a logging level such as 'INFO' or 20, got level={level!r}") from error


def _file(path: str | Path, *, mode: str) -> logging.FileHandler:
    target = Path(path)
    try:
        make_folder(target.parent)
        os.close(open_file(target, os.O_CREAT | os.O_WRONLY))
        return logging.FileHandler(target, mode=mode, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Expected a path that can be written, got {str(path)!r}: {error.strerror}") from error


LOGGER = "aggregator.training"


def is_configured() -> bool:
    """Return True if the application has configured structlog."""
    structlog = sys.modules.get("structlog")
    return structlog is not None and structlog.is_configured()


def emit(event: str, **facts: Any) -> None:
    """Log one event with its fields, if the application has configured structlog."""
    if is_configured():
        sys.modules["structlog"].get_logger(LOGGER).info(event, **facts)


class Events(Observer):
    """Logs an event for everything an observer sees except single rollouts: `train.step` and so on, flat records."""

    def started(self, info: RunInfo, /) -> None:
        """Log `train.started`."""
        if is_configured():
            emit("train.started", **to_builtins(info, enc_hook=repr))

    def evaluation(self, evaluation: Evaluation, /) -> None:
        """Log `train.evaluation`: the score of the test set after a number of steps."""
        _emit_scores("train.evaluation", evaluation)

    def validation(self, evaluation: Evaluation, /) -> None:
        """Log `train.validation`: the score of the validation set after a number of steps."""
        _emit_scores("train.validation", evaluation)

    def step(self, report: StepReport, /) -> None:
        """Log `train.step`: the step's facts without its texts."""
        if is_configured():
            emit("train.step", **step_facts(report))

    def finished(self, result: TrainingResult, /) -> None:
        """Log `train.finished`."""
        if not is_configured():
            return
        scores = result.test_scores
        facts = {"steps": len(result.history), "test_score": scores[-1] if scores else None, "stopped": result.stopped}
        emit("train.finished", **facts, failures=len(result.failures), **_spent(result.usage))

    def failed(self, error: BaseException, /) -> None:
        """Log `train.failed` with the error that ends the run."""
        emit("train.failed", error=type(error).__name__, message=str(error))


def _emit_scores(name: str, evaluation: Evaluation) -> None:
    facts = {"step": evaluation.step, "score": evaluation.score, "samples": len(evaluation.scores)}
    emit(name, **facts, failures=len(evaluation.failures), **_spent(evaluation.usage))


def step_facts(report: StepReport) -> dict[str, Any]:
    """Flatten a step's report to plain values."""
    return {
        "epoch": report.epoch,
        "step": report.step,
        "score": report.score,
        "test_score": report.test_score,
        "validation_score": report.validation_score,
        "samples": len(report.sample_ids),
        "proposals": report.proposals,
        "failures": len(report.failures),
        "accepted": report.decision.accepted,
        "reason": report.decision.reason,
        "changed": sorted(report.update),
        **_spent(report.usage),
    }


def _spent(usage: Mapping[str, Usage]) -> dict[str, Any]:
    spent = total(usage.values())
    return {"calls": spent.calls, "tokens": spent.total_tokens, "cost": spent.cost}
