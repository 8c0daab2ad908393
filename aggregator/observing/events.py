"""Structured events of training, beside those of the client (`aggregator/llm/tracing.py`: `llm.attempt`, `llm.call`).

They go through structlog and are silent until the application configures it, itself or with
`aggregator.configure_logging()`: whoever did not import structlog cannot be listening.
"""

from __future__ import annotations

import sys
from typing import Any

from aggregator.records import StepReport

LOGGER = "aggregator.training"


def emit(event: str, **facts: Any) -> None:
    """Send one event with its facts, if the application has configured structlog."""
    structlog = sys.modules.get("structlog")
    if structlog is not None and structlog.is_configured():
        structlog.get_logger(LOGGER).info(event, **facts)


def emit_step(report: StepReport) -> None:
    """Send `train.step`: what a step did, in one flat record."""
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
