"""A run is resumed only with the same parts and data, byte for byte; the number of epochs may grow."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, suggest

from aggregator import LLM, Budget, Module
from aggregator.errors import TrainingError, TrainingWarning
from aggregator.testing import FakeTransport
from aggregator.training import merge
from aggregator.training.gates import improves_on_batch, improves_on_validation
from aggregator.training.identity import digest, identity_of
from aggregator.training.merge import LLMMerge, majority
from aggregator.training.proposers import LLMOptimizer, OPROOptimizer
from aggregator.training.searches import beam
from aggregator.training.trainer import Trainer


def low(x: int, output: int, info: int) -> float:
    return 0.1


def high(x: int, output: int, info: int) -> float:
    return 0.9


class Strict:
    """A guide with settings, which counts its calls."""

    def __init__(self, level: float, words: list[str]) -> None:
        self.level = level
        self.words = words
        self.calls = 0
        self.seen: list[int] = []

    def __call__(self, x: int, output: int, info: int) -> float:
        self.calls += 1
        self.seen.append(x)
        return self.level


class Named(ScriptedModel):
    def __init__(self, name: str) -> None:
        super().__init__(lambda messages: suggest(amount=5))
        self.model = name


def train(
    run_dir: Path, *, resume: bool = True, guide: Any = low, model: str = "a", data: Any = None, **parts: Any
) -> Any:
    options = {name: parts.pop(name) for name in ("num_epochs", "stepsize") if name in parts}
    llm = Named(model)
    optimizer = parts.pop("optimizer", LLMOptimizer)(llm=llm)
    trainer = Trainer(
        parts.pop("agent", None) or Adder(), optimizer, rule=parts.pop("rule", None) or LLMMerge(llm), **parts
    )
    return trainer.train(
        guide, additions(5) if data is None else data, batch_size=2, run_dir=run_dir, resume=resume, **options
    )


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("guide", {"guide": high}),
    ("guide", {"guide": Strict(0.2, ["a"])}),
    ("gate", {"gate": improves_on_batch(0.5)}),
    ("gate", {"gate": improves_on_validation(additions(5))}),
    ("rule", {"rule": majority}),
    ("search", {"search": beam(2)}),
    ("stepsize schedule", {"stepsize": 0.3}),
    ("optimizer", {"optimizer": OPROOptimizer}),
    ("rule, optimizer", {"model": "b"}),
]


@pytest.mark.parametrize(("named", "change"), CHANGES, ids=[f"{name}{i}" for i, (name, _) in enumerate(CHANGES)])
def test_a_changed_part_is_refused_by_name(tmp_path: Path, named: str, change: dict[str, Any]) -> None:
    """A run with another guide, gate, optimizer or model continued with the old one's scores."""
    train(tmp_path, resume=False)
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, **change)
    assert f"got other values of {named};" in str(caught.value)
    train(tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Strict(0.2, ["a"]), Strict(0.2, ["b"])),
        (improves_on_validation(additions(5)), improves_on_validation(additions(6))),
        (improves_on_validation(additions(5)), improves_on_validation(additions(5), significance=0.05)),
        (beam(2), beam(3)),
        (lambda x: x in {"a", "b"}, lambda x: x in {"a", "c"}),
        (lambda x, limit=1: x, lambda x, limit=2: x),
    ],
)
def test_parts_are_compared_by_their_settings(before: Any, after: Any) -> None:
    """Settings of a constructor, of a closure and of defaults count."""
    assert identity_of(before) != identity_of(after)


def documented(text: str, answer: str = "right") -> Any:
    """Return a guide with a docstring, and with a function inside that has one."""
    code = f"""
def guide(x, output, info):
    {text!r}
    def judge():
        {text!r}
        return "{answer}"
    return judge() == output
"""
    made: dict[str, Any] = {}
    exec(code, made)
    return made["guide"]


def test_a_reworded_docstring_leaves_a_part_as_it_was() -> None:
    """A run can be resumed after its documentation was mended; another constant in the code is another part."""
    assert identity_of(documented("Compare.")) == identity_of(documented("Compare the two."))
    assert identity_of(documented("Compare.")) != identity_of(documented("Compare.", "wrong"))


@pytest.mark.parametrize(("file", "is_compared"), [(merge.__file__, False), ("my_rules.py", True)])
def test_code_counts_unless_it_is_the_library_s_own(file: str, is_compared: bool) -> None:
    """A newer version of the library resumes a run with a rule of its own that it has rewritten."""
    written = []
    for body in ("return proposals[:k]", "kept = proposals[:k]; return kept"):
        made: dict[str, Any] = {}
        exec(compile(f"def top(k):\n    def rule(proposals):\n        {body}\n    return rule", file, "exec"), made)
        written.append(made["top"])
    first, second = (identity_of(top(3)) for top in written)
    assert (first != second) is is_compared
    assert first != identity_of(written[0](4))


def client(name: str = "openai/gpt-4o-mini", **options: Any) -> LLM:
    return LLM(name, **{"api_key": "none", "transport": FakeTransport("5"), **options})


@pytest.mark.parametrize(
    "changed",
    [
        client("openai/gpt-4o"),
        client(base_url="https://other.example/v1"),
        client(api="responses"),
        client(extra={"reasoning_effort": "high"}),
        LLM([client(), client("openai/gpt-4o")]),
    ],
)
def test_a_model_with_other_settings_is_another_model(changed: LLM) -> None:
    """Only its name was compared."""
    assert identity_of(changed) != identity_of(client())


def test_a_model_with_another_key_or_limit_is_the_same_model() -> None:
    """Keys rotate, and limits and the port of a local server do not affect answers."""
    same = client(api_key="other", timeout=5.0, max_attempts=9, rpm=3, budget=Budget(calls=3))
    assert identity_of(same) == identity_of(client())
    ports = [client("openai-compatible/m", base_url=f"http://127.0.0.1:{port}/v1") for port in (8001, 8002)]
    assert identity_of(ports[0]) == identity_of(ports[1])


class Team(Adder):
    """An agent whose parts hold the models."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.members = [Member(Named(name))]


class Member(Module):
    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def forward(self, x: int) -> int:
        return x


SHARED = Named("a")


def agent_with(kind: str, name: str) -> Any:
    if kind == "a member":
        return Team(name)
    SHARED.model = name

    def asking(x: int, *, amount: int = 1) -> int:
        return x + amount if SHARED.model else x

    return asking


@pytest.mark.parametrize("kind", ["a member", "a global variable"])
def test_a_model_inside_an_agent_was_not_compared(tmp_path: Path, kind: str) -> None:
    """It may belong to a part of the agent, or be a variable that a function uses."""
    train(tmp_path, resume=False, agent=agent_with(kind, "a"))
    with pytest.raises(TrainingError, match="got other values of models;"):
        train(tmp_path, agent=agent_with(kind, "b"))
    train(tmp_path, agent=agent_with(kind, "a"))


def test_a_part_that_was_used_is_the_same_part(tmp_path: Path) -> None:
    """Counters and lists that it fills are not settings."""
    guide = Strict(0.2, ["a"])
    train(tmp_path, resume=False, guide=guide)
    assert guide.calls
    assert train(tmp_path, guide=guide).train_scores == [0.2, 0.2]


def test_more_epochs_are_allowed_and_fewer_are_not(tmp_path: Path) -> None:
    """A finished run continues with more epochs."""
    train(tmp_path, resume=False)
    assert len(train(tmp_path, num_epochs=2).history) == 4
    with pytest.raises(TrainingError, match=r"got other values of num_epochs;"):
        train(tmp_path, num_epochs=1)


def test_identities_are_the_same_in_another_process() -> None:
    """The order of a set among a function's constants differs between processes."""
    code = (
        "from aggregator.training.identity import identity_of\n"
        "print(identity_of(lambda x: x in {'a', 'b', 'c', 'd', 'e'}))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(runs) == 1


def arrays() -> list[tuple[str, Callable[[int], Any]]]:
    numpy = pytest.importorskip("numpy")

    def array(change: int) -> Any:
        made = numpy.arange(5000.0)
        made[2500] = -1 if change else made[2500]
        return made

    class Scene:
        def __init__(self, change: int) -> None:
            self.pixels = array(change)

        def __repr__(self) -> str:
            return "<Scene>"

    kinds: list[tuple[str, Callable[[int], Any]]] = [
        ("array", array),
        ("in a dict", lambda change: {"image": [array(change)]}),
        ("object array", lambda change: numpy.array([1, "a" if change else "b", None], dtype=object)),
        ("object", Scene),
        ("dtype", lambda change: numpy.zeros(4, dtype="int32" if change else "int64")),
    ]
    return kinds


@pytest.mark.parametrize("number", range(5))
def test_the_bytes_of_arrays_are_compared(tmp_path: Path, number: int) -> None:
    """Their repr leaves out the middle, so a changed data set was accepted."""
    _, make = arrays()[number]

    class Ignores(Adder):
        async def forward(self, x: Any) -> int:
            return self.amount.data

    assert digest(make(0)) == digest(make(0))
    train(tmp_path, resume=False, agent=Ignores(), data=[(make(0), 1)] * 2)
    with pytest.raises(TrainingError, match="got other values of train_dataset;"):
        train(tmp_path, agent=Ignores(), data=[(make(1), 1)] * 2)


def test_the_values_of_frames_are_compared() -> None:
    """Values, columns and index."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": range(500), "b": [str(i) for i in range(500)]})
    changed = frame.copy()
    changed.loc[250, "b"] = "other"
    assert digest(frame) == digest(frame.copy())
    found = {
        digest(one) for one in (frame, changed, frame.rename(columns={"a": "c"}), frame.set_index("a"), frame["b"])
    }
    assert len(found) == 5


class Slotted:
    """A guide without a `__dict__`."""

    __slots__ = ("level",)

    def __init__(self, level: float) -> None:
        self.level = level

    def __call__(self, x: int, output: int, info: int) -> float:
        return self.level


@dataclass(slots=True)
class Scene:
    pixels: Any


def test_settings_in_slots_were_not_compared() -> None:
    """A guide with another level continued a run, and a changed array in a data class with slots was not noticed."""
    numpy = pytest.importorskip("numpy")
    assert identity_of(Slotted(0.1)) != identity_of(Slotted(0.2))
    assert digest(Scene(numpy.arange(5000))) != digest(Scene(numpy.arange(5000)[::-1]))


def guide_of(code: str) -> Any:
    """Return what a user's module makes of its name `guide`."""
    made: dict[str, Any] = {"re": re, "cache": functools.cache, "AsIs": AsIs}
    exec(compile(code, "users_module.py", "exec"), made)
    return made["guide"]


class AsIs:
    """A callable object with one setting."""

    def __init__(self, level: float) -> None:
        self.level = level

    def __call__(self, output: int) -> float:
        return self.level


@pytest.mark.parametrize(
    ("code", "word", "other"),
    [
        ("LEVEL = 0.1\ndef guide(x, output, info): return LEVEL", "0.1", "0.2"),
        ("WORDS = ('a', 'b')\ndef guide(x, output, info): return float(output in WORDS)", "'b'", "'c'"),
        ("FORM = re.compile('a')\ndef guide(x, output, info): return float(bool(FORM.search(output)))", "'a'", "'b'"),
        ("def judge(x): return 0.1\ndef guide(x, output, info): return judge(x)", "0.1", "0.2"),
        ("def judge(x): return 0.1\ndef all(x): return judge(x)\ndef guide(x, o, i): return all(x)", "0.1", "0.2"),
        ("class Judge:\n def of(self, x): return 0.1\ndef guide(x, o, i): return Judge().of(x)", "0.1", "0.2"),
        ("judge = AsIs(0.1)\ndef guide(x, output, info): return judge(output)", "0.1", "0.2"),
        ("@cache\ndef guide(x, output, info): return 0.1", "0.1", "0.2"),
        (
            "class G:\n def __call__(self, x, o, i): return self.of(x)\n def of(self, x): return 1\nguide = G()",
            "1",
            "2",
        ),
        (
            "class B:\n def of(self): return 1\nclass G(B):\n def __call__(self, *a): return self.of()\nguide = G()",
            "1",
            "2",
        ),
        ("class G:\n def __init__(self, form): self.f = re.compile(form)\nguide = G('a')", "'a'", "'b'"),
    ],
)
def test_what_a_guide_uses_was_not_compared(code: str, word: str, other: str) -> None:
    """Only its own code was: a changed constant, function or method behind it continued a run."""
    assert identity_of(guide_of(code)) == identity_of(guide_of(code))
    assert identity_of(guide_of(code)) != identity_of(guide_of(code.replace(word, other)))


def test_counters_that_a_guide_changes_are_not_its_settings() -> None:
    """A guide that counts its calls, or collects them in a list, is the same guide afterwards."""
    code = "calls = 0\nseen = []\ndef guide(x, o, i):\n global calls\n calls += 1\n seen.append(x)\n return 1.0"
    used = guide_of(code)
    used(1, 2, 3)
    assert identity_of(used) == identity_of(guide_of(code))


def test_functions_that_call_each_other_are_compared() -> None:
    """The search for what a guide uses ends."""
    code = "def odd(n): return n and even(n - 1)\ndef even(n): return odd(n - 1)\nguide = odd"
    assert identity_of(guide_of(code)) != identity_of(guide_of(code.replace("n and", "not n or")))


def test_a_mended_agent_continues_with_a_warning(tmp_path: Path) -> None:
    """A bug stops a run, which continues with the mended agent; whose scores the first ones are was not said."""

    class Mended(Adder):
        async def forward(self, x: int) -> int:
            return int(x + self.amount.data + 0)

    Mended.__qualname__ = Adder.__qualname__
    train(tmp_path, resume=False)
    with pytest.warns(TrainingWarning, match=r"agent's code .* its first 2 steps and their scores"):
        assert len(train(tmp_path, agent=Mended(), num_epochs=2).history) == 4


def test_a_checkpoint_that_compared_code_in_another_way_names_the_remedy(tmp_path: Path) -> None:
    """It said only that the guide had changed, which it had not."""
    train(tmp_path, resume=False)
    written = json.loads((tmp_path / "checkpoint.json").read_bytes())
    written["fingerprint"] |= {"guide": "0" * 16, "compared by revision": "1"}
    (tmp_path / "checkpoint.json").write_text(json.dumps(written))
    with pytest.raises(TrainingError, match=r"values of guide; another revision .* resume with that revision"):
        train(tmp_path)
