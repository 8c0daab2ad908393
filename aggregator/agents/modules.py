"""Module: an agent, or a part of one, with its parameters, which can be saved and loaded.

Parameters are found by walking attributes, lists, tuples and dicts; their names are the paths of that walk.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from types import FunctionType, new_class
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from aggregator.agents.parameters import (
    CODE,
    ParameterNode,
    carried_by_json,
    describe_type,
    index,
    read,
    values_of,
    write,
)
from aggregator.errors import ConfigError, ParameterError
from aggregator.files import write_atomically

if TYPE_CHECKING:
    from aggregator.agents.bundles import Operation


FORMAT = "aggregator-parameters"
VERSION = 1


# ---- artefacts: trained values in a file


class Artefact(Struct, frozen=True, kw_only=True):
    """Parameter values by name; `types` is for readers, `provenance` is the origin of the values.

    `values` is "best" or "last", for values of a training run.
    """

    format: str
    version: int
    parameters: dict[str, Any]
    types: Mapping[str, str] = {}
    provenance: dict[str, Any] = {}
    values: str | UnsetType = UNSET


def write_artefact(
    path: str | os.PathLike[str],
    values: dict[str, Any],
    *,
    types: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    which: str | None = None,
) -> None:
    """Write values to a JSON file and create its folder. A reader sees the old file or the new one, never a part.

    Raises ParameterError if it cannot be written.
    """
    artefact = Artefact(
        format=FORMAT,
        version=VERSION,
        parameters=values,
        types=types or {},
        provenance=dict(provenance or {}),
        values=UNSET if which is None else which,
    )
    try:
        text = msgspec.json.format(msgspec.json.encode(artefact), indent=2) + b"\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Expected values and provenance that JSON can carry, got {error}") from None
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ParameterError(
            f"Expected a path to save the parameters to, got {error.strerror} - at {os.fspath(path)}; "
            "free some space, make the folder writable, or choose another file"
        ) from error


def read_artefact(path: str | os.PathLike[str]) -> Artefact:
    """Return the content of a file written by `write_artefact`; raises ParameterError with the remedy."""
    remedy = "save the agent again with Module.save"
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib would be one more import in production
            text = file.read()
    except OSError as error:
        raise ParameterError(f"Expected a file of parameters, got {error.strerror} - at {path}; {remedy}") from error
    try:
        artefact = msgspec.json.decode(text, type=Artefact)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ParameterError(f"Expected a file of parameters, got {error} - at {path}; {remedy}") from error
    if artefact.format != FORMAT:
        raise ParameterError(f"Expected format {FORMAT!r}, got {artefact.format!r} - at {path}; {remedy}")
    if artefact.version > VERSION:
        raise ParameterError(
            f"Expected a file of version {VERSION} at most, got {artefact.version} - at {path}; "
            "upgrade aggregated-update"
        )
    return artefact


T = TypeVar("T")
Path = str | PathLike[str]
_Found = tuple[str, ParameterNode[Any]]


# ---- modules


class _Applied(Struct, frozen=True, kw_only=True):
    """The values stored by `Module.apply`, and their name; a Struct, so that `walk` does not enter it."""

    which: str
    values: Mapping[str, Any]


class Module:
    """The base class of agents and their parts: attributes are parameters, modules, or lists and dicts of them.

    A subclass defines `forward`, sync or async; calling the module calls it. `super().__init__()` is not needed.

    >>> class Greeter(Module):
    ...     def __init__(self):
    ...         self.greeting = ParameterNode("Hello")
    ...     def forward(self, name):
    ...         return f"{self.greeting.data} {name}"
    >>> agent = Greeter()
    >>> agent("Ada"), [p.name for p in agent.parameters()]
    ('Hello Ada', ['greeting'])
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the agent; subclasses define it, sync or async."""
        raise ConfigError(f"Expected {type(self).__name__} to define forward(self, x), got none; write one")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of `forward`: a coroutine if that is async."""
        return self.forward(*args, **kwargs)

    def __repr__(self) -> str:
        names = [parameter.name if parameter.named else path for path, parameter in walk(self)]
        return f"<{type(self).__name__} with parameters {', '.join(names)}>" if names else f"<{type(self).__name__}>"

    def parameters(self) -> list[ParameterNode[Any]]:
        """Return every parameter once, in the order of the attributes, with names relative to this module.

        A trainable operation (`@bundle(trainable=True)`) is represented by its source. Raises ConfigError if two
        parameters share a name.
        """
        return list(self.parameters_dict().values())

    def parameters_dict(self) -> dict[str, ParameterNode[Any]]:
        """Return name -> parameter, as `parameters()`."""
        parameters = index(walk(self))
        for name, parameter in parameters.items():
            parameter.name = name
        return parameters

    def save(self, path: Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the values of all parameters that JSON supports to a file, atomically; create its folder.

        `provenance` is stored with them: JSON data about the origin of the values.
        """
        parameters = _carried(self.parameters_dict())
        types = {name: describe_type(parameter.type) for name, parameter in parameters.items()}
        values = read(parameters.values())
        applied: _Applied | None = getattr(self, "_applied", None)
        is_known = applied is not None and all(values.get(name) == value for name, value in applied.values.items())
        which = applied.which if applied is not None and is_known else None
        write_artefact(path, values, types=types, provenance=provenance, which=which)

    def apply(self, values: Mapping[str, Any], *, which: str = "") -> None:
        """Store values in the parameters of these names, all or none, as in `agent.apply(result.best_parameters)`.

        `which` names them ("best", "last"); `save` records it while the parameters have these values. Raises
        ParameterError for an unknown name and an invalid value.
        """
        parameters = self.parameters_dict()
        if unknown := [name for name in values if name not in parameters]:
            raise ParameterError(
                f"Expected values of the parameters {', '.join(parameters)} of {type(self).__name__}, got "
                f"{', '.join(map(repr, unknown))}"
            )
        chosen = [parameters[name] for name in values]
        write(chosen, dict(values))
        note_origin(self, chosen, which)

    def load(self, path: Path, *, code: bool | str | Collection[str] = False) -> dict[str, Any]:
        """Store the values of a file written by `save`, all or none, and return its provenance.

        Source of an operation with `sandbox=None` runs in this process, so a file that holds changed source is refused
        unless `code` permits it: True, the sha256 of the source (or several), or "ask" on a terminal.

        Raises ParameterError if the file cannot be read, has other parameters than this module, or has an invalid
        value; ConfigError for source that `code` does not permit.
        """
        parameters, artefact = _carried(self.parameters_dict()), read_artefact(path)
        missing = [name for name in parameters if name not in artefact.parameters]
        unknown = [name for name in artefact.parameters if name not in parameters]
        if missing or unknown:
            raise ParameterError(
                f"Expected the parameters of {type(self).__name__} in {path}, got a file "
                + " and ".join(
                    [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(unknown)}"] * bool(unknown)
                )
                + "; load it into the agent that was saved, or edit the file's `parameters`"
            )
        if "aggregator.agents.code" in sys.modules:  # otherwise nothing of this module is code
            from aggregator.agents.code import check_consent, require_consent, unsandboxed_code

            found = unsandboxed_code(parameters.values(), artefact.parameters)
            require_consent(found, check_consent(code), origin=os.fspath(path), permitted=set())
        try:
            write(parameters.values(), artefact.parameters)
        except ParameterError as error:
            raise ParameterError(f"{error} in {path}") from None
        return artefact.provenance


def model(cls: type[T]) -> type[T]:
    """Make a Module of a class with any base class, or without one: Trace's `@trace.model`.

    It keeps its name, module and constructor, so instances can be copied and pickled as before. Put it outermost, above
    `@dataclass`. Type checkers do not see what it adds; if they should, derive from Module instead.

    >>> @model
    ... class Greeter:
    ...     def __init__(self, word):
    ...         self.greeting = ParameterNode(word)
    ...     def forward(self, name):
    ...         return f"{self.greeting.data} {name}"
    >>> agent = Greeter("Hello")
    >>> agent("Ada"), [p.name for p in agent.parameters()]
    ('Hello Ada', ['greeting'])
    """
    if not isinstance(cls, type):
        raise ConfigError(f"Expected a class under @model, got {cls!r}; write @model without brackets above a class")
    if issubclass(cls, Module):
        return cls
    kept = ("__module__", "__qualname__", "__doc__", "__firstlineno__")  # for pickle; the last for inspect since 3.13
    place = {name: getattr(cls, name) for name in kept if hasattr(cls, name)}
    made: type[T] = new_class(cls.__name__, (cls, Module), {}, lambda body: body.update(place))
    return made


# ---- finding the parameters of a module


def _carried(parameters: Mapping[str, ParameterNode[Any]]) -> dict[str, ParameterNode[Any]]:
    """Return the parameters that a file can hold: all trained ones, and others if JSON supports their values."""
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.trainable or carried_by_json(parameter.type, parameter.data)
    }


def note_origin(agent: Module, parameters: Sequence[ParameterNode[Any]], which: str) -> None:
    """Record that these parameters have the values that `which` names, for `save`; "" removes the record."""
    object.__setattr__(agent, "_applied", _Applied(which=which, values=values_of(parameters)) if which else None)


def walk(value: Any, path: str = "", seen: set[int] | None = None) -> list[_Found]:
    """Return (path, parameter) for everything reachable, each once, depth first; what is `seen` is left out."""
    found: list[_Found] = []
    seen = set() if seen is None else seen
    waiting = [(path, value)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, ParameterNode):
            if id(value) not in seen:
                seen.add(id(value))
                found.append((path, value))
        elif isinstance(value, _CONTAINERS):
            if id(value) not in seen:
                seen.add(id(value))
                prefix = f"{path}." if path else ""
                waiting += [(f"{prefix}{key}", item) for key, item in reversed(_items(value))]
        elif callable(value) and (operation := operation_of(value)):
            code = operation.code_of(getattr(value, "__self__", None))
            if code is not None:
                waiting.append((path + CODE, code))
    return found


def operations_of(agent: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (operation, its instance or None) for every bundled function reachable from an agent."""
    seen: set[int] = set()

    def find(value: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(value, _CONTAINERS):
            if id(value) not in seen:
                seen.add(id(value))
                for _, item in _items(value):
                    yield from find(item)
        elif operation := operation_of(value):
            yield operation, getattr(value, "__self__", None)

    yield from find(agent)


_CONTAINERS = (Module, dict, list, tuple)
_LEAVES = (str, int, float, bytes, type(None))  # nearly all other items are of these types, and hold no parameters


def _items(value: Any) -> list[tuple[Any, Any]]:
    """Return a container's items, by key, position or attribute: the class's attributes before the instance's."""
    items: list[tuple[Any, Any]]
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, Module):
        kind, own = type(value), getattr(value, "__dict__", {})
        shared, slots = _of_class(kind)
        items = []
        for name, attribute in shared.items():
            if name in own or name.startswith("__"):
                continue
            if operation_of(attribute):
                items.append((name, getattr(value, name)))
            elif not isinstance(attribute, FunctionType):
                items.append((name, attribute))
        items += own.items()
        items += [(name, getattr(value, name)) for name in slots if name[:2] != "__" and hasattr(value, name)]
    else:
        items = list(enumerate(value))
    return [item for item in items if not isinstance(item[1], _LEAVES)]


def _of_class(kind: type) -> tuple[dict[str, Any], list[str]]:
    """Return the attributes of a class that may hold parameters, and its slots (as of `@dataclass(slots=True)`).

    Those of its bases come first.
    """
    found: dict[str, Any] = {}
    slots: list[str] = []
    for base in reversed(kind.__mro__):
        if base is object or base is Module:
            continue
        own = base.__dict__.get("__slots__", ())
        slots += (own,) if isinstance(own, str) else own
        found |= base.__dict__
    return found, slots


def operation_of(function: Any) -> Operation | None:
    """Return the operation behind a bundled function, also under further decorators; None for anything else.

    It is here, and read by its mark, so that an agent without bundled functions does not load what they need.
    """
    function = getattr(function, "__func__", function)
    return vars(function).get("__operation__") if isinstance(function, FunctionType) else None
