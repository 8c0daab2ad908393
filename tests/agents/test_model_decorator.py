"""@model: a class with any base class becomes an agent, as with Trace's `@trace.model`."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

import pytest

from aggregator import AggregatedUpdate, ConfigError, LLMOptimizer, Module, ParameterNode, bundle, model
from aggregator.records import Choice, Completion, Message

T = TypeVar("T")


class Base:
    """A foreign class with its own constructor."""

    def __init__(self, name: str, *, calls: int = 0) -> None:
        self.name = name
        self.calls = calls


@model
class Adder(Base):
    """Adds its amount."""

    unit: str = "pieces"

    def __init__(self, amount: int) -> None:
        super().__init__("adder", calls=1)
        self.amount = ParameterNode(amount)

    @bundle(trainable=True)
    def shift(self, x: int) -> int:
        """Add the amount."""
        return x + self.amount.data

    def forward(self, x: int) -> int:
        self.calls += 1
        return self.shift(x)


def names(agent: Any) -> list[str]:
    return [parameter.name for parameter in agent.parameters()]


@pytest.mark.requirement("Trace: trace.model")
def test_a_class_becomes_a_module_with_its_own_constructor() -> None:
    """`super().__init__` works, calling the object calls `forward`, and its operations are parameters."""
    agent: Any = Adder(2)
    assert issubclass(Adder, Module)
    assert (agent(3), agent.name, agent.calls) == (5, "adder", 2)
    assert names(agent) == ["shift__code", "amount"]


def test_the_class_keeps_its_name_and_place() -> None:
    """It appears in errors, documentation, `inspect` and type hints; Trace names every such class ModelWrapper."""
    assert (Adder.__name__, Adder.__qualname__, Adder.__module__) == ("Adder", "Adder", __name__)
    assert Adder.__doc__ == "Adds its amount."
    assert list(inspect.signature(Adder).parameters) == ["amount"]
    assert get_type_hints(Adder) == {"unit": str}
    assert "class Adder(Base)" in inspect.getsource(Adder)


def test_instances_can_be_pickled_and_copied() -> None:
    """Trace's decorated classes cannot be pickled; a copy has its own values."""
    agent: Any = Plain(2)
    operated: Any = Adder(2)
    for twin in (pickle.loads(pickle.dumps(agent)), copy.deepcopy(agent), copy.deepcopy(operated)):
        assert names(twin)[-1] == "amount"
        twin.amount.data = 9
        assert (twin(1), agent(1)) == (10, 3)


@model
class Plain:
    def __init__(self, amount: int) -> None:
        self.amount = ParameterNode(amount)

    def forward(self, x: int) -> int:
        return x + self.amount.data


@model
@dataclass(slots=True)
class Data:
    amount: ParameterNode[int] = field(default_factory=lambda: ParameterNode(4))

    def __call__(self, x: int) -> int:
        return x + self.amount.data


class Abstract(ABC):
    @abstractmethod
    def forward(self, x: int) -> int: ...


@model
class Concrete(Abstract, Generic[T]):
    def __init__(self) -> None:
        self.amount = ParameterNode(4)

    def forward(self, x: int) -> int:
        return x + self.amount.data


@pytest.mark.parametrize("kind", [Data, Concrete])
def test_dataclasses_abstract_and_generic_classes_can_be_decorated(kind: Any) -> None:
    """Slots, a metaclass, and `__call__` instead of `forward` work too."""
    agent = kind()
    assert (agent(1), names(agent)) == (5, ["amount"])


def test_a_module_is_unchanged_and_can_be_subclassed() -> None:
    """Decorating twice has no further effect; a subclass of a decorated class is an agent too."""

    class Twice(Plain):
        def forward(self, x: int) -> int:
            return 2 * super().forward(x)

    assert model(Plain) is Plain
    assert model(Twice) is Twice
    assert Twice(2)(1) == 6  # type: ignore[operator]


@pytest.mark.parametrize("other", [3, lambda x: x, Plain(1)])
def test_only_classes_can_be_decorated(other: Any) -> None:
    """Anything else is refused when the decorator runs."""
    with pytest.raises(ConfigError, match="Expected a class under @model"):
        model(other)


def test_it_can_be_saved_and_loaded(tmp_path: Path) -> None:
    """Like any Module."""
    agent, production = Plain(7), Plain(1)
    agent.save(tmp_path / "agent.json")  # type: ignore[attr-defined]
    production.load(tmp_path / "agent.json")  # type: ignore[attr-defined]
    assert production.amount.data == 7


class Answers:
    """A model that always suggests an amount of 5."""

    async def complete(self, *messages: Any, **options: Any) -> Completion:
        text = json.dumps({"suggestion": {"amount": 5}})
        return Completion(choices=(Choice(message=Message(content=text)),))


@pytest.mark.requirement("Trace: trace.model")
def test_it_can_be_trained() -> None:
    """The trainer accepts it as it does a Module."""
    agent = Plain(1)
    AggregatedUpdate(agent, LLMOptimizer(llm=Answers()), llm=Answers()).train(
        lambda x, output, info: (float(output == info), f"expected {info}"), [(0, 5)]
    )
    assert agent.amount.data == 5
