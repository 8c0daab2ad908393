"""One event per attempt and per call: structlog events, and OpenTelemetry spans with the GenAI conventions.

Both are silent until the application configures them, and cost next to nothing until then: neither package is
imported here, so whoever did not import it cannot be listening. Keys, messages and answers are never part of an event.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aggregator.errors import LLMError
from aggregator.records import Completion, Usage

LOGGER = "aggregator.llm"


def listening() -> bool:
    """Tell whether the application has configured structlog."""
    structlog = sys.modules.get("structlog")
    return structlog is not None and structlog.is_configured()


def event(name: str, **facts: Any) -> None:
    """Log one event; facts that are None are left out."""
    structlog = sys.modules["structlog"]
    told = {key: value for key, value in facts.items() if value is not None}
    log = structlog.get_logger(LOGGER)
    (log.warning if "error" in told else log.info)(name, **told)


def usage_facts(usage: Usage | None) -> dict[str, Any]:
    """Tokens and cost as facts of an event."""
    if usage is None:
        return {}
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cached_tokens": usage.cached_tokens,
        "cost": usage.cost,
    }


class _Silent:
    """A span that nobody reads."""

    def answered(self, completion: Completion, attempts: int) -> None:
        """Take the answer."""

    def failed(self, error: BaseException) -> None:
        """Take the failure."""


_SILENT = _Silent()


class _Span:
    """An OpenTelemetry span of one call, in the words of the GenAI semantic conventions."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def answered(self, completion: Completion, attempts: int) -> None:
        """Take the answer."""
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
        """Take the failure."""
        self._span.set_attribute("error.type", type(error).__name__)
        if isinstance(error, LLMError):
            self._span.set_attribute("aggregator.attempts", error.attempts)
            if error.status is not None:
                self._span.set_attribute("http.response.status_code", error.status)
        self._span.set_status(sys.modules["opentelemetry.trace"].StatusCode.ERROR, type(error).__name__)


@contextmanager
def _recording(trace: Any, provider: str, model: str, address: str, facts: dict[str, Any]) -> Iterator[_Span]:
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": model,
        "server.address": address,
        **{name: value for name, value in facts.items() if value is not None},
    }
    tracer = trace.get_tracer(LOGGER)
    with tracer.start_as_current_span(
        f"chat {model}",
        kind=trace.SpanKind.CLIENT,
        attributes=attributes,
        record_exception=False,  # its traceback could hold messages
        set_status_on_exception=False,
    ) as span:
        reported = _Span(span)
        try:
            yield reported
        except BaseException as error:
            reported.failed(error)
            raise


class _NoSpan:
    """The neutral span: entered and left for almost nothing."""

    def __enter__(self) -> _Silent:
        return _SILENT

    def __exit__(self, *error: object) -> None:
        return None


_NO_SPAN = _NoSpan()


def span(provider: str, model: str, address: str, **facts: Any) -> Any:
    """Return the span of one call as a context manager; one that does nothing where OpenTelemetry is not in use."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or "opentelemetry.sdk.trace" not in sys.modules:
        return _NO_SPAN
    return _recording(trace, provider, model, address, facts)
