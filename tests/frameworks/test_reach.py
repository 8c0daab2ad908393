"""The table of frameworks: what counts as glue, and that table, examples and document agree."""

from __future__ import annotations

import re
import runpy
from itertools import chain

import pytest
from reach import CASES, COLUMNS, DOCUMENT, MOST_CONCEPTS, MOST_LINES, ROOT, Case, glue_of, rows_of, skipped

EXAMPLE = """
import agents
from aggregator import optimize, trainable

support = agents.Agent(
    name="support",
)

@trainable
def route(ticket):
    return ticket

agent = trainable(support)
trained = optimize(
    agent, [], guide=None,
)
agents.run(support)
print(trained)
"""
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_lines_that_use_the_library_are_glue() -> None:
    """The import, the decorator, `trainable`, three lines of `optimize` and the `print` of its result."""
    assert glue_of(EXAMPLE) == (7, 2)


def test_lines_inside_a_function_count_by_themselves() -> None:
    """The result is (lines that name something of ours, imported names)."""
    assert glue_of("from aggregator import LLM\n\ndef f(x):\n    y = 1\n    return LLM(y)\n") == (2, 1)


@CASE
def test_an_example_needs_few_lines_and_concepts(case: Case) -> None:
    glue = glue_of(case.example.read_text(encoding="utf-8"))
    assert glue.lines <= MOST_LINES
    assert glue.concepts <= MOST_CONCEPTS


@CASE
def test_the_document_shows_the_example_that_is_measured(case: Case) -> None:
    shown = f"```python examples/frameworks/{case.example.name}\n"
    document = DOCUMENT.read_text(encoding="utf-8")
    assert (
        document.partition(shown)[2].partition("```\n")[0]
        == case.example.read_text(encoding="utf-8").partition('"""\n\n')[2]
    )


@CASE
def test_the_committed_table_has_a_measured_row(case: Case) -> None:
    """A row that was skipped, or that lacks a column, is not committed."""
    row = rows_of(DOCUMENT.read_text(encoding="utf-8"))[case.name]
    assert row.count(" | ") == len(COLUMNS) - 1
    assert "skipped" not in row


def test_a_framework_that_is_missing_is_a_row_with_the_reason() -> None:
    row = skipped(Case("x", "x", "x"), "No module named 'x'")
    assert row.startswith("| x | - | skipped: No module named 'x' | ")
    assert row.count("|") == len(COLUMNS) + 1


def test_the_oldest_accepted_versions_have_environments() -> None:
    """Each lower bound in the package is tested by `reach.py --oldest`; GEPA's is the only version so far."""
    environments = runpy.run_path(str(ROOT / "tests" / "environments.py"))
    pins = dict(
        pin.split("==")
        for pin in chain(*environments["OLDEST"].values(), environments["ENVIRONMENTS"]["gepa"].requirements)
        if "==" in pin
    )
    asked: dict[str, list[tuple[int, ...]]] = {}
    for file in (ROOT / "aggregator").rglob("*.py"):
        for package, at_least in re.findall(
            r'^ *require_version\("([\w-]+)", "([\d.]+)"', file.read_text("utf-8"), re.MULTILINE
        ):
            asked.setdefault(package, []).append(tuple(map(int, at_least.split("."))))
    tested = {package.partition("[")[0]: tuple(map(int, version.split("."))) for package, version in pins.items()}
    untested = {
        package: min(versions)
        for package, versions in asked.items()
        if tested.get(package, ())[: len(min(versions))] != min(versions)
    }
    assert len(asked) > 8
    assert not untested
