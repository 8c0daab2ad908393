"""The record of one forward pass: operations, their inputs and outputs, and LLM calls, as a tree.

A transcript belongs to the context that opened it (`with transcript() as t`) and to what is started in it; there is no
global graph. Values are turned into text when they are recorded: a later change in place has no effect.

The tree is the same in any order of completion: an operation takes its slot when it starts, and the records of a
concurrent task, thread or pool item stay together, at the position of its first one. Concurrent items are in the order
in which a run started them (`portal.Branch`).
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary, ref

from aggregator.records import Completion
from aggregator.text import cut, one_line, show, show_error

WORDS_SHOWN = 60
"""The maximum number of characters of one value in a box."""

_UNSAFE = re.compile(r"[^\w .,=()/+-]")


# ---- as a flowchart


class Picture:
    """The lines of a flowchart under construction; `left` is the number of boxes that still fit."""

    def __init__(self, limit: int) -> None:
        self.lines: list[str] = ["flowchart TD"]
        self.left = limit
        self.boxes = 0
        self.left_out = 0

    def draw(self, group: Group, parent: str | None = None) -> None:
        """Draw a group: a solid line from its parent to the first item, dotted lines to the next ones.

        Each concurrent task starts at the parent again, in its own row.
        """
        before = None
        for item in group.ordered():
            if isinstance(item, Span | LLMCall):
                name = self._box(item)
                if name is None:
                    continue
                if before or parent:
                    self.lines.append(f"  {before} -.-> {name}" if before else f"  {parent} --> {name}")
                before = name
                if isinstance(item, Span):
                    self.draw(item, name)
            else:
                self.draw(item, parent)

    def _box(self, item: Span | LLMCall) -> str | None:
        if self.left == 0:
            self.left_out += 1
            return None
        name = f"n{self.boxes}"
        self.boxes += 1
        self.left -= 1
        text = "<br/>".join(escaped(line) for line in _label(item))
        opening, closing = ("([", "])") if isinstance(item, LLMCall) else ("[", "]")
        ended = item.reply if isinstance(item, LLMCall) else item.outcome
        has_failed = ended is not None and ended[0] in {"raised", "failed"}
        self.lines.append(f'  {name}{opening}"{text}"{closing}{":::failed" if has_failed else ""}')
        return name

    def finished(self) -> str:
        """Return the text, with a box for the items that did not fit."""
        last = [f'  more["... {self.left_out} more"]'] if self.left_out else []
        return "\n".join([*self.lines, *last, "  classDef failed stroke:#e0524a,stroke-width:2px"])


def escaped(text: str) -> str:
    """Return text for a label: characters with a meaning in Mermaid become numeric references.

    >>> escaped('say "no"')
    'say #34;no#34;'
    """
    return _UNSAFE.sub(lambda found: f"#{ord(found[0])};", text)


def _label(item: Span | LLMCall) -> Iterator[str]:
    facts: list[tuple[str, str]]
    if isinstance(item, LLMCall):
        yield item.title
        facts = [*item.messages[-1:], *([item.reply] if item.reply else [])]
    else:
        yield item.name
        facts = [*item.inputs, *([item.outcome] if item.outcome else [])]
    for key, value in facts:
        yield f"{key} = {one_line(value, WORDS_SHOWN)}"


MESSAGE_LIMIT = 4_000
"""The number of characters of one message to a model that are shown."""

_INDENT = "  "


class Group:
    """The sequential records of one task, thread or pool item; `place` is its branch in the run."""

    def __init__(self, place: str = "") -> None:
        self.items: list[Group | Span | LLMCall] = []
        self.place = place

    def ordered(self) -> list[Group | Span | LLMCall]:
        """Return the items, concurrent groups in the order of their places."""
        found: list[Group | Span | LLMCall] = []
        for is_group, run in groupby(self.items, lambda item: type(item) is Group):
            items: list[Any] = list(run)
            if is_group and len(items) > 1 and all(item.place for item in items):
                # `0.10` after `0.9`; a place that is too deep is a digest
                items.sort(key=lambda item: [(int(n), "") if n.isdigit() else (-1, n) for n in item.place.split(".")])
            found += items
        return found

    def lines(self) -> Iterator[str]:
        """Yield the items as lines."""
        for item in self.ordered():
            yield from item.lines()


# ---- what is recorded


class Span(Group):
    """One operation: name, description, inputs, nested records, and its output or error, all as text."""

    def __init__(self, name: str, description: str = "", inputs: Sequence[tuple[str, Any]] = ()) -> None:
        super().__init__()
        self.name = name
        self.description = description
        self.inputs = [(key, show(value)) for key, value in inputs]
        self.outcome: tuple[str, str] | None = None
        self._owner = ref(_runner())  # weak: a task holds its context, and with it this span
        self._owner_place = _place()
        self._groups: WeakKeyDictionary[Any, Group] | None = None  # of the other tasks and threads, if there are any

    def add(self, item: Span | LLMCall) -> None:
        """Take a slot for `item`, after the previous record of the same task, thread or pool item."""
        place, runner = _place(), _runner()
        if runner is self._owner() and place in ("", self._owner_place):
            self.items.append(item)
            return
        if place in ("", self._owner_place):
            place = ""
            if self._groups is None:
                self._groups = WeakKeyDictionary()
            group = self._groups.get(runner)
        else:  # a pool's thread works for many places
            group = next((one for one in self.items if type(one) is Group and one.place == place), None)
        if group is None:
            group = Group(place)
            if not place and self._groups is not None:
                self._groups[runner] = group
            self.items.append(group)
        group.items.append(item)

    def finish(self, output: Any) -> None:
        """Record the operation's result."""
        self.outcome = ("returned", show(output))

    def fail(self, error: BaseException, place: str = "") -> None:
        """Record the operation's exception, and its position in the source if known."""
        self.outcome = ("raised", show_error(error) + place)

    def lines(self) -> Iterator[str]:
        """Yield the operation as indented lines."""
        yield f"{self.name}: {self.description}" if self.description else self.name
        facts = [_INDENT + line for key, text in self.inputs for line in _field(key, text)]
        yield from facts
        for line in super().lines():
            yield _INDENT + line
        for line in _field(*(self.outcome or ("returned", "[... not finished]"))):
            yield _INDENT + line


class LLMCall:
    """One call of the agent to a model: the messages and, once it arrives, the reply.

    `title` names the call; a request of another client to an unknown server has its address there.
    """

    def __init__(self, messages: Any, title: str = "LLM call") -> None:
        self.title = title
        self.messages = [_message(message) for message in messages]
        self.reply: tuple[str, str] | None = None

    def finish(self, completion: Completion) -> None:
        """Record the answer."""
        called = [f"tool call: {call.name}({call.arguments})" for call in completion.tool_calls]
        texts = [completion.text] if completion.text or not called else []
        self.reply = ("reply", cut("\n".join([*texts, *called]), MESSAGE_LIMIT))

    def fail(self, error: BaseException) -> None:
        """Record that the call failed."""
        self.reply = ("failed", show_error(error))

    def lines(self) -> Iterator[str]:
        """Yield the call as indented lines."""
        yield self.title
        for key, text in [*self.messages, self.reply or ("reply", "[... not finished]")]:
            for line in _field(key, text):
                yield _INDENT + line


def _runner() -> Any:
    """Return the running task, or the thread outside a task."""
    tasks = sys.modules.get("asyncio.tasks")  # without it there are no tasks, and no reason to import it
    try:
        task = tasks.current_task() if tasks else None
    except RuntimeError:  # no running loop
        task = None
    return task or threading.current_thread()


def _place() -> str:
    """Return the branch of concurrent work, or "" outside a run or cassette."""
    portal = sys.modules.get("aggregator.portal")  # as above
    branch = portal.current_branch() if portal else None
    return branch.path if branch is not None else ""


def _field(key: str, text: str) -> list[str]:
    """Format a named value: on one line, or as an indented block if it has several."""
    if "\n" not in text:
        return [f"{key}: {text}"]
    return [f"{key}: |", *(_INDENT + line for line in text.splitlines())]


def _message(message: Any) -> tuple[str, str]:
    """Return role and text of a message in OpenAI's shape, or of any other object.

    Content parts other than texts (images, audio) are named, not shown.
    """
    if not isinstance(message, Mapping):
        return "message", cut(message if isinstance(message, str) else show(message), MESSAGE_LIMIT)
    content = message.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else {"text": show(part)} for part in content]
        content = "\n".join(str(part["text"]) if "text" in part else f"[{part.get('type', 'part')}]" for part in parts)
    texts = [content] if isinstance(content, str) else []
    if calls := message.get("tool_calls"):
        texts.append(f"tool calls: {show(calls)}")
    return str(message.get("role", "message")), cut("\n".join(texts), MESSAGE_LIMIT)


TRANSCRIPT_LIMIT = 40_000
"""The maximum number of characters that `render` returns; the middle is replaced by a note."""

_span: ContextVar[Span | None] = ContextVar("aggregator_span", default=None)


# ---- the transcript of one task


class Transcript:
    """The record of one forward pass; `render()` is its text for a prompt."""

    def __init__(self) -> None:
        self.root = Span("")

    def __repr__(self) -> str:
        return f"<Transcript of {len(self.root.items)} operations and calls>"

    def llm_call(self, messages: Any, title: str = "LLM call") -> LLMCall:
        """Take the slot of an LLM call before it is sent; call `finish` or `fail` later.

        The slot keeps concurrent calls in the order of issue.
        """
        call = LLMCall(messages, title)
        span = _span.get()
        (self.root if span is None or _transcript.get() is not self else span).add(call)
        return call

    def add_llm_call(self, messages: Any, completion: Completion) -> None:
        """Record an LLM call that has been answered."""
        self.llm_call(messages).finish(completion)

    def render(self, limit: int = TRANSCRIPT_LIMIT) -> str:
        """Return the transcript as indented text of at most about `limit` characters.

        If it is longer, its middle is replaced by one line `[... 1234 characters left out]`; shortened values and
        messages have a note too.
        """
        text = "\n".join(Group.lines(self.root))
        if len(text) <= limit:
            return text
        head, tail = text[: limit // 2], text[-(limit // 2) :]
        return f"{head}\n[... {len(text) - len(head) - len(tail)} characters left out]\n{tail}"

    def to_mermaid(self, limit: int = 200) -> str:
        """Return the transcript as a Mermaid flowchart of at most `limit` operations and LLM calls.

        Values are shortened and escaped; failures have a red border. Put it in a Markdown fence named `mermaid`: no
        program is needed.
        """
        picture = Picture(limit)
        picture.draw(self.root)
        return picture.finished()


_transcript: ContextVar[Transcript | None] = ContextVar("aggregator_transcript", default=None)


def current_transcript() -> Transcript | None:
    """Return the current context's transcript, or None."""
    return _transcript.get()


class transcript(AbstractContextManager[Transcript]):  # noqa: N801 - reads as a word at its use, once per instance
    """Record the operations and calls of the block, and of tasks and threads started in it.

    >>> with transcript() as t:
    ...     with recording("add", inputs=[("a", 1)]) as span:
    ...         span.finish(2)
    >>> print(t.render())
    add
      a: 1
      returned: 2
    """

    def __repr__(self) -> str:
        return "transcript()"

    def __enter__(self) -> Transcript:
        opened = Transcript()
        self._tokens = _transcript.set(opened), _span.set(opened.root)
        return opened

    def __exit__(self, *error: object) -> None:
        of_transcript, of_span = self._tokens
        _span.reset(of_span)
        _transcript.reset(of_transcript)


@contextmanager
def recording(name: str, description: str = "", inputs: Sequence[tuple[str, Any]] = ()) -> Iterator[Span]:
    """Record the block as one operation inside the current one; errors are recorded and raised.

    The block calls `span.finish(output)`. Outside a transcript nothing is recorded.
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
