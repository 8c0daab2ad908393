"""The parts of a transcript: an operation, a call to a model, and what one task or thread recorded in a row."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from aggregator.agents.showing import cut, show, show_error
from aggregator.records import Completion

MESSAGE_LIMIT = 4_000
"""How many characters of one message to a model are shown."""

_INDENT = "  "


class Group:
    """What was recorded one after the other by one task or thread."""

    def __init__(self) -> None:
        self.items: list[Group | Span | LLMCall] = []

    def lines(self) -> Iterator[str]:
        """Yield what it holds as lines."""
        for item in self.items:
            yield from item.lines()


class Span(Group):
    """One operation: name, description, inputs, what happened inside, and its output or error, all as text."""

    def __init__(self, name: str, description: str = "", inputs: Sequence[tuple[str, Any]] = ()) -> None:
        super().__init__()
        self.name = name
        self.description = description
        self.inputs = [(key, show(value)) for key, value in inputs]
        self.outcome: tuple[str, str] | None = None
        self._owner = ref(_runner())  # weak: a task holds its context, and with it this span
        self._groups: WeakKeyDictionary[Any, Group] = WeakKeyDictionary()

    def add(self, item: Span | LLMCall) -> None:
        """Take a slot for `item`, beside what the same task or thread recorded before."""
        runner = _runner()
        if runner is self._owner():
            self.items.append(item)
            return
        group = self._groups.get(runner)
        if group is None:
            group = self._groups[runner] = Group()
            self.items.append(group)
        group.items.append(item)

    def finish(self, output: Any) -> None:
        """Record what the operation returned."""
        self.outcome = ("returned", show(output))

    def fail(self, error: BaseException, place: str = "") -> None:
        """Record what the operation raised, and where in its source if that is known."""
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
    """One call of the agent to a model: the messages and, once it came, the reply."""

    def __init__(self, messages: Any) -> None:
        self.messages = [_message(message) for message in messages]
        self.reply: tuple[str, str] | None = None

    def finish(self, completion: Completion) -> None:
        """Record the answer."""
        self.reply = ("reply", _reply(completion))

    def fail(self, error: BaseException) -> None:
        """Record that there was no answer."""
        self.reply = ("failed", show_error(error))

    def lines(self) -> Iterator[str]:
        """Yield the call as indented lines."""
        yield "LLM call"
        for key, text in [*self.messages, self.reply or ("reply", "[... not finished]")]:
            for line in _field(key, text):
                yield _INDENT + line


def _runner() -> Any:
    """Return the task that is running, or the thread where there is none."""
    tasks = sys.modules.get("asyncio.tasks")  # without it there are no tasks, and no reason to import it
    try:
        task = tasks.current_task() if tasks else None
    except RuntimeError:  # no running loop
        task = None
    return task or threading.current_thread()


def _field(key: str, text: str) -> list[str]:
    """Lay out a named value: on one line, or as an indented block where it has several."""
    if "\n" not in text:
        return [f"{key}: {text}"]
    return [f"{key}: |", *(_INDENT + line for line in text.splitlines())]


def _message(message: Any) -> tuple[str, str]:
    """Return role and text of a message in OpenAI's shape, or of whatever was passed instead of one."""
    if not isinstance(message, Mapping):
        return "message", cut(message if isinstance(message, str) else show(message), MESSAGE_LIMIT)
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part) for part in content)
    texts = [content] if isinstance(content, str) else []
    if calls := message.get("tool_calls"):
        texts.append(f"tool calls: {show(calls)}")
    return str(message.get("role", "message")), cut("\n".join(texts), MESSAGE_LIMIT)


def _part(part: Any) -> str:
    """Return a content part's text; parts of other kinds (images, audio) are named, not shown."""
    if isinstance(part, Mapping):
        return str(part["text"]) if "text" in part else f"[{part.get('type', 'part')}]"
    return show(part)


def _reply(completion: Completion) -> str:
    called = [f"{call.name}({call.arguments})" for call in completion.tool_calls]
    texts = [completion.text] if completion.text or not called else []
    return cut("\n".join([*texts, *(f"tool call: {text}" for text in called)]), MESSAGE_LIMIT)
