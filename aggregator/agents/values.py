"""Types of parameter values: inferred, converted, described.

Pure functions over values and types. Conversion is msgspec's lax one and never guesses: `"7"` becomes an int and
`"False"` a bool, but a number never becomes text, text never a list, and NaN or infinity never a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import Any, get_args, get_origin

import msgspec
from msgspec import Meta

from aggregator.text import shorten

DEPTH_LIMIT = 64
"""How many containers deep a value may be."""

NO_SURROGATE = "Expected text that UTF-8 can carry, got a lone surrogate"
SCALARS = frozenset({str, bool, int, float, type(None)})
"""The usual types of values; a copy of one is itself."""


class Unfit(ValueError):  # noqa: N818 - an answer between two functions of this room, not an error that users meet
    """A value that is not of the type: `reason` says expected and got, `path` where inside the value."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = path


def infer_type(value: Any) -> Any:
    """Return the type of a value, items included.

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
    """Raise Unfit where a value holds NaN, infinity or text that UTF-8 cannot carry, or is nested too deep."""
    if levels == 0:
        raise Unfit(f"Expected a value of at most {DEPTH_LIMIT} levels, got one that is nested deeper")
    if value is None or isinstance(value, int):  # bool included
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
    """Return a copy that later changes in place do not reach."""
    if value is None or isinstance(value, str | int | float):
        return value
    from copy import deepcopy  # not needed where all values are texts and numbers

    return deepcopy(value)


def schema(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of a type, without references; {} for a type that JSON cannot state.

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
    """Return the schema of a type; raises TypeError where it has none."""
    try:
        hash(kind)
    except TypeError:
        return _schema.__wrapped__(kind)
    return _schema(kind)


@lru_cache(maxsize=256)
def _schema(kind: Any) -> dict[str, Any]:
    """Return the schema of a type; asked again for every proposal, so it is kept."""
    (found,), components = msgspec.json.schema_components([kind])
    inlined: dict[str, Any] = _inline(found, components, ())
    return inlined


def describe_type(kind: Any) -> str:
    """Return a type as people write it.

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
    """Return True if JSON can carry values of this type, and this one.

    >>> carried_by_json(dict[int, str], {1: "a"}), carried_by_json(list[complex], [1j])
    (True, False)
    """
    try:
        _stated(kind)
        msgspec.json.encode(value)
    except TypeError:
        return False
    except (ValueError, RecursionError):  # of a type that JSON has; `convert` says what is wrong with the value
        pass
    return not _loses_keys(kind)


def _unfit(raw: Any, kind: Any, error: Exception) -> Unfit:
    """Put msgspec's message into the house's form: expected, got, and the path apart."""
    if isinstance(error, RecursionError):
        return Unfit(f"Expected a value of at most {DEPTH_LIMIT} levels, got one that is nested deeper")
    if isinstance(error, UnicodeEncodeError):
        return Unfit(NO_SURROGATE)
    reason, _, path = str(error).partition(" - at ")
    path = path.strip("`")
    if path.startswith("$"):
        return Unfit(reason, path[1:])
    if path:  # msgspec's way to point at a key: "`key` in `$.x`"
        return Unfit(f"{reason} for a key", path.rpartition("$")[2])
    if reason.startswith("Invalid enum value"):
        return Unfit(f"Expected {describe_type(kind)}, got {shorten(raw)}")
    return Unfit(f"{reason.partition(', got ')[0]}, got {shorten(raw)}")


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value holds, each with its step in a path."""
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
    """Return True if a type has keys of any type somewhere: JSON makes text of them, and their types are lost."""
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
    """Replace references by what they name; a type inside itself becomes {} (anything)."""
    if isinstance(part, list):
        return [_inline(item, components, inside) for item in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        rest = {key: value for key, value in part.items() if key != "$ref"}
        return {} if name in inside else {**_inline(components[name], components, (*inside, name)), **rest}
    return {key: _inline(value, components, inside) for key, value in part.items()}
