"""The client as users see it: one call, its answer, its errors."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from typing import Any

import pytest
from llm_fakes import BASE_URL, QUESTION, ScriptedTransport, VirtualTime, answer, answering, failure, serving

from aggregator import LLM, portal
from aggregator.agents.transcripts import transcript
from aggregator.cassettes.lineage import lineage
from aggregator.errors import (
    APIConnectionError,
    AuthenticationError,
    BadRequestError,
    ConfigError,
    ContextLengthError,
    DecodeError,
    LLMError,
    NotFoundError,
    PermissionDeniedError,
    QuotaError,
    RateLimitError,
    ServerError,
)
from aggregator.llm.ledger import collecting
from aggregator.records import HTTPReply


def client(transport: ScriptedTransport, time: VirtualTime | None = None, **options: Any) -> LLM:
    time = time or VirtualTime()
    return LLM(
        "gpt-4o-mini", base_url=BASE_URL, transport=transport, clock=time.clock, sleep=time.sleep,
        random=random.Random(1), **options,
    )  # fmt: skip


@pytest.mark.requirement("Trace: llm(messages=...) with OpenAI's shape")
async def test_an_answer_has_text_usage_and_openais_shape() -> None:
    """`complete` returns text and usage, and its result has OpenAI's shape too."""
    completion = await client(ScriptedTransport(answer("hi"))).complete(QUESTION, max_tokens=5)
    assert completion.text == completion.choices[0].message.content == "hi"
    assert (completion.usage.input_tokens, completion.usage.output_tokens) == (10, 5)
    assert (completion.attempts, completion.request_id, completion.replayed) == (1, "req-1", False)


async def test_over_a_real_socket() -> None:
    """Over aiohttp, a request reaches a server and a 500 is retried."""
    async with serving(answering([failure(500), answer("hi")])) as url:
        llm = LLM("gpt-4o-mini", base_url=url, sleep=VirtualTime().sleep)
        completion = await llm.complete("Hello")
    assert (completion.text, completion.attempts) == ("hi", 2)


@pytest.mark.requirement("built 10: called as Trace calls its models", "Trace: llm(messages=...) with OpenAI's shape")
def test_synchronous_call() -> None:
    """Trace calls its models by `llm(messages=...)`; it works without an event loop."""
    llm = client(ScriptedTransport(answer("hi")))
    assert llm(messages=QUESTION, max_tokens=5).choices[0].message.content == "hi"
    with pytest.raises(ConfigError, match="Expected messages"):
        llm()


async def test_synchronous_call_under_a_running_loop() -> None:
    """In a notebook the synchronous call works while another loop runs in the same thread."""
    assert client(ScriptedTransport(answer("hi")))(messages="Hello").text == "hi"


async def test_synchronous_call_on_the_portals_own_loop_is_refused() -> None:
    """Such a call would wait for itself for ever, so the error names the awaitable form."""
    llm = client(ScriptedTransport(answer("hi")))

    async def inside() -> None:
        llm(messages="Hello")

    with pytest.raises(ConfigError, match=r"await llm\.complete"):
        portal.call(inside)


PERMANENT = [
    (failure(400, "bad"), BadRequestError),
    (failure(401, "key"), AuthenticationError),
    (failure(403, "no"), PermissionDeniedError),
    (failure(404, "model"), NotFoundError),
    (failure(413, "large"), BadRequestError),
    (failure(422, "field"), BadRequestError),
    (failure(429, "quota", code="insufficient_quota"), QuotaError),
    (failure(400, "too long", code="context_length_exceeded"), ContextLengthError),
]


@pytest.mark.requirement(
    "client 3: never quota, context overflow, auth, 400, 404, 413, 422",
    "built 4: permanent errors once",
    "figure: requests for one doomed call: permanent 1, transient the attempts set",
)
@pytest.mark.parametrize(("reply", "kind"), PERMANENT, ids=lambda value: getattr(value, "__name__", ""))
async def test_permanent_errors_are_tried_once(reply: HTTPReply, kind: type[LLMError]) -> None:
    """An error that a retry cannot mend costs one request."""
    transport = ScriptedTransport(reply)
    with pytest.raises(kind) as caught:
        await client(transport).complete(QUESTION)
    assert type(caught.value) is kind
    assert (len(transport.requests), caught.value.attempts) == (1, 1)


TRANSIENT: list[tuple[Any, type[LLMError]]] = [
    *[(failure(status), ServerError) for status in (408, 409, 500, 502, 503, 504, 529)],
    (failure(429), RateLimitError),
    (APIConnectionError("cut"), APIConnectionError),
    (HTTPReply(status=200, body=b"<html>", headers={}), DecodeError),
    (HTTPReply(status=200, body=b"", headers={}), LLMError),
]


@pytest.mark.requirement(
    "client 3: 408, 409, 429, 5xx, lost connections are retried",
    "client 7: a malformed answer is retried",
    "client 8: attempts",
    "built 4: transient ones within the attempts set",
    "figure: requests for one doomed call: permanent 1, transient the attempts set",
    "Trace: auto_retry",
)
@pytest.mark.parametrize(("step", "kind"), TRANSIENT)
@pytest.mark.parametrize("max_attempts", [1, 3])
async def test_transient_errors_get_max_attempts(step: Any, kind: type[LLMError], max_attempts: int) -> None:
    """`max_attempts` counts all requests of a call; the error states how many were sent."""
    transport = ScriptedTransport(step)
    with pytest.raises(kind) as caught:
        await client(transport, max_attempts=max_attempts).complete(QUESTION)
    assert (len(transport.requests), caught.value.attempts) == (max_attempts, max_attempts)


@pytest.mark.parametrize("step", [step for step, _ in TRANSIENT])
async def test_a_transient_error_then_an_answer(step: Any) -> None:
    """After a transient failure the caller sees only the number of attempts."""
    completion = await client(ScriptedTransport(step, answer("hi"))).complete(QUESTION)
    assert (completion.text, completion.attempts) == ("hi", 2)


@pytest.mark.requirement("client 3: Retry-After is waited for")
async def test_retry_after_is_obeyed() -> None:
    """The wait is exact to the millisecond, without jitter."""
    time = VirtualTime()
    transport = ScriptedTransport(failure(503, headers={"retry-after": "7"}), answer())
    await client(transport, time).complete(QUESTION)
    assert time.slept == [7.0]


@pytest.mark.requirement("client 3: capped, then failing fast with retry_after", "client 8: retry_after")
async def test_retry_after_beyond_the_cap_fails_fast() -> None:
    """A Retry-After of five minutes is not waited for; the error carries it as `retry_after`."""
    time = VirtualTime()
    transport = ScriptedTransport(failure(429, headers={"retry-after": "300"}))
    with pytest.raises(RateLimitError) as caught:
        await client(transport, time).complete(QUESTION)
    assert (caught.value.retry_after, len(transport.requests), time.slept) == (300.0, 1, [])


@pytest.mark.requirement("client 3: ignored on 2xx")
async def test_retry_after_on_an_answer_is_ignored() -> None:
    """Anthropic and HuggingFace send Retry-After with status 200, where it is ignored."""
    time = VirtualTime()
    llm = client(ScriptedTransport(answer(headers={"retry-after": "20"})), time)
    await llm.complete(QUESTION)
    await llm.complete(QUESTION)
    assert time.slept == []


@pytest.mark.requirement(
    "client 4: one deadline, waits and fallbacks included",
    "Trace's defect 32: a custom model raised a NameError; verbose, timeouts and usage were lost",
)
async def test_one_deadline_for_the_whole_call() -> None:
    """Each attempt gets what the earlier attempts and waits have left of `timeout`."""
    time = VirtualTime()
    transport = ScriptedTransport(failure(503, headers={"retry-after": "4"}))
    with pytest.raises(ServerError) as caught:
        await client(transport, time, timeout=10.0, attempt_timeout=10.0).complete(QUESTION)
    assert transport.timeouts == [10.0, 6.0, 2.0]
    assert caught.value.attempts == 3


@pytest.mark.requirement("client 4: one deadline, waits and fallbacks included")
async def test_no_wait_that_would_outlast_the_deadline() -> None:
    """A wait that would end after the deadline is not started."""
    time = VirtualTime()
    transport = ScriptedTransport(failure(503, headers={"retry-after": "4"}))
    with pytest.raises(ServerError) as caught:
        await client(transport, time, timeout=3.0).complete(QUESTION)
    assert (caught.value.attempts, time.slept) == (1, [])


async def test_the_agents_calls_are_in_the_transcript() -> None:
    """The optimizer sees the agent's calls, but not those of the optimizer, the aggregator and the guide."""
    llm = client(ScriptedTransport(answer("seen")))
    with transcript() as shown:
        await llm.complete("by the agent")
        with lineage("judge", role="guide"):
            await llm.complete("by the guide")
    assert "by the agent" in shown.render()
    assert "seen" in shown.render()
    assert "by the guide" not in shown.render()


async def test_a_failed_call_is_in_the_transcript() -> None:
    """The optimizer sees that a call failed."""
    with transcript() as shown, pytest.raises(AuthenticationError):
        await client(ScriptedTransport(failure(401, "wrong key"))).complete("hello")
    assert "AuthenticationError" in shown.render()


@pytest.mark.requirement("Trace's defect 32: a custom model raised a NameError; verbose, timeouts and usage were lost")
async def test_usage_is_counted_by_role() -> None:
    """The ledger counts the usage of each role."""
    llm = client(ScriptedTransport(answer()))
    with collecting() as ledger:
        await llm.complete("a")
        with lineage("propose", role="optimizer"):
            await llm.complete("b")
            await llm.complete("c")
    assert {role: usage.calls for role, usage in ledger.totals().items()} == {"agent": 1, "optimizer": 2}


@pytest.mark.parametrize(
    "options", [{"max_attempts": 0}, {"timeout": 0}, {"max_concurrency": 0}, {"rpm": 0}, {"tpm": -1}], ids=str
)
def test_invalid_settings_are_refused(options: dict[str, Any]) -> None:
    """A limit that would let nothing through is rejected when the client is created."""
    with pytest.raises(ConfigError, match=rf"Expected {next(iter(options))} (>|to be)"):
        client(ScriptedTransport(answer()), **options)


def test_without_a_model_the_error_says_what_to_set() -> None:
    """There is no default model: the error names the variables to set."""
    with pytest.raises(ConfigError, match="TRACE_LITELLM_MODEL"):
        LLM(env={}, transport=ScriptedTransport(answer()))
    llm = LLM(env={"TRACE_LITELLM_MODEL": "openai/gpt-4o-mini"}, transport=ScriptedTransport(answer()))
    assert llm.model == "openai/gpt-4o-mini"


async def test_a_missing_key_is_reported_before_anything_is_sent() -> None:
    """A client can be created and replayed without a key; only sending needs one."""
    transport = ScriptedTransport(answer())
    llm = LLM("openai/gpt-4o-mini", env={}, transport=transport)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        await llm.complete("hello")
    assert transport.requests == []


def test_a_client_is_not_copied_with_its_agent() -> None:
    """Trace deep-copies agents; the copies share limits and connections."""
    llm = client(ScriptedTransport(answer()))
    assert copy.deepcopy({"llm": llm})["llm"] is llm


def loaded_by(statements: str) -> set[str]:
    script = f"import sys; before = set(sys.modules); {statements}; print(*(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_importing_the_client_loaded_everything_that_a_call_needs() -> None:
    """`from aggregator import LLM` loads no codec, cassette, HTTP module or event loop."""
    loaded = loaded_by("from aggregator import LLM")
    heavy = ("ssl", "asyncio", "importlib.metadata", "aiohttp", "http", "json", "logging", "random", "structlog")
    rooms = ("aggregator.llm.codecs", "aggregator.llm.transport", "aggregator.cassettes", "aggregator.portal")
    assert {name for name in loaded if name.startswith((*heavy, *rooms))} == set()


def test_a_client_loads_its_own_codec_and_no_cassette() -> None:
    """Other providers' codecs and the recording code are loaded on first use."""
    loaded = loaded_by("from aggregator import LLM; LLM('anthropic/claude-sonnet-4-5', env={})")
    assert "aggregator.llm.codecs.anthropic" in loaded
    unused = {"llm.codecs.openai", "llm.codecs.gemini", "cassettes.tape", "cassettes.redaction", "cassettes.recorder"}
    assert {name for name in unused if f"aggregator.{name}" in loaded} == set()
