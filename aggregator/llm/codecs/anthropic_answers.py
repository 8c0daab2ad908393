"""What the Messages API answers, typed leniently: blocks of many kinds, of which three are ours to read."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct


class Block(Struct, gc=False):
    """One block of content; kinds that are not known (search results, compaction, ...) are read over."""

    type: Any = None  # Any: a block that is none of ours may hold anything, and must not cost us the others
    text: Any = None
    thinking: Any = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = msgspec.Raw()


class _Details(Struct, gc=False):
    thinking_tokens: int | None = None


class WireUsage(Struct, gc=False):
    """`input_tokens` counts what no cache held: the two others come on top."""

    input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_details: _Details | None = None


class Answer(Struct, gc=False):
    """A message, or what is known of one while it streams."""

    model: str | None = None
    id: str | None = None
    content: list[Block] | str | None = None
    stop_reason: str | None = None
    usage: WireUsage | None = None
    error: Any = None


# Fields stand in the order in which the API sends them: msgspec looks for the next one first.
DECODER = msgspec.json.Decoder(Answer)
SAID_NOTHING = WireUsage()


def arguments(block: Block) -> str:
    """The tool's input as it stands in the body."""
    text = str(block.input, "utf-8")
    if text.startswith('"'):  # a gateway that speaks OpenAI's format behind; a stream that was cut
        return str(msgspec.json.decode(text))
    return "{}" if text in ("", "null") else text
