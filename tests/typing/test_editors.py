"""What editors complete and what a user's type checker finds: Jedi and Pyright, in an environment of their own.

`make test-editors` runs this; without the two it is skipped. What mypy finds is in `public_api.py` and
`user_program.py`, which `make check` reads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

jedi: Any = pytest.importorskip("jedi", reason="jedi is not installed; run make test-editors")
PYRIGHT = Path(sys.executable).with_name("pyright")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]

needs_pyright = pytest.mark.skipif(not PYRIGHT.exists(), reason="pyright is not installed; run make test-editors")

LLM = "from aggregator import LLM\nllm = LLM('openai/gpt-4o-mini')\n"
TRAINER = "from aggregator import AggregatedUpdate, LLMOptimizer\nt = AggregatedUpdate(None, LLMOptimizer())\n"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from aggregator import Agg", {"AggregatedUpdate"}),
        ("import aggregator\naggregator.Par", {"ParameterNode"}),
        (LLM + "llm.", {"complete", "stream", "model"}),
        (LLM + "llm(messages='Hi').", {"text", "usage", "choices"}),
        ("from aggregator import ParameterNode\np = ParameterNode('five')\np.", {"data", "name", "constraint"}),
        (TRAINER + "t.", {"train", "atrain", "agent"}),
        (TRAINER + "t.train(1, [])." + "", {"parameters", "history", "test_scores"}),
        ("from aggregator.testing import Fake", {"FakeTransport"}),
        ("from aggregator.guides import exact", {"exact_match"}),
        ("from aggregator.simulation import Sim", {"SimulatedModel"}),
    ],
)
def test_completion_found_errors_only(source: str, names: set[str]) -> None:
    """`from aggregator import Agg` completed to AggregatorError and AggregatorWarning only, `llm.` to nothing."""
    lines = source.split("\n")
    project = jedi.Project(str(ROOT), added_sys_path=[str(ROOT)])
    completed = jedi.Script(source, project=project).complete(len(lines), len(lines[-1]))
    assert names <= {completion.name for completion in completed}


def checked_by_pyright(tmp_path: Path, file: Path) -> dict[int, str]:
    """Return line -> the first error there, for a program alone."""
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"include": [file.name], "extraPaths": [str(ROOT)], "enableTypeIgnoreComments": False})
    )
    (tmp_path / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    done = subprocess.run(
        [PYRIGHT, "--pythonpath", sys.executable, "--outputjson"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        text=True,
    )
    found = [one for one in json.loads(done.stdout)["generalDiagnostics"] if one["severity"] == "error"]
    return {one["range"]["start"]["line"] + 1: one["message"] for one in reversed(found)}


@needs_pyright
def test_pyright_finds_the_mistakes_of_a_users_program(tmp_path: Path) -> None:
    """It reports the lines that mypy reports, which have a `type: ignore`, and no other."""
    program = HERE / "user_program.py"
    lines = program.read_text(encoding="utf-8").splitlines()
    wrong = [number for number, line in enumerate(lines, 1) if "# type: ignore[" in line]
    assert sorted(checked_by_pyright(tmp_path, program)) == wrong
    assert len(wrong) >= 3
