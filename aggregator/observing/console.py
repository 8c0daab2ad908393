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
    `color` paints a line if the stream shows colors.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        """Write one named value of one step; `color` is red, green, yellow, blue, magenta, cyan or white."""
        stream = self._stream or sys.stdout
        line = f"[step {step}] {name}: {readable(data)}"
        stream.write(painted(line, kwargs.get("color"), stream) + "\n")


def painted(text: str, color: str | None, stream: TextIO) -> str:
    """Return the text in a color if the stream shows colors, else as it is."""
    code = _COLORS.get(color or "")
    return f"\x1b[{code}m{text}\x1b[0m" if code and shows_colors(stream) else text


def shows_colors(stream: TextIO) -> bool:
    """Return True for a terminal that is not dumb. FORCE_COLOR and NO_COLOR (no-color.org) decide first."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"
