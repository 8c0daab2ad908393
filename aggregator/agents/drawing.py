"""A transcript as a picture: Mermaid text, which GitHub, JupyterLab and many editors draw without a program."""

from __future__ import annotations

import re
from collections.abc import Iterator

from aggregator.agents.spans import Group, LLMCall, Span

WORDS_SHOWN = 60
"""How many characters of one value a box holds."""

_UNSAFE = re.compile(r"[^\w .,=()/+-]")


class Picture:
    """The lines of a flowchart under way; `left` says for how many boxes there is room."""

    def __init__(self, limit: int) -> None:
        self.lines: list[str] = ["flowchart TD"]
        self.left = limit
        self.boxes = 0
        self.left_out = 0

    def draw(self, group: Group, parent: str | None = None) -> None:
        """Draw what a group holds: a line from its parent to the first, dotted ones to what came next.

        What concurrent tasks did starts at the parent again, each in a row of its own.
        """
        before = None
        for item in group.items:
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
        self.lines.append(f'  {name}{opening}"{text}"{closing}{":::failed" if _failed(item) else ""}')
        return name

    def finished(self) -> str:
        """Return the text, with a box for what had no room."""
        last = [f'  more["... {self.left_out} more"]'] if self.left_out else []
        return "\n".join([*self.lines, *last, "  classDef failed stroke:#e0524a,stroke-width:2px"])


def escaped(text: str) -> str:
    """Return text as it may stand in a label: what could end it, or mean something to Mermaid, as a number.

    >>> escaped('say "no"')
    'say #34;no#34;'
    """
    return _UNSAFE.sub(lambda found: f"#{ord(found[0])};", text)


def _label(item: Span | LLMCall) -> Iterator[str]:
    facts: list[tuple[str, str]]
    if isinstance(item, LLMCall):
        yield "LLM call"
        facts = [*item.messages[-1:], *([item.reply] if item.reply else [])]
    else:
        yield item.name
        facts = [*item.inputs, *([item.outcome] if item.outcome else [])]
    for key, value in facts:
        yield f"{key} = {_brief(value)}"


def _brief(value: str) -> str:
    line = " ".join(value.split())
    return line if len(line) <= WORDS_SHOWN else line[: WORDS_SHOWN - 3] + "..."


def _failed(item: Span | LLMCall) -> bool:
    ended = item.reply if isinstance(item, LLMCall) else item.outcome
    return ended is not None and ended[0] in {"raised", "failed"}
