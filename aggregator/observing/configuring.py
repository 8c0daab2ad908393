"""Where the library's events go: to a console for people, or to JSON lines for machines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from aggregator.errors import ConfigError
from aggregator.observing.events import LOGGER

Format = Literal["console", "json"]

_MARK = "aggregator-configured"


def configure_logging(
    format: Format = "console",  # noqa: A002 - the word users look for
    *,
    level: int | str = "INFO",
    stream: TextIO | None = None,
    path: str | Path | None = None,
) -> None:
    """Show the library's events: as lines for people, or as one JSON object per line.

    They go to `stream` (default: standard error), or are appended to the file at `path`. Called again, it replaces
    what it configured before; handlers of the application stay. Raises ConfigError for a wrong argument.
    """
    if stream is not None and path is not None:
        raise ConfigError(f"Expected a stream or a path, got both (path={str(path)!r}); give one of them")
    handler = _handler(stream, path)
    handler.setFormatter(formatter(format, colors=path is None and _is_terminal(stream or sys.stderr)))
    handler.set_name(_MARK)
    try:
        LOGGER.setLevel(level)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"Expected a logging level such as 'INFO' or 20, got level={level!r}") from error
    for old in [old for old in LOGGER.handlers if old.get_name() == _MARK]:
        LOGGER.removeHandler(old)
        old.close()
    LOGGER.addHandler(handler)
    LOGGER.propagate = False


def formatter(format: Format, *, colors: bool = False) -> logging.Formatter:  # noqa: A002 - the same word
    """Return what turns an event into a line."""
    import structlog

    renderers: dict[str, Any] = {
        "console": structlog.dev.ConsoleRenderer(colors=colors),
        "json": structlog.processors.JSONRenderer(default=str),
    }
    if format not in renderers:
        raise ConfigError(f"Expected format 'console' or 'json', got {format!r}")
    stamps: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=stamps,
        processors=[
            *stamps,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            renderers[format],
        ],
    )


@contextmanager
def events_file(path: str | Path) -> Iterator[None]:
    """Write every event of the block to a new file of JSON lines, beside whatever is configured."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(target, mode="w", encoding="utf-8")
    handler.setFormatter(formatter("json"))
    level = LOGGER.level
    LOGGER.addHandler(handler)
    if not LOGGER.isEnabledFor(logging.INFO):
        LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)
        handler.close()


def _handler(stream: TextIO | None, path: str | Path | None) -> logging.Handler:
    if path is None:
        return logging.StreamHandler(stream)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return logging.FileHandler(target, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Expected a path that can be written, got {str(path)!r}: {error.strerror}") from error


def _is_terminal(stream: TextIO) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())
