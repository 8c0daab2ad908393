"""The benchmark harness: fresh processes, medians, ratios, and reports of missing peers."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.__main__ import benchmarks, main
from benchmarks.harness import BenchmarkError, Case, Measured, Options, call, measure, run_case
from benchmarks.report import Missing, Report, Row, Target, as_json, as_text

ONCE = Options(repetitions=1)


def printing(**figures: float) -> list[str]:
    return ["-c", f"print('noise'); print({json.dumps(figures)!r})"]


def test_each_case_runs_in_its_own_process() -> None:
    """Two cases never share an interpreter, and none runs in the harness's own."""
    command = ["-c", "import os, json; print(json.dumps({'pid': os.getpid()}))"]
    measured = measure([Case("a", command), Case("b", command)], Options(repetitions=2))
    pids = [figures["pid"] for runs in measured.figures.values() for figures in runs]
    assert len(set(pids)) == 4


def test_a_missing_peer_is_named_with_its_remedy() -> None:
    """The report says how to install it."""
    measured = measure([Case("ours", printing(us=1)), Case("peer", printing(us=2), needs=("no_such_peer",))], ONCE)
    assert list(measured.figures) == ["ours"]
    assert measured.missing == [Missing("peer", ("no_such_peer",))]
    assert "pip install no_such_peer" in measured.missing[0].remedy
    assert [row.note for row in measured.rows()] == ["", "missing"]
    assert measured.ratio("ours", "peer", "us") is None


def test_medians_and_ratios_use_pairs_of_one_repetition() -> None:
    """A ratio compares two runs made together, not the extremes of two series."""
    measured = Measured({"a": [{"s": 1.0}, {"s": 20.0}, {"s": 3.0}], "b": [{"s": 2.0}, {"s": 40.0}, {"s": 2.0}]})
    assert measured.median("a", "s") == 3.0
    assert measured.ratio("a", "b", "s") == 0.5


def test_a_failed_case_is_an_error_with_its_output() -> None:
    """A process that fails gives an error, never a figure."""
    with pytest.raises(BenchmarkError, match=r"'broken' ended with 1:[\s\S]*ValueError: no such thing"):
        run_case(Case("broken", ["-c", "raise ValueError('no such thing')"]))


def test_call_runs_a_function_of_a_benchmark_module() -> None:
    """`call` names a function and its arguments; the function returns the figures."""
    assert str(run_case(Case("show", call("report", "show", value=1234.5)))) == "1,234"


@pytest.mark.parametrize(
    ("value", "at_least", "verdict"), [(5.0, False, "met"), (5.1, False, "MISSED"), (4.0, True, "MISSED")]
)
def test_a_target_is_met_or_missed(value: float, at_least: bool, verdict: str) -> None:
    """A target is an upper or a lower limit; without a measurement it is neither met nor missed."""
    assert Target("x", value, 5.0, at_least=at_least).verdict == verdict
    assert Target("x", None, 5.0).verdict == "not measured"


def test_a_report_is_a_table_and_json() -> None:
    """Both forms have command, machine, figures, targets and missing peers."""
    report = Report([Row("ours", {"us": 1.5})], [Target("cost", 1.5, 2.0, "us")], [Missing("peer", ("peer",))], ["so"])
    text = as_text("name", "title", "python -m benchmarks name", "machine", report)
    assert text.splitlines()[3:8] == [
        "",
        "         us",
        "  ours  1.5",
        "",
        "  target  measured  to reach",
    ]
    data = as_json("name", "title", "python -m benchmarks name", "machine", report)
    assert data["targets"][0]["verdict"] == "met"
    assert "peer was not measured" in data["missing"][0]["remedy"]


def test_every_benchmark_is_documented() -> None:
    """The list of names comes from the modules; each has a line about what it measures."""
    assert "import" in benchmarks()
    assert all((module.__doc__ or "").strip() for module in benchmarks().values())


def test_an_unknown_name_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """The error for a wrong name lists the valid ones."""
    assert main(["nothing"]) == 2
    assert "import" in capsys.readouterr().err


def test_another_interpreter_runs_peers() -> None:
    """--peers-python is used if this interpreter lacks a module."""
    case = Case("peer", printing(us=1), needs=("pytest",))
    assert measure([case], Options(repetitions=1, peers_python=sys.executable)).versions["pytest"]
