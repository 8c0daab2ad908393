"""ParameterNode: a named, typed, described value that training may change.

Reading a value checks the overrides of the current context first, so candidates are tried concurrently (`overriding`)
while the stored values do not change; `write` is the only lasting mutation, and it is all or nothing.

Values have types, inferred or given. Conversion is msgspec's lax mode and never guesses: `"7"` becomes an int and
`"False"` a bool, but a number never becomes text, text never a list, and NaN or infinity never a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args, get_origin, overload

import msgspec
from msgspec import Meta

from aggregator.errors import ConfigError, ParameterError
from aggregator.text import shorten

if TYPE_CHECKING:
    from aggregator.records import Values

# ---- types of values: inferred, converted, described

DEPTH_LIMIT = 64
"""The maximum nesting of containers in a value."""

NO_SURROGATE = "Expected text that UTF-8 can carry, got a lone surrogate"
SCALARS = frozenset({str, bool, int, float, type(None)})
"""The common types of values; they need no copy."""


class Unfit(ValueError):  # noqa: N818 - an answer between two functions of this room, not an error that users meet
    """A value of the wrong type: `reason` has expected and got, `path` is the position inside the value."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = path


def infer_type(value: Any) -> Any:
    """Return the type of a value, including its items.

    >>> infer_type(["a", "b"])
    list[str]
    >>> infer_type({"k": 1, "name": "x"})
    dict[str, typing.Any]
    """
    if value is None:
        return Any
    kind = type(value)
    if kind is dict:
        return dict[_common(value) if value else str, _common(value.values())]  # type: ignore[misc]
    if kind is tuple:
        return tuple[_common(value), ...]  # type: ignore[misc]
    if kind in (list, set, frozenset):
        return kind[_common(value)]
    return kind


def convert(raw: Any, kind: Any) -> Any:
    """Return `raw` as a value of the type `kind`; raises Unfit.

    >>> convert("False", bool), convert(["a"], list[str])
    (False, ['a'])
    """
    try:
        value = msgspec.convert(raw, kind, strict=False)
    except (msgspec.ValidationError, RecursionError, UnicodeEncodeError) as error:
        raise _unfit(raw, kind, error) from None
    refuse_oddities(value)
    return value


def refuse_oddities(value: Any, path: str = "", levels: int = DEPTH_LIMIT) -> None:
    """Raise Unfit if a value holds NaN, infinity or text that UTF-8 cannot encode, or is nested too deeply."""
    if levels == 0:
        raise Unfit(f"Expected a value of at most {DEPTH_LIMIT} levels, got one that is nested deeper")
    if value is None or isinstance(value, int):  # including bool
        return
    if isinstance(value, float):
        if value - value != 0.0:
            raise Unfit(f"Expected a finite number, got {value!r}", path)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Unfit(NO_SURROGATE, path) from None
    else:
        for step, item in _parts(value):
            refuse_oddities(item, path + step, levels - 1)


def snapshot(value: Any) -> Any:
    """Return a copy that later changes in place do not affect."""
    if value is None or isinstance(value, str | int | float):
        return value
    from copy import deepcopy  # not needed if all values are texts and numbers

    return deepcopy(value)


def schema(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of a type, without references; {} for a type that JSON does not support.

    >>> schema(list[str])
    {'type': 'array', 'items': {'type': 'string'}}
    """
    try:
        return dict(_schema(kind))
    except TypeError:  # a type without a schema, or one that cannot be hashed
        pass
    try:
        return dict(_stated(kind))
    except TypeError:
        return {}


def _stated(kind: Any) -> dict[str, Any]:
    """Return the schema of a type; raises TypeError if it has none."""
    try:
        hash(kind)
    except TypeError:
        return _schema.__wrapped__(kind)
    return _schema(kind)


@lru_cache(maxsize=256)
def _schema(kind: Any) -> dict[str, Any]:
    """Return the schema of a type; cached, because every proposal needs it."""
    (found,), components = msgspec.json.schema_components([kind])
    inlined: dict[str, Any] = _inline(found, components, ())
    return inlined


def describe_type(kind: Any) -> str:
    """Return a type in readable form.

    >>> from typing import Annotated
    >>> describe_type(dict[str, list[int]]), describe_type(Annotated[float, Meta(ge=0, le=1)])
    ('dict[str, list[int]]', 'float, >= 0, <= 1')
    """
    if type(kind) is type:
        return str(kind.__name__)
    if hasattr(kind, "__metadata__"):
        facts = [fact for meta in kind.__metadata__ if isinstance(meta, Meta) for fact in _facts(meta)]
        return ", ".join([describe_type(kind.__origin__), *facts])
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    return str(kind).replace("typing.", "").replace("NoneType", "None")


def carried_by_json(kind: Any, value: Any) -> bool:
    """Return True if JSON supports values of this type, and this one.

    >>> carried_by_json(dict[int, str], {1: "a"}), carried_by_json(list[complex], [1j])
    (True, False)
    """
    try:
        _stated(kind)
        msgspec.json.encode(value)
    except TypeError:
        return False
    except (ValueError, RecursionError):  # a type that JSON supports; `convert` reports what is wrong with the value
        pass
    return not _loses_keys(kind)


_REASONS = (
    ("Invalid enum value ", "Expected one of the values of the schema, got "),
    ("Object contains unknown field ", "Expected the fields of the schema, got the unknown field "),
    ("Object missing required field ", "Expected all required fields, got none named "),
)
"""msgspec's reasons that do not say what was expected, and ours."""


def _unfit(raw: Any, kind: Any, error: Exception) -> Unfit:
    """Convert msgspec's message to our form: expected, got, and the path separately."""
    if isinstance(error, RecursionError):
        return Unfit(f"Expected a value of at most {DEPTH_LIMIT} levels, got one that is nested deeper")
    if isinstance(error, UnicodeEncodeError):
        return Unfit(NO_SURROGATE)
    reason, _, path = str(error).partition(" - at ")
    path = path.strip("`")
    for theirs, ours in _REASONS:
        reason = reason.replace(theirs, ours) if path else reason
    if path.startswith("$"):
        return Unfit(reason, path[1:])
    if path:  # msgspec's notation for a key: "`key` in `$.x`"
        return Unfit(f"{reason} for a key", path.rpartition("$")[2])
    if reason.startswith("Invalid enum value"):
        return Unfit(f"Expected {describe_type(kind)}, got {shorten(raw)}")
    return Unfit(f"{reason.partition(', got ')[0]}, got {shorten(raw)}")


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the items of a value, each with its step in a path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield "", key
            yield f".{key}", item
    elif isinstance(value, list | tuple | AbstractSet):
        for i, item in enumerate(value):
            yield f"[{i}]", item
    elif names := getattr(value, "__struct_fields__", None) or getattr(value, "__dataclass_fields__", None):
        for name in names:
            yield f".{name}", getattr(value, name)


def _loses_keys(kind: Any) -> bool:
    """Return True if a type has keys of any type somewhere: JSON converts them to text, and their types are lost."""
    arguments = get_args(kind)
    return (get_origin(kind) is dict and arguments[0] is Any) or any(map(_loses_keys, arguments))


def _common(values: Iterable[Any]) -> Any:
    """Return the one type of all items, float for a mix of int and float, else Any."""
    kinds: list[Any] = []
    for value in values:
        kind = infer_type(value)
        if kind not in kinds:
            kinds.append(kind)
    if len(kinds) == 1:
        return kinds[0]
    return float if len(kinds) == 2 and int in kinds and float in kinds else Any


def _facts(meta: Meta) -> list[str]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of", "pattern": "matching"}
    signs |= {"min_length": "at least", "max_length": "at most"}
    found = [(name, sign, getattr(meta, name)) for name, sign in signs.items()]
    unit = {"min_length": " long", "max_length": " long"}
    return [f"{sign} {value}{unit.get(name, '')}" for name, sign, value in found if value is not None]


def _inline(part: Any, components: Mapping[str, Any], inside: tuple[str, ...]) -> Any:
    """Replace references by their targets; a recursive type becomes {} (anything)."""
    if isinstance(part, list):
        return [_inline(item, components, inside) for item in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        rest = {key: value for key, value in part.items() if key != "$ref"}
        return {} if name in inside else {**_inline(components[name], components, (*inside, name)), **rest}
    return {key: _inline(value, components, inside) for key, value in part.items()}


T = TypeVar("T")
Constraint = str | Callable[[Any], bool] | None
"""A requirement on a value beyond its type: text for the optimizer, or a predicate."""

UNNAMED = "parameter"

CODE = "__code"
"""The suffix of an operation's name in the name of the parameter that holds its source."""

_overrides: ContextVar[Mapping[ParameterNode[Any], Any]] = ContextVar("aggregator_overrides")
_NOTHING: Mapping[Any, Any] = {}


class ParameterNode(Generic[T]):
    """A value that training may change, with the type, description and constraint that a new value must meet.

    `type` defaults to the value's own (`["a"]` is a list[str]); `Annotated[float, Meta(ge=0, le=1)]` adds bounds.
    `name` defaults to the attribute path from the module whose parameters are listed, such as "retriever.k".
    `constraint` is text for the optimizer, or a predicate: a new value for which it returns False or raises ValueError
    is refused. `trainable=False` keeps the value out of training; it is still saved and loaded if JSON supports it.
    `demonstrations=True` marks worked examples, which may quote the training data (`leak_guard`).

    Raises ParameterError for an invalid value, ConfigError for a type that JSON does not support.

    >>> from typing import Annotated
    >>> words = ParameterNode(5, type=Annotated[int, Meta(ge=1, le=50)], name="words")
    >>> words.data, words.convert("7")
    (5, 7)
    >>> words.data = 99
    Traceback (most recent call last):
        ...
    aggregator.errors.ParameterError: Expected `int` <= 50, got 99 - at words.data
    """

    def __init__(
        self,
        data: T,
        *,
        name: str | None = None,
        type: Any = None,  # noqa: A002 - the word users know
        description: str | None = "",
        constraint: Constraint = None,
        trainable: bool = True,
        demonstrations: bool = False,
    ) -> None:
        if name == "":
            raise ConfigError("Expected a name, got ''; leave it out for the attribute path")
        self.name = name or UNNAMED
        self.named = name is not None
        self.type = infer_type(data) if type is None else type
        self.description = description or ""
        self.constraint = constraint
        self.trainable = trainable
        self.demonstrations = demonstrations
        self.in_run = 0
        if trainable and not carried_by_json(self.type, data):
            raise ConfigError(
                f"Expected a value that JSON can carry, got {shorten(data)} of type "
                f"{describe_type(self.type)} for the parameter {self.name}; use str, int, float, bool, "
                "list, dict (its keys all text or all numbers) or a msgspec.Struct, or trainable=False"
            )
        self._stored: T = self.check(data, self.name)

    @property
    def data(self) -> T:
        """The value: the current context's override if there is one, otherwise the stored one.

        Assigning converts and checks, and raises ParameterError. Inside `overriding` an assignment lasts as long as the
        override does.
        """
        value: T = _overrides.get(_NOTHING).get(self, self._stored)
        return value

    @data.setter
    def data(self, raw: T) -> None:
        value = self.check(raw, f"{self.name}.data")
        overrides = _overrides.get(_NOTHING)
        if self in overrides:
            _overrides.set({**overrides, self: value})
        else:
            self._stored = value

    @property
    def value(self) -> T:
        """The value, under its name in `aggregator.protocols.Parameter`."""
        return self.data

    def store(self, value: T) -> None:
        """Store a value of this parameter's type permanently, as `write` does, without converting or checking it."""
        self._stored = value

    def __shows_as__(self) -> T:
        """Return the value: `text.show` prints a parameter as its value."""
        return self.data

    @property
    def py_name(self) -> str:
        """The name as an identifier, used in prompts and suggestions: "retriever_k"."""
        return py_name(self.name)

    def convert(self, raw: Any) -> T:
        """Return a suggested value converted to this parameter's type; raises ParameterError, and never guesses."""
        return self.check(raw, f"$.suggestion.{py_name(self.name)}")

    def check(self, raw: Any, where: str) -> T:
        """Convert and check a value; `where` is the position named by the error."""
        try:
            value: T = convert(raw, self.type)
            if callable(self.constraint):
                self._constrain(value)
        except Unfit as unfit:
            raise ParameterError(f"{unfit.reason} - at {where}{unfit.path}") from None
        return value

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema of the value, with its description if it has one."""
        stated = schema(self.type)
        return stated | {"description": self.description} if self.description else stated

    def code_engine(self) -> str | None:
        """Return where source in this parameter runs: "process", "monty" or "here" (this process); None for no code."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return the description for a prompt: value, type, and description and constraint if given."""
        facts = {"value": self.data, "type": describe_type(self.type)}
        if self.description:
            facts["description"] = self.description
        if self.constraint is not None and (words := constraint_words(self.constraint)):
            facts["constraint"] = words
        return facts

    def _constrain(self, value: T) -> None:
        constraint: Any = self.constraint
        try:
            fits = constraint(value)
        except ValueError as error:
            raise Unfit(f"Expected {constraint_words(self.constraint)}, got {shorten(value)}: {error}") from None
        if not fits:
            raise Unfit(f"Expected {constraint_words(self.constraint)}, got {shorten(value)}")

    def __str__(self) -> str:
        return str(self.data)

    def __repr__(self) -> str:
        return f"ParameterNode({shorten(self.data)}, name={self.name!r})"


@overload
def node(data: ParameterNode[T]) -> ParameterNode[T]: ...
@overload
def node(
    data: T,
    name: str | None = None,
    trainable: bool = False,
    description: str | None = None,
    constraint: Constraint = None,
) -> ParameterNode[T]: ...
def node(
    data: Any,
    name: str | None = None,
    trainable: bool = False,
    description: str | None = None,
    constraint: Constraint = None,
) -> ParameterNode[Any]:
    """Return a parameter, under Trace's name and with Trace's defaults: not trainable by default.

    >>> node("Answer briefly.", trainable=True).data
    'Answer briefly.'
    """
    if isinstance(data, ParameterNode):
        return data
    return ParameterNode(data, name=name, description=description, constraint=constraint, trainable=trainable)


def read(parameters: Iterable[ParameterNode[Any]]) -> Values:
    """Return name -> value, copied, so that later changes to the agent do not affect the result."""
    return values_of(by_name(parameters).values())


def values_of(parameters: Iterable[ParameterNode[Any]]) -> Values:
    """Do as `read` with parameters whose names are known to differ."""
    return {one.name: data if type(data := one.data) in SCALARS else snapshot(data) for one in parameters}


def write(parameters: Iterable[ParameterNode[Any]], values: Values) -> None:
    """Store new values, or none if one is refused; names left out keep their value.

    Raises ParameterError for a refused value and an unknown name.
    """
    for parameter, value in _checked(parameters, values).items():
        parameter.store(value)


def is_overridden(parameter: ParameterNode[Any]) -> bool:
    """Return True if this context overrides a parameter."""
    return parameter in _overrides.get(_NOTHING)


@contextmanager
def overriding(parameters: Iterable[ParameterNode[Any]], values: Values) -> Iterator[None]:
    """Override these parameters by `values` in the current context (task, thread) and in what is started from it.

    Nothing shared is changed, so contexts with different values run concurrently, and nothing needs restoring. Raises
    ParameterError as `write` does.
    """
    token = _overrides.set({**_overrides.get(_NOTHING), **_checked(parameters, values)})
    try:
        yield
    finally:
        _overrides.reset(token)


class lay_over(AbstractContextManager[None]):  # noqa: N801 - a context manager as `overriding`, entered per instance
    """Do as `overriding` with values that are known to have the right types."""

    def __init__(self, values: Mapping[ParameterNode[Any], Any]) -> None:
        self._values = values

    def __enter__(self) -> None:
        laid = dict(_overrides.get(_NOTHING))
        for one, value in self._values.items():
            laid[one] = value if type(value) in SCALARS else snapshot(value)
        self._token = _overrides.set(laid)

    def __exit__(self, *error: object) -> None:
        _overrides.reset(self._token)


def by_name(parameters: Iterable[ParameterNode[Any]]) -> dict[str, ParameterNode[Any]]:
    """Return name -> parameter in order; raises ConfigError if two share a name or py_name."""
    return index([(parameter.name, parameter) for parameter in parameters])


def index(found: Iterable[tuple[str, ParameterNode[Any]]]) -> dict[str, ParameterNode[Any]]:
    """Return name -> parameter for (path, parameter): its own name if given, otherwise the path.

    Raises ConfigError if two share a name or py_name.
    """
    named: dict[str, ParameterNode[Any]] = {}
    owners: dict[str, tuple[str, ParameterNode[Any]]] = {}
    for path, parameter in found:
        name = parameter.name if parameter.named else path
        other, owner = owners.setdefault(py_name(name), (path, parameter))
        if owner is not parameter:
            raise ConfigError(
                f"Expected parameters of different names, got {other!r} and {path!r}, which are both "
                f"{py_name(name)!r} in prompts; rename an attribute or give name="
            )
        named[name] = parameter
    return named


@lru_cache(maxsize=4096)  # called several times per instance
def py_name(name: str) -> str:
    """Return a name as an identifier.

    >>> py_name("steps.0.prompt"), py_name("a:10"), py_name("a1:0")
    ('steps_0_prompt', 'a_10', 'a1_0')
    """
    safe = re.sub(r"\W", "_", name)
    if not f"_{safe}".isidentifier():  # a superscript digit, for example
        safe = "".join(letter if f"_{letter}".isidentifier() else "_" for letter in safe)
    return safe if safe.isidentifier() else f"_{safe}"


def constraint_words(constraint: Constraint) -> str:
    """Return a constraint as text: the text itself, or a predicate's docstring or name."""
    if constraint is None or isinstance(constraint, str):
        return constraint or ""
    words = (getattr(constraint, "__doc__", None) or "").strip().split("\n")[0]
    return words or f"a value that satisfies {getattr(constraint, '__name__', type(constraint).__name__)}"


def _checked(parameters: Iterable[ParameterNode[Any]], values: Values) -> dict[ParameterNode[Any], Any]:
    """Return parameter -> converted value for every name in `values`."""
    known = by_name(parameters)
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ParameterError(f"Expected names of parameters ({', '.join(known) or 'none'}), got {', '.join(unknown)}")
    return {known[name]: known[name].check(snapshot(raw), name) for name, raw in values.items()}
