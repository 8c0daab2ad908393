"""For tables that name the tests which hold something: whether those tests exist."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path


def missing(tests: Iterable[str]) -> list[str]:
    """Return those of `file::name`, files below this folder, that do not exist; what is no such name is a reason."""
    named = [test.split("::") for test in tests if "::" in test]
    return [f"{file}::{name}" for file, name in named if name not in _names_in(Path(__file__).parent / file)]


@cache
def _names_in(path: Path) -> frozenset[str]:
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions))
