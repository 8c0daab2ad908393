"""Structured events: one per LLM call, per attempt, and per training step.

They go to the standard logger "aggregator" through structlog and are silent until the application configures logging,
with `aggregator.configure_logging()` or its own handlers. An event nobody listens to costs one comparison.
"""

from __future__ import annotations

import logging
from typing import Any

from aggregator.records import StepReport

LOGGER = logging.getLogger("aggregator")
LOGGER.addHandler(logging.NullHandler())


def emit(event: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Send one event with its facts, if anybody listens at this level."""
    if LOGGER.isEnabledFor(level):
        _structured().log(level, event, **facts)


def emit_step(report: StepReport) -> None:
    """Send `train.step`: what a step did, in one flat record."""
    if LOGGER.isEnabledFor(logging.INFO):
        emit("train.step", **step_facts(report))


def step_facts(report: StepReport) -> dict[str, Any]:
    """Flatten a step's report to plain values."""
    return {
        "epoch": report.epoch,
        "step": report.step,
        "score": report.score,
        "test_score": report.test_score,
        "samples": len(report.sample_ids),
        "proposals": report.proposals,
        "failures": len(report.failures),
        "accepted": report.decision.accepted,
        "reason": report.decision.reason,
        "changed": sorted(report.update),
        "calls": sum(usage.calls for usage in report.usage.values()),
        "tokens": sum(usage.total_tokens for usage in report.usage.values()),
    }


def _structured() -> Any:
    import structlog

    return structlog.wrap_logger(
        LOGGER,
        processors=[structlog.contextvars.merge_contextvars, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
