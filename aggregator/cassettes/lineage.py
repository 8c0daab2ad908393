"""Where in the run a call stands: a path that travels along in a context variable.

Identical requests are told apart by their lineage, so a replay is exact whatever finishes first.
Every concurrent branch sets its own part; asyncio copies the path into each task.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import lru_cache
from types import TracebackType
from typing import Any

from aggregator import portal
from aggregator.errors import ConfigError
from aggregator.records import Role
from aggregator.text import show_call

_PATH: ContextVar[str] = ContextVar("aggregator_lineage", default="")
_ROLE: ContextVar[Role] = ContextVar("aggregator_role", default="agent")
# what was before each block of this context, the innermost first: one object may be entered by several tasks at once
_OUTER: ContextVar[tuple[str, Role, portal.Branch | None, Any] | None] = ContextVar("aggregator_outer", default=None)

current_lineage = _PATH.get
"""Return the path of this context, such as `train/epoch=0/batch=3/sample=17/propose`; "" outside of any."""

current_role = _ROLE.get
"""Return who asks the model in this context; "agent" outside of any."""


class lineage(AbstractContextManager[str]):  # noqa: N801 - reads as a word at its use: `with lineage("retrieve"):`
    """Extend the path of every call made inside, and say who calls when `role` is given.

    With `root=True` the parts are the whole path, and what surrounds the block adds nothing.

    >>> with lineage("train", "epoch=0"), lineage("propose", role="optimizer"):
    ...     print(current_lineage(), current_role())
    train/epoch=0/propose optimizer
    """

    def __init__(self, *parts: str, role: Role | None = None, root: bool = False) -> None:
        self._parts = _joined(parts)
        self._role = role
        self._root = root

    def __repr__(self) -> str:
        return show_call("lineage", self._parts, role=self._role, root=self._root)

    def __enter__(self) -> str:
        """Return the extended path."""
        path, parts = _PATH.get(), self._parts
        here = parts if self._root else f"{path}/{parts}" if path and parts else path or parts
        branch = portal.current_branch()
        _OUTER.set((path, _ROLE.get(), branch, _OUTER.get()))
        _PATH.set(here)
        if branch is not None:
            portal.set_branch(branch.within())
        if self._role:
            _ROLE.set(self._role)
        return here

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the path from before."""
        outer = _OUTER.get()
        if outer is not None:  # else left in another context than entered, which has its own
            path, role, branch, further = outer
            _PATH.set(path)
            if branch is not None:
                portal.set_branch(branch)
            _ROLE.set(role)
            _OUTER.set(further)


def lineage_at(path: str, role: Role) -> lineage:
    """Replace the path and the role for calls made inside: those of a call that another process makes.

    >>> with lineage("train"), lineage_at("train/sample=3", "guide"):
    ...     print(current_lineage(), current_role())
    train/sample=3 guide
    """
    return lineage(*([path] if path else []), role=role, root=True)


@lru_cache(maxsize=1024)
def _joined(parts: tuple[Any, ...]) -> str:
    for part in parts:
        if not isinstance(part, str) or not part or not part.isprintable():
            raise ConfigError(f"Expected non-empty printable text as a part of a lineage, got {part!r}")
    return "/".join(parts)


def natural(path: str) -> tuple[tuple[str, int, str], ...]:
    """Return a sort key in which numbers count as numbers.

    >>> sorted(["sample=10/a", "sample=9/a", "sample=9"], key=natural)
    ['sample=9', 'sample=9/a', 'sample=10/a']
    """
    return tuple(_natural_part(part) for part in path.split("/")) if path else ()


def _natural_part(part: str) -> tuple[str, int, str]:
    name, _, value = part.rpartition("=")
    return (name, int(value), value) if value.isascii() and value.isdigit() and len(value) < 20 else (part, -1, "")
