"""Where user code failed, and what that usually means: the line, a traceback without paths, the likely cause.

Trained code is not the user's: its errors say something of the values on trial, and are left to the optimizer.
"""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aggregator.agents.parameters import ParameterNode
from aggregator.errors import AggregatorError, GuideError
from aggregator.records import Completion, Failure, Stage

_PACKAGE = str(Path(__file__).parent.parent)
_STANDARD = tuple(filter(None, {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}))
_INSTALLED = tuple(filter(None, {sysconfig.get_path(name) for name in ("purelib", "platlib")}))
_FRAMES_SHOWN = 12
_TRAINED = ", trained>"
"""How the file of trained code ends that runs in this process."""


def where_of(error: BaseException, stage: Stage) -> str:
    """Return the innermost line of the user's own code, as "agent.py:12 in forward".

    If there is none, as where the call does not fit the function, it is the call of the agent or of the guide, else "".
    """
    if own := _own_frames(error):
        return f"{Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}"
    return f"the call of the {stage}" if stage in ("agent", "guide") else ""


def traceback_of(error: BaseException) -> str:
    """Return the traceback through the user's code, with file names and no paths; "" for code that is not theirs."""
    lines = [
        f"  {Path(frame.filename).name}:{frame.lineno} in {frame.name}: {(frame.line or '').strip()}"
        for frame in _own_frames(error)[-_FRAMES_SHOWN:]
    ]
    return "\n".join(lines)


def is_bug(error: BaseException) -> bool:
    """Return True if an error is that of code which the user wrote: not of trained code, not one of the library's.

    The library's own errors are those of calls, values and replies, which another value may mend; a guide that gives no
    verdict is the user's.
    """
    if isinstance(error, GuideError):
        return True
    if isinstance(error, AggregatorError) or hasattr(error, "source_line"):
        return False
    return not any(frame.filename.endswith(_TRAINED) for frame in traceback.extract_tb(error.__traceback__))


def check_output(output: Any) -> None:
    """Raise TypeError for what no agent means to return: something that must be awaited or read first."""
    what = ""
    if inspect.iscoroutine(output):
        output.close()  # no warning that it was never awaited: the error says so
        what = "a coroutine; write `await` before the call"
    elif inspect.isasyncgen(output):
        what = "an async generator; collect it with `async for`"
    elif inspect.isawaitable(output):
        what = f"an awaitable {type(output).__name__}; write `await` before the call"
    elif inspect.isgenerator(output):
        what = "a generator; return what it yields, as in list(...)"
    elif isinstance(output, Completion):
        what = "a Completion; return its text, as in self.llm(...).text"
    elif isinstance(output, ParameterNode):
        what = "a ParameterNode; return its value, as in self.prompt.data"
    if what:
        raise TypeError(f"Expected the agent's answer, got {what}")


def show_failure(record: Failure) -> str:
    """Return a failure with its traceback."""
    where = f" (at {record.where})" if record.where and not record.traceback else ""
    trace = f"Traceback of the user's code:\n{record.traceback}\n" if record.traceback else ""
    return f"{trace}{record.error}: {record.message}{where}"


def failures_left(failures: Sequence[Failure]) -> list[str]:
    """Return one line for each kind of error of the user's code: how often, where, and the first one's traceback."""
    kinds: dict[tuple[str, str, str], list[Failure]] = {}
    for record in failures:
        if record.where and record.stage in ("agent", "guide"):
            kinds.setdefault((record.stage, record.error, record.where), []).append(record)
    return [
        f"the {stage} failed {len(found)} times with {error} at {where}, first on sample "
        f"{found[0].sample_id}\n{show_failure(found[0])}"
        for (stage, error, where), found in kinds.items()
    ]


def _own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of the user's code, the innermost last: of installed packages if there are no others."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and not _is_in(frame.filename, (_PACKAGE,))
    ]
    own = [frame for frame in frames if not _is_in(frame.filename, (*_STANDARD, *_INSTALLED))]
    return own or [frame for frame in frames if _is_in(frame.filename, _INSTALLED)]


def _is_in(file: str, folders: tuple[str, ...]) -> bool:
    return any(file.startswith((f"{folder}/", f"{folder}\\")) for folder in folders)
