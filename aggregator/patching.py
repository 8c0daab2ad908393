"""Replace functions of other modules while a holder needs it, and restore them exactly.

Each replacement decides per call whether it does anything, so a held patch changes nothing for code without an open run
or cassette. The replaced functions and the count of holders are state of the process.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

_MISSING = object()


class Patch(NamedTuple):
    """One function to replace: `wrap(original)` replaces `module`'s attribute `path`, such as `"Thread.start"`."""

    module: str
    path: str
    wrap: Callable[[Any], Any]


class _Installed(NamedTuple):
    owner: Any
    name: str
    before: Any  # the owner's own attribute: `_MISSING` if it inherited the function
    replacement: Any


class Patches:
    """Patches that are installed together by their first holder, until the last one has released them.

    A module imported later is patched then. A module or attribute that does not exist is skipped.
    """

    def __init__(self, patches: Sequence[Patch]) -> None:
        self.holders = 0
        self._patches = tuple(patches)
        self._installed: list[_Installed] = []
        self._lock = threading.RLock()

    def hold(self) -> None:
        """Install the patches, unless they are installed."""
        with self._lock:
            self.holders += 1
            if self.holders > 1:
                return
            due: list[str] = []
            for patch in self._patches:
                module = sys.modules.get(patch.module)
                if module is None or getattr(getattr(module, "__spec__", None), "_initializing", False):
                    due.append(patch.module)
                else:
                    self._install(module, patch)
            _imports.watch(due, self._imported)

    def release(self) -> None:
        """Restore the originals, once there are no more holders.

        Another library's later patch on top is kept: its function calls ours, which passes calls on.
        """
        with self._lock:
            self.holders -= 1
            if self.holders:
                return
            _imports.unwatch(self._imported)
            while self._installed:
                owner, name, before, replacement = self._installed.pop()
                if vars(owner).get(name) is not replacement:
                    continue
                if before is _MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)

    def _imported(self, module: ModuleType) -> None:
        with self._lock:
            for patch in self._patches if self.holders else ():
                if patch.module == module.__name__:
                    self._install(module, patch)

    def _install(self, module: ModuleType, patch: Patch) -> None:
        *owners, name = patch.path.split(".")
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part, None)
        original = getattr(owner, name, None)
        if original is None:
            return
        replacement = patch.wrap(original)
        self._installed.append(_Installed(owner, name, vars(owner).get(name, _MISSING), replacement))
        setattr(owner, name, replacement)


class _Imports(MetaPathFinder):
    """Calls back when a module was imported; in `sys.meta_path` only while a callback is registered."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Callable[[ModuleType], None]]] = {}
        self._lock = threading.RLock()

    def watch(self, names: Sequence[str], callback: Callable[[ModuleType], None]) -> None:
        """Register a callback for the import of a module with one of these names."""
        with self._lock:
            for name in names:
                if callback not in (callbacks := self._waiting.setdefault(name, [])):
                    callbacks.append(callback)
            if names and self not in sys.meta_path:
                sys.meta_path.insert(0, self)

    def unwatch(self, callback: Callable[[ModuleType], None]) -> None:
        """Remove a callback."""
        with self._lock:
            for name, callbacks in list(self._waiting.items()):
                if callback in callbacks:
                    callbacks.remove(callback)
                if not callbacks:
                    del self._waiting[name]
            if not self._waiting and self in sys.meta_path:
                sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of the other finders, with a loader that calls back."""
        if name not in self._waiting:
            return None
        for finder in sys.meta_path:
            if finder is not self and (find := getattr(finder, "find_spec", None)) is not None:
                spec: ModuleSpec | None = find(name, path, target)
                if spec is not None:
                    if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                        spec.loader = _Calling(spec.loader, self)
                    return spec
        return None

    def imported(self, module: ModuleType) -> None:
        """Call the callbacks registered for this module."""
        for callback in tuple(self._waiting.get(module.__name__, ())):
            callback(module)


class _Calling(Loader):
    """Another loader, whose module is announced after its execution."""

    def __init__(self, loader: Any, imports: _Imports) -> None:
        self._loader, self._imports = loader, imports

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Let the other loader make the module."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Let the other loader execute the module, restore it as the module's loader, and announce the module."""
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._imports.imported(module)


_imports = _Imports()
