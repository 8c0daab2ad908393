"""Ollama: chat completions, and a warning if the server cut the prompt at its context.

Ollama drops the oldest messages, and then the middle of the prompt, beyond `num_ctx` tokens (2,048 or 4,096 unless
set) without an error. Its count of prompt tokens shows it: it is far below what the prompt must have.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import msgspec

from aggregator.errors import ModelWarning
from aggregator.llm.calls import ChatCall, Target
from aggregator.llm.codecs.openai import OpenAIChat
from aggregator.llm.codecs.openai_stream import ChatStream
from aggregator.llm.messages import text_of
from aggregator.records import Completion, HTTPReply

_SHORTEST = 8_000  # characters: less fits into any context
_USUAL = 4.0  # characters of a token of English text, by OpenAI's rule of thumb
_MOST = 6.5  # above this no tokenizer gets in running text; lower for code and for other languages
_RUN = re.compile(r"(\s)\s+|(\S)\2{3,}")  # blanks and rules are one token each, however long
_CONTEXT = 2048  # the smallest context, of which all usual ones are multiples
_NEAR = 2


def characters(call: ChatCall) -> int:
    """Return how many characters of text a prompt has at least, runs of one character counted once.

    >>> characters(ChatCall(model="m", messages=({"role": "user", "content": "a      b ======="},)))
    5
    """
    texts: list[str] = [text_of(message.get("content")) for message in call.messages]
    if call.tools:
        texts.append(msgspec.json.encode(call.tools).decode())
    return sum(len(_RUN.sub(" ", text)) for text in texts)


def is_cut(given: int, length: int) -> bool:
    """Return True if a prompt of `length` characters cannot have had `given` tokens only.

    It cannot if that were more characters a token than tokenizers reach, nor, for a prompt that is longer by the usual
    measure, if the count is that of a context, give or take two.

    >>> is_cut(4096, 60_000), is_cut(4095, 18_000), is_cut(4100, 18_000)
    (True, True, False)
    """
    if length < _SHORTEST or given <= 0:
        return False
    is_context = given + _NEAR >= _CONTEXT and (given + _NEAR) % _CONTEXT <= 2 * _NEAR
    return length > given * _MOST or (is_context and length > given * _USUAL)


class OllamaStream(ChatStream):
    """A streamed answer of Ollama."""

    def finish(self, reply: HTTPReply) -> Completion:
        """Return the whole answer; warns if the prompt was cut."""
        return check_context(self.codec, super().finish(reply), self.call)


class OllamaChat(OpenAIChat):
    """The codec of Ollama's chat completions."""

    reader = OllamaStream

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.has_warned = False

    def decode(self, reply: HTTPReply, call: ChatCall) -> Completion:
        """Read an answer; warns if the prompt was cut."""
        return check_context(self, super().decode(reply, call), call)


def check_context(codec: Any, completion: Completion, call: ChatCall) -> Completion:
    """Return the answer as it is; warns, once for each client, if its prompt was cut."""
    given = completion.usage.input_tokens
    if given is None or codec.has_warned or not is_cut(given, length := characters(call)):
        return completion
    codec.has_warned = True
    warnings.warn(
        f"Expected Ollama to read about {round(length / _USUAL):,} tokens of {call.model}'s prompt, got {given:,}: the "
        f"prompt was probably cut at the context of the server, and the answer is about the rest. Set "
        f"OLLAMA_CONTEXT_LENGTH for the server or num_ctx in the Modelfile, or shorten the prompt",
        ModelWarning,
        stacklevel=2,
    )
    return completion
