"""What an error means for a run: the agent's own doing, a lost call, or the end."""

from __future__ import annotations

from aggregator.errors import (
    SuggestionError,
    ends_run,
    is_infrastructure,
)
from aggregator.records import Failure, Stage
from aggregator.text import show_error

MESSAGE_LIMIT = 4_000
"""How many characters of an error's message a record keeps."""


def is_lost(record: Failure) -> bool:
    """Tell whether an instance was lost: a call failed, or guide or optimizer did, which says nothing of the agent."""
    return record.infrastructure or (record.stage != "agent" and record.error != SuggestionError.__name__)


def root_of(error: BaseException) -> BaseException:
    """Return what a group of errors comes down to: what ends the run, else a lost call, else the first by name.

    An agent that fans out in a TaskGroup raises groups, whose order is that of completion.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [root_of(inner) for inner in error.exceptions]
    return min(leaves, key=lambda leaf: (not ends_run(leaf), not is_infrastructure(leaf), show_error(leaf)))


def failure(stage: Stage, error: BaseException, *, sample_id: int | None = None) -> Failure:
    """Record an error: class and message, never a traceback with addresses."""
    cause = root_of(error)
    name = type(cause).__name__
    message = show_error(cause, MESSAGE_LIMIT).removeprefix(name).removeprefix(": ") or name
    return Failure(
        stage=stage,
        error=name,
        message=message.encode(errors="backslashreplace").decode(),  # a lone surrogate fits neither file nor prompt
        sample_id=sample_id,
        infrastructure=is_infrastructure(cause),
    )
