"""One event per attempt and per call; nothing is logged by default, and never a key."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from llm_fakes import BASE_URL, QUESTION, ScriptedTransport, VirtualTime, answer, failure

from aggregator import LLM, lineage
from aggregator.errors import AuthenticationError

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def events() -> Iterator[list[Any]]:
    """Collect what an application that has configured structlog logs."""
    seen: list[Any] = []

    def keep(logger: Any, name: str, event: Any) -> Any:
        seen.append({**event, "level": name})
        raise structlog.DropEvent

    structlog.configure(processors=[keep], cache_logger_on_first_use=False)
    yield seen
    structlog.reset_defaults()


def client(*steps: Any) -> LLM:
    time = VirtualTime()
    return LLM(
        "m", base_url=BASE_URL, api_key=KEY, transport=ScriptedTransport(*steps), clock=time.clock, sleep=time.sleep
    )


@pytest.mark.requirement("built 9: an event per attempt and per call")
async def test_an_event_per_attempt_and_per_call(events: list[Any]) -> None:
    """Two attempts and their call are logged, each with place, role, result and usage."""
    with lineage("train", "sample=3", role="optimizer"):
        await client(failure(500), answer()).complete(QUESTION)
    assert [event["event"] for event in events] == ["llm.attempt", "llm.attempt", "llm.call"]
    assert [event["level"] for event in events] == ["warning", "info", "info"]
    first, second, call = events
    assert {event["lineage"] for event in events} == {"train/sample=3"}
    assert {event["role"] for event in events} == {"optimizer"}
    assert (first["attempt"], first["status"], first["error"]) == (1, 500, "ServerError")
    assert (second["attempt"], second["input_tokens"], second["replayed"]) == (2, 10, False)
    assert (call["attempts"], call["output_tokens"], call["finish_reason"]) == (2, 5, "stop")


async def test_a_failed_call_is_logged(events: list[Any]) -> None:
    """The event has its error, status and attempts."""
    with pytest.raises(AuthenticationError):
        await client(failure(401)).complete(QUESTION)
    assert (events[-1]["event"], events[-1]["error"], events[-1]["status"]) == ("llm.call", "AuthenticationError", 401)


@pytest.mark.requirement("built 9: no key in it")
async def test_keys_and_messages_are_never_logged(events: list[Any]) -> None:
    """This holds even if a server repeats the key."""
    with pytest.raises(AuthenticationError):
        await client(failure(401, f"Incorrect API key: {KEY}")).complete("a private question")
    await client(answer("a private answer")).complete("a private question")
    assert KEY not in repr(events)
    assert "private" not in repr(events)


def test_silent_and_unimported_by_default() -> None:
    """Unless the application configures structlog, nothing is logged and structlog is not imported."""
    script = """
import sys
from aggregator import LLM
from aggregator.protocols import Transport
from aggregator.records import HTTPReply

class Transport(Transport):
    async def send(self, request, *, timeout=None):
        return HTTPReply(status=200, body=b'{"choices": [{"message": {"content": "hi"}}]}', headers={})

llm = LLM("m", base_url="http://127.0.0.1:1", transport=Transport())
assert llm(messages="hello").text == "hi"
assert "structlog" not in sys.modules and "aiohttp" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.requirement("built 9: spans")
async def test_spans_follow_the_genai_conventions() -> None:
    """With OpenTelemetry's SDK each call is a span; a failed one has its error type."""
    trace = pytest.importorskip("opentelemetry.trace")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    exporting = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(exporting.SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    await client(failure(500), answer()).complete(QUESTION, max_tokens=7)
    with pytest.raises(AuthenticationError):
        await client(failure(401, KEY)).complete("a private question")
    good, bad = exporter.get_finished_spans()
    assert good.name == "chat m"
    assert good.attributes["gen_ai.operation.name"] == "chat"
    assert good.attributes["gen_ai.request.max_tokens"] == 7
    assert good.attributes["gen_ai.usage.input_tokens"] == 10
    assert good.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert good.attributes["aggregator.attempts"] == 2
    assert (bad.attributes["error.type"], bad.attributes["http.response.status_code"]) == ("AuthenticationError", 401)
    assert KEY not in bad.to_json()
    assert "private" not in bad.to_json()
