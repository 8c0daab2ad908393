"""Ollama silently truncates long prompts; its own token count reveals that."""

from __future__ import annotations

import warnings
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_fakes import ScriptedTransport, answer

from aggregator import LLM
from aggregator.errors import ModelWarning
from aggregator.llm.calls import ChatCall
from aggregator.llm.codecs.openai import OllamaChat, characters, is_cut
from aggregator.llm.messages import Image, normalise
from aggregator.llm.names import resolve
from aggregator.records import HTTPReply

WORDS = ["the", "customer", "asks", "for", "a", "refund", "because", "the", "parcel", "that", "was", "promised"]


def prose(length: int) -> str:
    random = Random(3)
    text = ""
    while len(text) < length:
        text += random.choice(WORDS) + " "
    return text[:length]


def client(tokens: int | None, model: str = "ollama/qwen3:8b", **options: Any) -> LLM:
    usage = {} if tokens is None else {"prompt_tokens": tokens, "completion_tokens": 5}
    return LLM(model, transport=ScriptedTransport(answer(usage=usage)), env={}, **options)


def test_a_truncated_prompt_is_warned_of_once() -> None:
    """The warning gives the counts and the setting; each client warns once."""
    llm = client(4096)
    with pytest.warns(ModelWarning, match=r"about 15,000 tokens.*4,096.*OLLAMA_CONTEXT_LENGTH") as found:
        assert [llm(prose(60_000)).text, llm(prose(60_000)).text] == ["hello", "hello"]
    assert len(found) == 1


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (13_000, prose(60_000)),
        (15_000, prose(60_000)),
        (4_100, prose(18_000)),
        (4_096, prose(16_000)),
        (1_900, prose(7_900)),
        (40, "Hello."),
        (0, prose(60_000)),
        (None, prose(60_000)),
        (600, "{\n" + " " * 40_000 + "}" + "=" * 30_000 + prose(2_000)),
    ],
)
def test_whole_prompts_give_no_warning(tokens: int | None, text: str) -> None:
    """This covers counts that fit, short prompts, missing counts, and long blanks that are one token."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client(tokens)(text)


@pytest.mark.parametrize("tokens", [2046, 2048, 4095, 4096, 8192, 40_960, 131_072])
def test_a_count_that_is_exactly_a_context(tokens: int) -> None:
    """The prompt was slightly longer than the context: only the round number shows it."""
    with pytest.warns(ModelWarning):
        client(tokens)(prose(tokens * 5))


async def test_a_streamed_answer_is_checked_too() -> None:
    """Usage is in the last chunk of a stream."""
    chunk = {
        "choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 4096, "completion_tokens": 1},
    }
    body = b"data: " + msgspec.json.encode(chunk) + b"\n\ndata: [DONE]\n\n"
    transport = ScriptedTransport(HTTPReply(status=200, body=body, headers={"content-type": "text/event-stream"}))
    stream = LLM("ollama/m", transport=transport, env={}).stream(prose(60_000))
    with pytest.warns(ModelWarning):
        assert [delta async for delta in stream] == ["x"]


@pytest.mark.parametrize(
    ("name", "base_url", "kind"),
    [
        ("ollama/m", None, True),
        ("qwen3:8b", "http://localhost:11434/v1", True),
        ("openai-compatible/m", "http://10.0.0.7:11434/v1", True),
        ("openai-compatible/m", "http://localhost:8000/v1", False),
        ("vllm/m", None, False),
        ("openai/m", None, False),
    ],
)
def test_only_ollama_is_checked(name: str, base_url: str | None, kind: bool) -> None:
    """Ollama is recognised by its name or its port; other servers refuse a prompt that is too long."""
    assert isinstance(resolve(name, base_url=base_url, env={}).codec, OllamaChat) is kind


def test_which_parts_count_as_text() -> None:
    """Parts and tools count, pictures do not."""
    tool = {"type": "function", "function": {"name": "f"}}
    messages = normalise([{"role": "user", "content": ["four", Image("data:image/png;base64,AAAA")]}, "five "])
    assert characters(ChatCall(model="m", messages=messages)) == 9
    assert characters(ChatCall(model="m", messages=messages, tools=(tool,))) > 9


@given(st.integers(8_000, 10_000_000), st.floats(1.0, 6.0))
def test_no_prompt_at_a_usual_ratio_is_called_truncated(length: int, ratio: float) -> None:
    """Between one and six characters a token no warning is given, unless the count is a context size."""
    tokens = round(length / ratio)
    assert not is_cut(tokens + 5 * ((tokens + 2) % 2048 <= 4), length)
