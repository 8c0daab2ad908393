"""A folder of texts as parameters: skills, prompts, a repository. Each run works in a copy of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct

from aggregator.adapters.frameworks import HostParameter
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError
from aggregator.files import write_atomically
from aggregator.text import show_size

MAX_FOLDER = 256 << 20
"""The maximum size in bytes of a folder that is copied for each run."""


class Folder(Struct, frozen=True):
    """A folder with files that are parameters: `files` are paths in it."""

    path: Path
    files: tuple[str, ...]
    ignored: tuple[str, ...] = ()


def folder_parameters(path: str | os.PathLike[str], *patterns: str, ignore: Sequence[str] = ()) -> Folder:
    """Return a folder in which the files that match a pattern are parameters, named by their path: `skills/search.md`.

    Patterns are those of `Path.glob`; links are left out. Names that match one of `ignore`, such as `node_modules` or
    `*.log`, are not copied for a run. Accepted values are written to the folder's own files. Raises ConfigError for a
    folder that is missing, without a matching file, or too large to be copied for each run.
    """
    root = Path(path).resolve()
    if not root.is_dir():
        raise ConfigError(f"Expected a folder, got {os.fspath(path)!r}")
    found = {one for pattern in patterns or ("*",) for one in root.glob(pattern)}
    files = sorted(one.relative_to(root).as_posix() for one in found if one.is_file() and not one.is_symlink())
    if not files:
        raise ConfigError(f"Expected files that match {', '.join(map(repr, patterns))} in {root.name!r}, got none")
    for name in files:
        try:
            (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"Expected texts in UTF-8, got {name!r}; choose files by other patterns") from None
    leave = shutil.ignore_patterns(*ignore)
    size = sum(Path(at, name).lstat().st_size for at, names in _walk(root, leave) for name in names)
    if size > MAX_FOLDER:
        raise ConfigError(
            f"Expected a folder of at most {show_size(MAX_FOLDER)}, which is copied for each run, got "
            f"{show_size(size)} in {root.name!r}; leave parts out with ignore="
        )
    return Folder(root, tuple(files), tuple(ignore))


def _walk(root: Path, leave: Any) -> Iterator[tuple[str, list[str]]]:
    for at, folders, names in os.walk(root):
        left_out = leave(at, [*folders, *names])
        folders[:] = [name for name in folders if name not in left_out]
        yield at, [name for name in names if name not in left_out]


def copy_with(folder: Folder, texts: Mapping[str, str], target: Path) -> None:
    """Copy a folder, with these texts in its files."""
    shutil.copytree(folder.path, target, symlinks=True, ignore=shutil.ignore_patterns(*folder.ignored))
    for name, text in texts.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")


def text_of(path: Path, name: str) -> ParameterNode[Any]:
    """Return a file as a parameter: its text is the stored value."""
    write = partial(_write_text, path)
    return HostParameter(partial(path.read_text, encoding="utf-8"), write, name=name, description=f"the file {name}")


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, text.encode(errors="backslashreplace"), private=False)
