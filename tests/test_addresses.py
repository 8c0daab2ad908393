"""Modules that programs import under an older name, or change for an experiment."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import aggregator
from aggregator.executors.local import LocalExecutor
from aggregator.testing import ScriptedModel
from aggregator.training import asking

QUESTION = [{"role": "user", "content": "Which number?"}]
MOVED = vars(aggregator)["_MOVED"]
NAMES = [
    ("aggregator.adapters.folders", "Folder"),
    ("aggregator.adapters.folders", "copy_with"),
    ("aggregator.adapters.folders", "folder_parameters"),
    ("aggregator.adapters.folders", "text_of"),
    ("aggregator.agents.artefacts", "Artefact"),
    ("aggregator.agents.artefacts", "read_artefact"),
    ("aggregator.agents.artefacts", "write_artefact"),
    ("aggregator.agents.values", "Unfit"),
    ("aggregator.agents.values", "carried_by_json"),
    ("aggregator.agents.values", "convert"),
    ("aggregator.agents.values", "describe_type"),
    ("aggregator.agents.values", "infer_type"),
    ("aggregator.agents.values", "refuse_oddities"),
    ("aggregator.agents.values", "schema"),
    ("aggregator.agents.values", "snapshot"),
    ("aggregator.cassettes.keys", "Ignore"),
    ("aggregator.cassettes.keys", "canonical"),
    ("aggregator.cassettes.keys", "decode_json"),
    ("aggregator.cassettes.keys", "parse_ignore"),
    ("aggregator.cassettes.keys", "raw_key"),
    ("aggregator.cassettes.keys", "request_key"),
    ("aggregator.cassettes.locking", "FileLock"),
    ("aggregator.cassettes.locking", "fcntl"),
    ("aggregator.cassettes.opening", "Mode"),
    ("aggregator.cassettes.opening", "default_mode"),
    ("aggregator.cassettes.opening", "open_tape"),
    ("aggregator.cassettes.opening", "part_of"),
    ("aggregator.cassettes.opening", "successor_of"),
    ("aggregator.cassettes.reading", "read"),
    ("aggregator.cassettes.reading", "shard_path"),
    ("aggregator.cassettes.saving", "LayoutChoice"),
    ("aggregator.cassettes.saving", "canonical_order"),
    ("aggregator.cassettes.saving", "followed"),
    ("aggregator.cassettes.saving", "save"),
    ("aggregator.cassettes.timing", "FaultKind"),
    ("aggregator.cassettes.timing", "Faults"),
    ("aggregator.cassettes.timing", "Latency"),
    ("aggregator.cassettes.timing", "latency_scale"),
    ("aggregator.demo.agent", "TEAMS"),
    ("aggregator.demo.agent", "TicketRouter"),
    ("aggregator.demo.agent", "right_team"),
    ("aggregator.guides.exact", "ExactMatch"),
    ("aggregator.guides.exact", "exact_match"),
    ("aggregator.guides.numeric", "NumericMatch"),
    ("aggregator.guides.pattern", "Analyzer"),
    ("aggregator.guides.pattern", "KeywordHints"),
    ("aggregator.guides.pattern", "RegexMatch"),
    ("aggregator.hosts.evaluations", "Evaluate"),
    ("aggregator.hosts.evaluations", "HostAgent"),
    ("aggregator.hosts.evaluations", "Judged"),
    ("aggregator.llm.prices", "Price"),
    ("aggregator.llm.prices", "Prices"),
    ("aggregator.llm.prices", "find_price"),
    ("aggregator.llm.prices", "kept_price"),
    ("aggregator.llm.prices", "need_price"),
    ("aggregator.llm.structured", "Validate"),
    ("aggregator.llm.structured", "as_response_format"),
    ("aggregator.llm.structured", "checker"),
    ("aggregator.llm.structured", "parse_json"),
    ("aggregator.observing.console", "ConsoleLogger"),
    ("aggregator.observing.console", "painted"),
    ("aggregator.observing.console", "shows_colors"),
    ("aggregator.observing.progress", "ProgressBar"),
    ("aggregator.observing.trackers", "TensorBoardLogger"),
    ("aggregator.observing.trackers", "WandbLogger"),
    ("aggregator.observing.trackers", "entry"),
    ("aggregator.testing.simulated_model", "SimulatedModel"),
    ("aggregator.testing.simulated_model", "complete"),
    ("aggregator.training.executors", "AsyncExecutor"),
    ("aggregator.training.minibatch", "Minibatch"),
    ("aggregator.training.rules", "best_of"),
    ("aggregator.training.rules", "chain"),
    ("aggregator.training.rules", "dedupe"),
    ("aggregator.training.rules", "identity"),
    ("aggregator.training.rules", "key_of"),
    ("aggregator.training.rules", "majority"),
    ("aggregator.training.rules", "mean"),
    ("aggregator.training.rules", "top_k"),
    ("aggregator.training.rules", "without_failed"),
    ("aggregator.training.schemas", "Schema"),
    ("aggregator.training.schemas", "lean_schema"),
    ("aggregator.training.schemas", "response_schema"),
    ("aggregator.training.search", "PrioritySearch"),
    ("aggregator.training.selections", "LLMChoice"),
    ("aggregator.training.selections", "best_tried"),
    ("aggregator.training.selections", "last_of"),
    ("aggregator.training.suggestions", "construct_update_dict"),
    ("aggregator.training.suggestions", "convert_suggestion"),
    ("aggregator.training.suggestions", "extract_llm_suggestion"),
    ("aggregator.training.textgrad", "TextGradOptimizer"),
    ("aggregator.training.variations", "Asked"),
    ("aggregator.training.variations", "Messages"),
    ("aggregator.training.variations", "Question"),
    ("aggregator.training.variations", "Variation"),
    ("aggregator.training.variations", "alternatives"),
    ("aggregator.training.variations", "check_variation"),
    ("aggregator.training.variations", "continue_with"),
    ("aggregator.training.variations", "experts"),
    ("aggregator.training.variations", "refine"),
    ("aggregator.training.variations", "seeds"),
    ("aggregator.training.variations", "temperatures"),
]
"""Names that programs imported under each older path."""


EACH = """
import sys
from importlib import import_module
for path, module in MOVED.items():
    room, _, name = path.rpartition(".")
    exec(f"import {path}; from {room} import {name} as found")
    if not (found is sys.modules[path] is import_module(module)):
        print(path)
"""


def test_an_older_path_is_another_name_of_the_module() -> None:
    """So that a program which changes a module for an experiment changes the module that the library uses."""
    out = subprocess.run([sys.executable, "-c", f"{MOVED = }\n{EACH}"], capture_output=True, text=True, check=True)
    assert out.stdout == ""


def test_an_older_path_has_no_file() -> None:
    """The import system would prefer the file."""
    package = Path(aggregator.__file__).parent
    assert [path for path in MOVED if package.joinpath(*path.split(".")[1:]).with_suffix(".py").exists()] == []
    assert [module for module in MOVED.values() if find_spec(module) is None] == []


def test_a_name_is_found_under_its_older_path() -> None:
    """Each older path has the names that programs imported from it."""
    assert [f"{path}.{name}" for path, name in NAMES if not hasattr(import_module(path), name)] == []


def test_every_older_path_is_tested() -> None:
    """With at least one of its names."""
    assert {path for path, _ in NAMES} == set(MOVED)


def test_an_unknown_module_is_still_unknown() -> None:
    """The finder of older paths answers for its table only."""
    with pytest.raises(ModuleNotFoundError, match="No module named 'aggregator.training.nothing'"):
        import_module("aggregator.training.nothing")


async def test_the_executor_under_its_first_name_runs_any_work() -> None:
    """It is the local executor, which awaits any work and returns the results in order."""
    executors = import_module("aggregator.training.executors")
    assert executors.AsyncExecutor is LocalExecutor

    async def double(number: Any) -> Any:
        return 2 * number

    numbers: Any = [1, 2, 3]
    async with LocalExecutor(4) as executor:
        work: Any = double
        assert await executor.map(work, numbers) == [2 * number for number in numbers]
        assert await executor.call(pow, 2, 3) == 8


def test_a_system_without_advisory_locks_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on Windows; a program turns the lock off in its module."""
    monkeypatch.setattr("aggregator.cassettes.locking.fcntl", None)
    with aggregator.cassette(tmp_path / "a.yaml", "all"):
        assert (tmp_path / "a.yaml.lock").exists()
    assert list(tmp_path.iterdir()) == []


async def test_a_reply_schema_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model gets the schema that replaces ours."""
    monkeypatch.setattr(asking, "response_schema", asking.lean_schema)
    model = ScriptedModel('{"suggestion": {}}')
    await asking.ask(model, QUESTION, [aggregator.ParameterNode(1, name="k")], max_tokens=10)
    (options,) = model.options
    schema = options["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["suggestion", "reasoning"]
