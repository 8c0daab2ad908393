"""An observer that writes the values of each step as lines."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from aggregator.observing.observer import LoggingObserver
from aggregator.text import readable

_COLORS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36, "white": 37}


class ConsoleLogger(LoggingObserver):
    """Writes `[step 3] name: value` to a stream, standard output by default.

    It is an observer and has Trace's `log`, so `observers=[ConsoleLogger()]` and `logger=ConsoleLogger()` both work.
    `color` paints a line if the stream is a terminal and NO_COLOR is not set.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        """Write one named value of one step; `color` is red, green, yellow, blue, magenta, cyan or white."""
        stream = self._stream or sys.stdout
        line = f"[step {step}] {name}: {readable(data)}"
        stream.write(painted(line, kwargs.get("color"), stream) + "\n")


def painted(text: str, color: str | None, stream: TextIO) -> str:
    """Return the text in a color, where the stream shows colors."""
    code = _COLORS.get(color or "")
    return f"\x1b[{code}m{text}\x1b[0m" if code and shows_colors(stream) else text


def shows_colors(stream: TextIO) -> bool:
    """Whether a stream is a terminal and NO_COLOR (no-color.org) is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")
