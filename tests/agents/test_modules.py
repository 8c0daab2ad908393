"""Module: which parameters it finds, how it names them, and how it is saved."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import ConfigError, Module, ParameterNode, bundle, node
from aggregator.agents.parameters import overriding, read
from aggregator.errors import ParameterError


class Retriever(Module):
    def __init__(self, k: int = 3) -> None:
        self.k = ParameterNode(k)

    @bundle(trainable=True)
    def rank(self, passages: list[str]) -> list[str]:
        """Order passages."""
        return sorted(passages)[: self.k.data]

    @bundle()
    def fetch(self, question: str) -> list[str]:
        return [question]


class Agent(Module):
    floor = ParameterNode(0.5)

    def __init__(self) -> None:
        self.prompt = node("Answer.", trainable=True)
        self.retriever = Retriever()
        self.steps = [node("one", trainable=True), {"deep": (Retriever(5),)}]
        self.words = ["plain", "data", {"of": ["any", "depth"]}]
        self.labels = ParameterNode(["a", "b"], name="labels_of_the_desk")
        self.frozen = node(1)

    def forward(self, x: str) -> str:
        return f"{self.prompt.data} {x}"


NAMES = [
    "floor",
    "prompt",
    "retriever.rank__code",
    "retriever.k",
    "steps.0",
    "steps.1.deep.0.rank__code",
    "steps.1.deep.0.k",
    "labels_of_the_desk",
    "frozen",
]


@pytest.mark.requirement("Trace: Module.parameters, parameters_dict", "Trace: containers Seq and Map")
def test_names_are_attribute_paths() -> None:
    """Names are paths through attributes, lists and dicts, in order; plain data is not a container."""
    agent = Agent()
    assert [p.name for p in agent.parameters()] == NAMES
    assert agent.retriever.k.py_name == "retriever_k"
    assert list(agent.parameters_dict()) == NAMES


def test_names_are_the_same_in_every_instance_and_process() -> None:
    """Names and their order contain no counter and no address, also after operations ran."""
    first, second = Agent(), Agent()
    second.retriever.rank(["b", "a"])
    assert [p.name for p in second.parameters()] == [p.name for p in first.parameters()] == NAMES


def test_names_are_relative_to_the_module() -> None:
    """A part names its parameters by its own paths; the whole module adds its own."""
    agent = Agent()
    assert [p.name for p in agent.retriever.parameters()] == ["rank__code", "k"]
    assert [p.name for p in agent.parameters()] == NAMES


def test_a_parameter_reached_twice_appears_once() -> None:
    """Shared parameters and modules, and a part that refers to its parent, are visited once."""

    class Whole(Module):
        def __init__(self) -> None:
            self.part = Retriever()
            self.again = self.part
            self.k = self.part.k
            self.part.parent = self  # type: ignore[attr-defined]

    assert [p.name for p in Whole().parameters()] == ["part.rank__code", "part.k"]


def test_two_parameters_with_one_name_are_refused() -> None:
    """The error names both paths and the remedy."""

    class Twice(Module):
        def __init__(self) -> None:
            self.a = {"b": node(1)}
            self.a_b = node(2)

    with pytest.raises(ConfigError, match=r"'a\.b' and 'a_b', which are both 'a_b'.*rename an attribute or give name="):
        Twice().parameters()

    class Named(Module):
        def __init__(self) -> None:
            self.x = node(1, name="k")
            self.y = node(2, name="k")

    with pytest.raises(ConfigError, match="'x' and 'y', which are both 'k'"):
        Named().parameters()


@pytest.mark.requirement("Trace's defect 24: names collided")
@settings(max_examples=60)
@given(st.dictionaries(st.text("ab.0_ ", min_size=1, max_size=4), st.integers(), max_size=5))
def test_names_are_unique_or_refused(entries: dict[str, int]) -> None:
    """For any keys, names and py_names are unique, or the agent is refused."""

    class Holder(Module):
        def __init__(self) -> None:
            self.parts = {key: node(value) for key, value in entries.items()}

    holder = Holder()
    try:
        parameters = holder.parameters()
    except ConfigError:
        return
    assert len(parameters) == len({p.py_name for p in parameters}) == len(entries)
    assert list(read(parameters).values()) == list(entries.values())


def test_a_call_is_forward() -> None:
    """A module is called like its forward, sync or async, with or without `super().__init__()`."""

    class Asynchronous(Module):
        async def forward(self, x: int, *, plus: int = 1) -> int:
            await asyncio.sleep(0)
            return x + plus

    assert Agent()("now") == "Answer. now"
    with asyncio.Runner() as runner:
        assert runner.run(Asynchronous()(1, plus=2)) == 3
    with pytest.raises(ConfigError, match="Expected Module to define forward"):
        Module()(1)


@pytest.mark.requirement("Trace: clone")
def test_each_instance_has_its_own_code() -> None:
    """Training one agent's operation does not change another's; a copy has its own source."""
    first, second = Agent(), Agent()
    code = first.parameters_dict()["retriever.rank__code"]
    code.data = "def rank(self, passages):\n    return passages[::-1]\n"
    third = copy.deepcopy(first)
    third.parameters_dict()["retriever.rank__code"].data = "def rank(self, passages):\n    return []\n"
    assert first.retriever.rank(["a", "b"]) == ["b", "a"]
    assert second.retriever.rank(["b", "a"]) == ["a", "b"]
    assert third.retriever.rank(["a", "b"]) == []


def test_an_overridden_operation_belongs_to_the_subclass() -> None:
    """A subclass's operation replaces the parameter; `super()` runs the original."""

    class Reverse(Retriever):
        @bundle(trainable=True, sandbox=None)
        def rank(self, passages: list[str]) -> list[str]:
            return super().rank(passages)[::-1]

    class Plain(Retriever):
        def rank(self, passages: list[str]) -> list[str]:
            return passages

    reverse = Reverse()
    assert [p.name for p in reverse.parameters()] == ["rank__code", "k"]
    assert reverse.rank(["a", "b"]) == ["b", "a"]
    reverse.parameters()[0].data = "def rank(self, passages):\n    return [*super().rank(passages), 'end']\n"
    assert reverse.rank(["b", "a"]) == ["a", "b", "end"]
    assert [p.name for p in Plain().parameters()] == ["k"]


def test_attributes_in_slots_are_found() -> None:
    """A dataclass with slots can be an agent."""

    @dataclass(slots=True)
    class Slotted(Module):
        retriever: Retriever = field(default_factory=Retriever)
        prompt: ParameterNode[str] = field(default_factory=lambda: ParameterNode("Answer."))

    assert [parameter.name for parameter in Slotted().parameters()] == ["retriever.rank__code", "retriever.k", "prompt"]


@pytest.mark.requirement("Trace: Module.save, load")
def test_a_saved_agent_can_be_loaded(tmp_path: Path) -> None:
    """Values, including code, and provenance are restored; traced operations do not prevent saving."""
    agent, other = Agent(), Agent()
    agent.prompt.data = "Réponds."
    agent.parameters_dict()["retriever.rank__code"].data = "def rank(self, passages):\n    return passages\n"
    agent.save(tmp_path / "agent.json", provenance={"run": "x", "instances": [1, 2]})
    assert other.load(tmp_path / "agent.json") == {"run": "x", "instances": [1, 2]}
    assert read(other.parameters()) == read(agent.parameters())
    assert other.retriever.rank(["b", "a"]) == ["b", "a"]
    assert list(tmp_path.iterdir()) == [tmp_path / "agent.json"]


def test_number_keys_are_restored_as_numbers(tmp_path: Path) -> None:
    """JSON has string keys; loading restores their type."""

    class Shelves(Module):
        def __init__(self) -> None:
            self.shelves = ParameterNode({1: "books", 20: "maps"})

    agent = Shelves()
    agent.save(tmp_path / "agent.json")
    agent.load(tmp_path / "agent.json")
    assert agent.shelves.data == {1: "books", 20: "maps"}
    assert agent.shelves.convert({"3": "prints"}) == {3: "prints"}


def test_values_that_json_cannot_hold_do_not_prevent_saving(tmp_path: Path) -> None:
    """An untrained parameter with a client is left out of the file, and stays in the agent."""

    class Desk(Module):
        def __init__(self) -> None:
            self.prompt = ParameterNode("Answer.")
            self.floor = node(0.5)
            self.client = node(object())

    agent, other = Desk(), Desk()
    client = other.client.data
    agent.floor.data = 0.7
    agent.save(tmp_path / "agent.json")
    other.load(tmp_path / "agent.json")
    assert (other.floor.data, other.client.data) == (0.7, client)


def test_saving_creates_the_folder(tmp_path: Path) -> None:
    """For example `checkpoints/` for the default `save_path` of `train`."""
    saved, loaded = Agent(), Agent()
    saved.prompt.data = "Saved."
    saved.save(tmp_path / "checkpoints" / "today" / "agent.json")
    loaded.load(tmp_path / "checkpoints" / "today" / "agent.json")
    assert loaded.prompt.data == "Saved."


def test_an_unwritable_path_showed_the_name_of_a_temporary_file(tmp_path: Path) -> None:
    """The error names the given file, and leaves no other file."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file" / "agent.json", tmp_path / "folder"):
        with pytest.raises(ParameterError, match=rf"Expected a path to save the parameters to, got .* - at {target};"):
            Agent().save(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_threads_can_save_one_agent_concurrently(tmp_path: Path) -> None:
    """Each writes its own temporary file before it replaces the old one; a killed process's file is ignored."""
    agent, path = Agent(), tmp_path / "agent.json"
    Path(f"{path}.{os.getpid()}.tmp").write_text("{")
    with ThreadPoolExecutor(8) as pool:
        for saved in [pool.submit(agent.save, path) for _ in range(40)]:
            saved.result()
    agent.load(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["agent.json", f"agent.json.{os.getpid()}.tmp"]


def test_saving_uses_the_values_in_its_context(tmp_path: Path) -> None:
    """Under an override the candidate's values are saved."""
    agent = Agent()
    with overriding(agent.parameters(), {"prompt": "Try."}):
        agent.save(tmp_path / "agent.json")
    agent.load(tmp_path / "agent.json")
    assert agent.prompt.data == "Try."


def change(path: Path, **parameters: Any) -> None:
    content = json.loads(path.read_text())
    content["parameters"] |= parameters
    path.write_text(json.dumps({**content, "parameters": {k: v for k, v in content["parameters"].items() if v != ...}}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "got No such file or directory - at .*; save the agent again"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "got Input data was truncated"),
        (lambda path: path.write_text("[]"), "Expected `object`, got `array`"),
        (lambda path: path.write_text('{"format": "other", "version": 1, "parameters": {}}'), "got 'other'"),
        (
            lambda path: path.write_text('{"format": "aggregator-parameters", "version": 9, "parameters": {}}'),
            "Expected a file of version 1 at most, got 9.*upgrade aggregated-update",
        ),
        (lambda path: change(path, extra=1), "got a file with extra; load it into the agent that was saved"),
        (lambda path: change(path, prompt="changed", floor="low"), "Expected `float`, got 'low' - at floor in "),
        (
            lambda path: change(path, **{"prompt": "changed", "retriever.rank__code": "def rank(self):\n  retrn x"}),
            "Expected Python source that parses, got invalid syntax in line 2: retrn x - at retriever.rank__code",
        ),
    ],
)
def test_an_invalid_file_changes_nothing(tmp_path: Path, spoil: Any, message: str) -> None:
    """A missing, truncated, foreign, newer or edited file is refused as a whole, with the remedy."""
    agent, path = Agent(), tmp_path / "agent.json"
    before = read(agent.parameters())
    agent.save(path)
    spoil(path)
    with pytest.raises(ParameterError, match=message):
        agent.load(path)
    assert read(agent.parameters()) == before


def test_missing_parameters_are_named(tmp_path: Path) -> None:
    """An artefact of another agent is refused with the names that differ."""
    Retriever().save(tmp_path / "retriever.json")
    with pytest.raises(ParameterError, match=r"parameters of Agent in .*, got a file without floor, .* and with .*k"):
        Agent().load(tmp_path / "retriever.json")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    """A failed write leaves the old file unchanged, and no temporary file."""
    agent = Agent()
    agent.save(tmp_path / "agent.json")
    before = (tmp_path / "agent.json").read_bytes()
    with pytest.raises(ConfigError, match="provenance that JSON can carry"):
        agent.save(tmp_path / "agent.json", provenance={"bad": object()})
    assert (tmp_path / "agent.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_production_loads_msgspec_and_nothing_else(tmp_path: Path) -> None:
    """Importing Module and ParameterNode and loading an agent imports one third-party package, and no event loop."""
    Agent().save(tmp_path / "agent.json")
    script = f"""
import sys
from aggregator import Module, ParameterNode
class Agent(Module):
    def __init__(self):
        self.k = ParameterNode(1)
Agent().save({str(tmp_path / "small.json")!r})
Agent().load({str(tmp_path / "small.json")!r})
print(*sorted({{name.split(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names) - {{"__main__"}}))
print("asyncio" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split("\n")
    third_party = {
        name for name in out[0].split() if name not in ("sitecustomize", "site") and not name.startswith("_")
    }
    assert third_party == {"aggregator", "msgspec", "typing_extensions"} & third_party | {"aggregator", "msgspec"}
    assert out[1] == "False"
