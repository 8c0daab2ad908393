"""What can be trained of a DSPy program, and how it is read and written.

Instructions, field descriptions and demonstrations of the predictors that no optimizer has frozen, and the
ParameterNodes that modules hold in their attributes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from inspect import Parameter, ismethod, signature
from typing import Any, TypedDict

import dspy
from dspy.predict.predict import serialize_object

from aggregator.adapters.frameworks import HostParameter
from aggregator.agents.parameters import ParameterNode
from aggregator.agents.values import carried_by_json
from aggregator.errors import ConfigError
from aggregator.text import list_names, shorten

PARTS = ("instructions", "fields", "demos")
"""What can be trained of a predictor."""


class Part:
    """One thing that can be trained of one predictor: its instructions, a field's description, its demonstrations."""

    def __init__(self, path: str, predictor: Any, kind: str, field: str = "") -> None:
        self.path, self.predictor, self.kind, self.field = path, predictor, kind, field
        prefix = "" if path == "self" else f"{path}."
        self.name = f"{prefix}{field}.desc" if field else f"{prefix}{kind}"

    def parameter(self) -> HostParameter:
        """Return the parameter, which reads and writes the predictor of the user's program."""
        fields = self.predictor.signature.fields
        return HostParameter(
            lambda: self.read(self.predictor),
            lambda value: self.write(self.predictor, value),
            name=self.name,
            type=list[_demo_type(fields)] if self.kind == "demos" else str,  # type: ignore[misc] # made here
            description=self._describe(),
            demonstrations=self.kind == "demos",
        )

    def _describe(self) -> str:
        if self.kind == "demos":
            fields = list_names(list(self.predictor.signature.fields))
            return f"worked examples that the model sees before the input, each with {fields}"
        return f"what {self.field} holds" if self.field else "the task, as the model reads it above the fields"

    def read(self, predictor: Any) -> Any:
        """Return the value that a predictor has."""
        if self.kind == "instructions":
            return predictor.signature.instructions
        if self.kind == "fields":
            text = predictor.signature.fields[self.field].json_schema_extra["desc"]
            return "" if text == _unwritten(self.field) else text
        return serialize_object([_plain(demo) for demo in predictor.demos])

    def write(self, predictor: Any, value: Any) -> None:
        """Give a predictor a value."""
        if self.kind == "instructions":
            predictor.signature = predictor.signature.with_instructions(value)
        elif self.kind == "fields":
            text = value or _unwritten(self.field)
            predictor.signature = predictor.signature.with_updated_fields(self.field, desc=text)
        else:
            inputs = list(predictor.signature.input_fields)
            predictor.demos = [dspy.Example(**demo).with_inputs(*inputs) for demo in value]


def parts_of(path: str, predictor: Any) -> Iterator[Part]:
    """Yield what can be trained of a predictor."""
    yield Part(path, predictor, "instructions")
    yield from (Part(path, predictor, "fields", field) for field in predictor.signature.fields)
    yield Part(path, predictor, "demos")


def write_parts(predictors: Mapping[str, Any], values: Mapping[Part, Any]) -> None:
    """Give the predictors of a program, by their paths, the values that they do not have yet."""
    for part, value in values.items():
        if part.read(predictors[part.path]) != value:
            part.write(predictors[part.path], value)


def _unwritten(field: str) -> str:
    """Return what DSPy has for a field that nobody described."""
    return f"${{{field}}}"


def _demo_type(fields: Mapping[str, Any]) -> Any:
    """Return the type of a demonstration: a dict of the signature's fields."""
    kinds = {
        name: field.annotation if carried_by_json(field.annotation, None) else Any for name, field in fields.items()
    }
    made: Any = TypedDict("Demo", kinds, total=False)  # type: ignore[misc] # of the signature at hand
    made.__module__ = "builtins"  # prompts show `list[Demo]`
    return made


def _plain(demo: Any) -> dict[str, Any]:
    held = demo.toDict() if hasattr(demo, "toDict") else dict(demo)
    return {name: value for name, value in held.items() if not name.startswith("dspy_")}


def all_predictors(program: Any) -> list[Any]:
    """Return every predictor, those of frozen modules too."""
    return [module for _, module in program.named_sub_modules(type_=dspy.Predict)]


def nodes_of(program: Any) -> Iterator[ParameterNode[Any]]:
    """Yield the ParameterNodes that the modules of a program hold, named by their attributes."""
    seen: set[int] = set()
    for path, module in program.named_sub_modules(type_=dspy.Module, skip_compiled=True):
        for attribute, value in vars(module).items():
            if isinstance(value, ParameterNode) and id(value) not in seen:
                seen.add(id(value))
                if not value.named:
                    value.name = f"{path}.{attribute}".removeprefix("self.")
                yield value


def copy_program(program: Any, kept: Sequence[Any]) -> Any:
    """Copy a program, but not what it only uses: models, indices, connections, objects of the user's; nor `kept`."""
    used = [one for _, module in program.named_sub_modules() for value in vars(module).values() for one in _used(value)]
    try:
        return copy.deepcopy(program, {id(one): one for one in [*used, *kept]})
    except Exception:  # noqa: BLE001 - whatever an object raises that cannot be copied
        return program.deepcopy()


def _used(value: Any) -> Iterator[Any]:
    """Yield the objects in an attribute that are no part of the program, and may hold locks or gigabytes."""
    value = value.func if isinstance(value, dspy.Tool) else value
    if ismethod(value):
        value = value.__self__
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _used(item)
    elif type(value).__module__.startswith(("dspy.clients", "dspy.retrievers")) or not _is_part(value):
        yield value


def _is_part(value: Any) -> bool:
    """Return True for what belongs to a program and is copied: DSPy's own, plain values, and what holds modules."""
    if type(value).__module__.partition(".")[0] in {"dspy", "builtins", "functools", "types"}:
        return True
    held = getattr(value, "__dict__", {}).values()
    return isinstance(value, dspy.Module) or any(isinstance(one, dspy.Module) for one in held)


def inputs_of(program: Any, x: Any) -> dict[str, Any]:
    """Return the keyword arguments of one call: those of a row's columns that the program takes."""
    taken = _arguments(program)
    if hasattr(x, "toDict"):
        x = x.toDict()
    if isinstance(x, Mapping):
        return {name: value for name, value in x.items() if taken is None or name in taken}
    if taken is not None and len(taken) == 1:
        return {taken[0]: x}
    raise ConfigError(
        f"Expected the inputs of {type(program).__name__} as a dict of {list_names(taken or ['its arguments'])}, got "
        f"{shorten(x)}; give dspy.Examples, or rows with named columns"
    )


def _arguments(program: Any) -> list[str] | None:
    """Return the names of a program's inputs; None if it takes any."""
    own = type(program)
    function = own.aforward if is_async_only(program) else own.forward
    found = list(signature(function).parameters.values())[1:]
    if all(one.kind is not Parameter.VAR_KEYWORD for one in found):
        return [one.name for one in found]
    predictors = all_predictors(program)
    is_library = own.__module__.partition(".")[0] == "dspy"
    return list(predictors[0].signature.input_fields) if is_library and predictors else None


def is_async_only(program: Any) -> bool:
    """Return True if the class that says how the program runs defines `aforward` and no `forward`."""
    for kind in type(program).__mro__:
        if "forward" in vars(kind) or "aforward" in vars(kind):
            return "forward" not in vars(kind)
    return False
