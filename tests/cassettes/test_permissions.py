"""Files with prompts and answers are readable by their owner only, unless the user shares them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator import AggregatedUpdate, LLMOptimizer, Module, ParameterNode, as_model, cassette, configure_logging
from aggregator.cassettes.lineage import lineage
from aggregator.records import HTTPReply, HTTPRequest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def permissions(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): f"{path.stat().st_mode & 0o777:o}" for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("layout", ["journal", "readable"])
def test_a_cassette_and_its_folders_are_private(layout: str, tmp_path: Path) -> None:
    """During and after recording no other user of the machine can read them."""
    path = tmp_path / "tests" / "cassettes" / "a.yaml"
    with cassette(path, "all", layout=layout) as tape, lineage("x"):  # type: ignore[arg-type]
        reply = HTTPReply(status=200, body=b"1", headers={})
        tape.record(tape.issue(HTTPRequest(url="http://x/", body=b"{}", headers={})), reply)
        tape.flush()
        assert {mode for name, mode in permissions(tmp_path).items() if "." in name} == {"600"}
    assert permissions(tmp_path) == {"tests": "700", "tests/cassettes": "700", "tests/cassettes/a.yaml": "600"}


@pytest.mark.parametrize("layout", ["journal", "readable"])
def test_a_shared_cassette_follows_the_umask(layout: str, tmp_path: Path) -> None:
    """It is an option, for example for a cassette that is committed."""
    path = tmp_path / "cassettes" / "a.yaml"
    with cassette(path, "all", layout=layout, private=False) as tape, lineage("x"):  # type: ignore[arg-type]
        reply = HTTPReply(status=200, body=b"1", headers={})
        tape.record(tape.issue(HTTPRequest(url="http://x/", body=b"{}", headers={})), reply)
    assert permissions(tmp_path) == {"cassettes": "755", "cassettes/a.yaml": "644"}


class Echo(Module):
    def __init__(self) -> None:
        self.prompt = ParameterNode("a")

    def forward(self, x: str) -> str:
        return self.prompt.data


def test_a_run_folder_is_private(tmp_path: Path) -> None:
    """Journal, checkpoint, result, parameters and the log in it are private, too."""
    model = as_model(lambda messages, **_: "TERMINATE")
    configure_logging(path=tmp_path / "logs" / "run.log")
    trainer = AggregatedUpdate(Echo(), LLMOptimizer(llm=model), llm=model)
    trainer.train(lambda x, y, i: 0.5, [("a", "b")], run_dir=tmp_path / "run", verbose=False)
    found = permissions(tmp_path)
    assert found.pop("run") == found.pop("logs") == "700"
    assert set(found) >= {"run/checkpoint.json", "run/result.json", "run/parameters.json", "logs/run.log"}
    assert set(found.values()) == {"600"}


def test_a_saved_agent_is_private(tmp_path: Path) -> None:
    """It contains prompts, too."""
    Echo().save(tmp_path / "agents" / "echo.json")
    assert permissions(tmp_path) == {"agents": "700", "agents/echo.json": "600"}
