"""One event per attempt and per call: structlog events, and OpenTelemetry spans with the GenAI conventions.

Both are silent until the application configures them, and cost almost nothing until then: neither package is imported
here, because a listener must have imported it. Keys, messages and answers are never part of an event.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from aggregator.errors import LLMError
from aggregator.llm.calls import ChatCall, Target
from aggregator.records import Completion, Usage

LOGGER = "aggregator.llm"


def listening() -> bool:
    """Return True if the application has configured structlog."""
    structlog = sys.modules.get("structlog")
    return structlog is not None and structlog.is_configured()


def event(name: str, **facts: Any) -> None:
    """Log one event; fields that are None are left out."""
    structlog = sys.modules["structlog"]
    known = {key: value for key, value in facts.items() if value is not None}
    log = structlog.get_logger(LOGGER)
    (log.warning if "error" in known else log.info)(name, **known)


def usage_facts(usage: Usage | None) -> dict[str, Any]:
    """Return tokens and cost as fields of an event."""
    if usage is None:
        return {}
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cached_tokens": usage.cached_tokens,
        "cost": usage.cost,
    }


class Span:
    """An OpenTelemetry span of one call, with the GenAI semantic conventions."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def answered(self, completion: Completion, attempts: int) -> None:
        """Record the response on the span."""
        usage = completion.usage
        facts = {
            "gen_ai.response.model": completion.model or None,
            "gen_ai.response.id": completion.id or None,
            "gen_ai.response.finish_reasons": [choice.finish_reason for choice in completion.choices],
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "aggregator.attempts": attempts,
            "aggregator.replayed": completion.replayed,
            "aggregator.cost": usage.cost,
        }
        self._span.set_attributes({name: value for name, value in facts.items() if value is not None})

    def failed(self, error: BaseException) -> None:
        """Record the error on the span."""
        self._span.set_attribute("error.type", type(error).__name__)
        if isinstance(error, LLMError):
            self._span.set_attribute("aggregator.attempts", error.attempts)
            if error.status is not None:
                self._span.set_attribute("http.response.status_code", error.status)
        self._span.set_status(sys.modules["opentelemetry.trace"].StatusCode.ERROR, type(error).__name__)


def has_spans() -> bool:
    """Return True if the application uses OpenTelemetry's SDK."""
    return "opentelemetry.sdk.trace" in sys.modules


@contextmanager
def span(target: Target, call: ChatCall) -> Iterator[Span]:
    """Return the span of one call; only if `has_spans`."""
    trace = sys.modules["opentelemetry.trace"]
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": target.provider,
        "gen_ai.request.model": call.model,
        "gen_ai.request.max_tokens": call.max_tokens,
        "gen_ai.request.temperature": call.temperature,
        "gen_ai.request.top_p": call.top_p,
        "gen_ai.request.seed": call.seed,
        "gen_ai.request.choice.count": call.n,
        "server.address": urlsplit(target.base_url).hostname or "",
    }
    tracer = trace.get_tracer(LOGGER)
    with tracer.start_as_current_span(
        f"chat {call.model}",
        kind=trace.SpanKind.CLIENT,
        attributes={name: value for name, value in attributes.items() if value is not None},
        record_exception=False,  # its traceback could hold messages
        set_status_on_exception=False,
    ) as span:
        reported = Span(span)
        try:
            yield reported
        except BaseException as error:
            reported.failed(error)
            raise
