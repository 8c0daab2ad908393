"""What one forward pass did: operations, their inputs and outputs, and LLM calls, as a tree.

A transcript belongs to the context that opened it (`with transcript() as t`) and what is started from there; there is
no global graph. Values are turned into text when they are recorded: a later change in place does not rewrite history.

The tree is the same whatever finishes first: an operation takes its slot when it starts, and what a concurrent task or
thread records stays together, at the place of the first thing it recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from aggregator.agents.drawing import Picture
from aggregator.agents.spans import Group, LLMCall, Span
from aggregator.records import Completion

TRANSCRIPT_LIMIT = 40_000
"""How many characters `render` returns at most; the middle is left out, and that is said."""

_span: ContextVar[Span | None] = ContextVar("aggregator_span", default=None)


class Transcript:
    """What one forward pass did; `render()` is its text for a prompt."""

    def __init__(self) -> None:
        self.root = Span("")

    def llm_call(self, messages: Any) -> LLMCall:
        """Take the slot of an LLM call that is about to be made; `finish` or `fail` it later.

        The slot keeps concurrent calls in the order they were issued, whichever is answered first.
        """
        call = LLMCall(messages)
        self._here().add(call)
        return call

    def add_llm_call(self, messages: Any, completion: Completion) -> None:
        """Record an LLM call that has been answered."""
        self.llm_call(messages).finish(completion)

    def render(self, limit: int = TRANSCRIPT_LIMIT) -> str:
        """Return the transcript as indented text of at most about `limit` characters.

        Where it is longer, its middle is replaced by one line `[... 1234 characters left out]`; single values and
        messages that were cut say so in place.
        """
        text = "\n".join(Group.lines(self.root))
        if len(text) <= limit:
            return text
        head, tail = text[: limit // 2], text[-(limit // 2) :]
        return f"{head}\n[... {len(text) - len(head) - len(tail)} characters left out]\n{tail}"

    def to_mermaid(self, limit: int = 200) -> str:
        """Return the transcript as a Mermaid flowchart of at most `limit` operations and LLM calls.

        Values are cut to their beginnings and escaped; what failed has a red border. Put it into a Markdown fence named
        `mermaid`: no program is needed.
        """
        picture = Picture(limit)
        picture.draw(self.root)
        return picture.finished()

    def _here(self) -> Span:
        span = _span.get()
        return self.root if span is None or _transcript.get() is not self else span


_transcript: ContextVar[Transcript | None] = ContextVar("aggregator_transcript", default=None)


def current_transcript() -> Transcript | None:
    """Return the transcript that the current context records, None where there is none."""
    return _transcript.get()


@contextmanager
def transcript() -> Iterator[Transcript]:
    """Record what is done in the block, and in tasks and threads started from it.

    >>> with transcript() as t:
    ...     with recording("add", inputs=[("a", 1)]) as span:
    ...         span.finish(2)
    >>> print(t.render())
    add
      a: 1
      returned: 2
    """
    opened = Transcript()
    transcript_token, span_token = _transcript.set(opened), _span.set(opened.root)
    try:
        yield opened
    finally:
        _span.reset(span_token)
        _transcript.reset(transcript_token)


@contextmanager
def recording(name: str, description: str = "", inputs: Sequence[tuple[str, Any]] = ()) -> Iterator[Span]:
    """Record one operation around the block, inside the current one; errors are recorded and go on.

    The block calls `span.finish(output)`. Outside a transcript nothing is kept.
    """
    parent = _span.get()
    span = Span(name, description, inputs if parent else ())
    if parent:
        parent.add(span)
    token = _span.set(span if parent else None)
    try:
        yield span
    except BaseException as error:
        if span.outcome is None:
            span.fail(error)
        raise
    finally:
        _span.reset(token)
