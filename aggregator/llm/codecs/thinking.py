"""Models that think aloud inside their answer: `<think>…</think>` at its start is reasoning, not text."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"
BEFORE_THINKING = "< \n\t\r"  # an answer that begins with none of these does not begin with a tag


def split_thinking(content: str) -> tuple[str, str]:
    r"""Split an answer into (text, reasoning); an answer cut while thinking has no text.

    >>> split_thinking("<think>two and two</think>\n\n4")
    ('4', 'two and two')
    """
    if content[:1] not in BEFORE_THINKING or not (start := content.lstrip()).startswith(OPEN):
        return content, ""
    reasoning, _, text = start[len(OPEN) :].partition(CLOSE)
    return text.lstrip(), reasoning.strip()


class ThinkingFilter:
    """The same over a stream: `feed` returns the text alone, and holds back what may still turn out to be a tag."""

    def __init__(self) -> None:
        self._held = ""
        self._state = "start"

    def feed(self, delta: str) -> str:
        """Take the next piece of content and return what of it is certainly text."""
        if self._state == "text":
            return delta
        self._held += delta
        if self._state == "start":
            start = self._held.lstrip()
            if OPEN.startswith(start[: len(OPEN)]) and len(start) < len(OPEN):
                return ""
            if not start.startswith(OPEN):
                return self.flush()
            self._state, self._held = "thinking", start[len(OPEN) :]
        if self._state == "thinking":
            _, closed, rest = self._held.partition(CLOSE)
            if not closed:
                return ""
            self._state, self._held = "after", rest
        self._held = self._held.lstrip()
        return self.flush() if self._held else ""

    def flush(self) -> str:
        """Return what was held back once it is known to be text, at the latest when the stream ends."""
        if self._state == "thinking":
            return ""
        held, self._held, self._state = self._held, "", "text"
        return held
