"""Examples in docstrings: every one of the package is found by doctest, and runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import aggregator

PACKAGE = Path(aggregator.__file__).parent
FRAMEWORKS = ("adapters", "hosts")
"""Rooms with files that import a framework: their tests run in an environment that has it."""


FACES = (
    *("errors", "executors", "gates", "guides", "llm", "observing", "optimizers", "providers", "rules", "schedules"),
    *("searches", "simulation", "stops", "testing"),
)


def modules() -> Iterator[tuple[Path, ModuleType]]:
    """Yield each file of the package with its module, without those whose framework is not installed."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "__main__.py":
            continue
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        try:
            yield path, importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        except ImportError as error:  # the folder tests/agents hides a package of that name
            if parts[1] not in FRAMEWORKS or str(error.name).startswith("aggregator"):
                raise


def test_examples_in_docstrings_run() -> None:
    """Every example in a docstring prints what it states."""
    failed: list[str] = []
    reports: list[str] = []
    for _, module in modules():
        for case in doctest.DocTestFinder().find(module):
            outcome = doctest.DocTestRunner(verbose=False).run(case, out=reports.append)
            failed += [case.name] * bool(outcome.failed)
    assert failed == [], "".join(reports)


def test_no_example_in_a_docstring_is_lost() -> None:
    """Doctest finds as many examples as a file's docstrings have; a decorator or a property can hide one."""
    lost = []
    for path, module in modules():
        written = sum(len(doctest.DocTestParser().get_examples(text)) for text in docstrings(path))
        found = sum(len(case.examples) for case in doctest.DocTestFinder().find(module))
        if found < written:  # a function and its sync face share one
            lost.append(f"{path.relative_to(PACKAGE)}: {found} of {written} examples")
    assert lost == []


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstring of each module, class and function in a file, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


MOST_USED = (
    *("LLM", "Budget", "cassette", "as_model", "Module", "ParameterNode", "bundle", "as_agent", "trainable"),
    *("exact_match", "LLMOptimizer", "LLMMerge", "AggregatedUpdate", "optimize", "evaluate", "lineage", "transcript"),
)


def test_the_names_of_the_first_hour_have_an_example() -> None:
    """`help()` of what a newcomer uses first shows code that runs."""
    assert [name for name in MOST_USED if ">>>" not in (inspect.getdoc(getattr(aggregator, name)) or "")] == []


def test_every_public_name_is_described() -> None:
    """Each name of the root and of the faces has a docstring that begins with a sentence."""
    bare = []
    for face in (aggregator, *(importlib.import_module(f"aggregator.{name}") for name in FACES)):
        for name in face.__all__:
            described = getattr(face, name)
            if not isinstance(described, str | int | float | tuple | dict) and not hasattr(described, "__args__"):
                first = (inspect.getdoc(described) or "").partition("\n\n")[0]
                bare += [f"{face.__name__}.{name}"] * (not first.rstrip().endswith((".", ":", "`")))
    assert bare == []
