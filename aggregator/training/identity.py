"""The identity of a run's parts and data, as JSON: whether a resumed run is the same run.

A run is resumed only with the same guide, gate, rule, optimizer, models and search, and with the same data to the byte.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import msgspec

from aggregator.text import canonical_json, show

REVISION = "2"
"""The revision of these rules: a digest of another revision cannot be compared where code is part of it."""
_DEEPEST = 8
_DOCUMENTED = 0x4000000 if sys.version_info >= (3, 14) else inspect.CO_OPTIMIZED
"""The flag of code whose first constant is its docstring: before Python 3.14 that of every function; None is none."""
_OURS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")  # noqa: PTH118, PTH120 - a prefix of file names
_WHOLE = 2**62
_NOT_OWN = (_OURS, *(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "purelib", "platlib")))  # noqa: PTH118
"""Where code is that is not the user's: another version of a package is the same part."""
_CONSTANTS = (str, int, float, bytes, tuple, frozenset, re.Pattern)
_SETTINGS = (str, float, bytes, tuple, frozenset, re.Pattern, FunctionType)


def digest(value: Any) -> str:
    """Return a short hash of a value's canonical JSON.

    Of values without a JSON form it hashes arrays, frames and images byte for byte, other objects by their attributes,
    and the rest by their text without addresses.

    >>> digest({"a": object(), "b": 1}) == digest({"b": 1, "a": object()})
    True
    """
    try:
        text = canonical_json(value, _show_whole)
    except (TypeError, ValueError, RecursionError):  # keys of other types, lone surrogates, a list that contains itself
        text = show(value, _WHOLE).encode(errors="backslashreplace")
    return hashlib.sha256(text).hexdigest()[:16]


def _show_whole(value: Any) -> Any:
    content = content_of(value)
    if content is not None:
        return content
    held = _attributes(value)
    if held and not callable(value):
        return [type(value).__qualname__, held]
    return show(value, _WHOLE)


# ---- the identity of a run's parts


def identity_of(part: Any, depth: int = 0) -> Any:
    """Return JSON that identifies a part: models by name, functions by code and closure, the library's by closure only.

    An object is its class with its code, and its settings: constructor arguments, functions, strings, floats and other
    immutable values. Counters and lists are left out, so that a used part is still the same. The user's code includes
    the functions and constants of its module that it names.

    >>> identity_of(lambda x: 1) == identity_of(lambda x: 1), identity_of(lambda x: 1) == identity_of(lambda x: 2)
    (True, False)
    """
    if part is None or isinstance(part, str | int | float | bool):
        return part
    if depth > _DEEPEST:
        return type(part).__qualname__
    deeper = functools.partial(identity_of, depth=depth + 1)
    match part:
        case type():
            return part.__qualname__
        case functools.partial():
            return ["partial", deeper(part.func), [deeper(one) for one in part.args], deeper(part.keywords)]
        case Mapping():
            return sorted([show(key, _WHOLE), deeper(value)] for key, value in part.items())
        case AbstractSet():
            return sorted(map(repr, part))
        case Sequence() if not isinstance(part, bytes | bytearray | memoryview):
            return [deeper(one) for one in part]
        case MethodType():
            return [deeper(part.__func__), deeper(part.__self__)]
        case FunctionType():
            return _function(part, depth)
    return _other(part, depth)


def _other(part: Any, depth: int) -> Any:
    if isinstance(part, bytes | bytearray | memoryview):
        return hashlib.sha256(part).hexdigest()
    if isinstance(part, re.Pattern):  # its repr is cut
        return ["pattern", part.pattern, part.flags]
    if isinstance(part, msgspec.Struct):
        fields = [[name, identity_of(getattr(part, name), depth + 1)] for name in part.__struct_fields__]
        return [type(part).__qualname__, fields, *_code_of_class(type(part), depth)]
    if hasattr(part, "__wrapped__"):  # a function in a cache
        return identity_of(part.__wrapped__, depth + 1)
    if hasattr(part, "complete") and hasattr(part, "model"):
        return _model(part)
    if hasattr(part, "train") and hasattr(part, "agent"):  # a hooked rule refers to its trainer
        return type(part).__qualname__
    content = content_of(part)
    return content if content is not None else _object(part, depth)


def _model(model: Any) -> Any:
    """Return the settings that change a model's answers: name, server, API, and fields merged into each request.

    Keys, limits, timeouts and the port of a local server do not change them.
    """
    if several := getattr(model, "models", ()):
        return ["models", [_model(one) for one in several]]
    endpoint = getattr(model, "endpoint", None)
    if endpoint is None:
        return ["model", str(model.model)]
    address = re.sub(r"^(\w+://(?:localhost|127\.[\d.]+|\[::1\])):\d+", r"\1", str(endpoint.base_url))
    codec = type(endpoint.codec)
    return ["model", str(model.model), address, codec.__qualname__, identity_of(dict(model.extra or {}))]


def models_in(agent: Any) -> dict[str, Any]:
    """Return the models that an agent holds, by path: in its attributes, those of its parts, lists and dicts.

    For a function its variables are searched.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("", agent, 0)]
    while waiting:
        name, thing, depth = waiting.pop()
        if id(thing) in seen or depth > _DEEPEST:
            continue
        seen.add(id(thing))
        if hasattr(thing, "complete") and hasattr(thing, "model"):
            found[name] = thing
        else:
            waiting += [(f"{name}.{key}", one, depth + 1) for key, one in _parts_of(thing, is_agent=depth == 0)]
    return found


def _parts_of(thing: Any, *, is_agent: bool) -> list[tuple[Any, Any]]:
    """Return the attributes of an agent or one of its parts that may hold a model."""
    if isinstance(thing, list | tuple):
        return list(enumerate(thing))
    if isinstance(thing, dict):
        return list(thing.items())
    if isinstance(thing, FunctionType):
        used = {name: thing.__globals__[name] for name in thing.__code__.co_names if name in thing.__globals__}
        used |= inspect.getclosurevars(thing).nonlocals
        return [(name, one) for name, one in used.items() if not inspect.ismodule(one)]
    if not isinstance(thing, type) and (is_agent or callable(getattr(thing, "parameters", None))):
        return list(getattr(thing, "__dict__", {}).items())
    return []


def _function(function: Any, depth: int) -> Any:
    code = function.__code__
    held: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            held[name] = identity_of(cell.cell_contents, depth + 1)
        except ValueError:  # a variable without a value yet
            held[name] = None
    defaults = [identity_of(one, depth + 1) for one in function.__defaults__ or ()]
    named = identity_of(function.__kwdefaults__ or {}, depth + 1)
    own = None if _is_library(code) else _code(code)
    return [function.__qualname__, own, sorted(held.items()), defaults, named, *_named_by([function], depth)]


def code_of(agent: Any) -> Any:
    """Return JSON that identifies an agent's code: of a function, or of a class with the bases that the user wrote."""
    agent = getattr(agent, "function", agent)
    while isinstance(agent, functools.partial):
        agent = agent.func
    if isinstance(agent, FunctionType):
        return [_code(agent.__code__), *_named_by([agent], 0)]
    return _code_of_class(type(agent), 0)


def _is_library(code: CodeType) -> bool:
    return code.co_filename.startswith(_NOT_OWN)


def _code_of_class(kind: type, depth: int) -> list[Any]:
    """Return the methods that the user wrote, of a class and its bases, and what they name."""
    methods = _methods_of(kind)
    return [*([method.__qualname__, _code(method.__code__)] for method in methods), *_named_by(methods, depth)]


def _methods_of(kind: type) -> list[FunctionType]:
    found: list[FunctionType] = []
    for value in (value for one in kind.__mro__ for value in vars(one).values()):
        inner = getattr(value, "__func__", None) or getattr(value, "fget", None) or value  # static, class, property
        if isinstance(inner, FunctionType) and not _is_library(inner.__code__):
            found.append(inner)
    return found


def _named_by(functions: Sequence[FunctionType], depth: int) -> list[Any]:
    """Return what the user's functions name in their module, and what that names in turn.

    These are functions, classes, constants, models, and objects that are called.
    """
    found: dict[str, Any] = {}
    waiting = [one for one in functions if not _is_library(one.__code__)]
    known = set(map(id, waiting))
    while waiting:
        function = waiting.pop()
        for name in _globals_read(function.__code__):
            value = function.__globals__.get(name)
            value = inspect.unwrap(value) if callable(value) else value
            if id(value) in known or name.startswith("__"):
                continue
            if isinstance(value, _CONSTANTS):
                found[name] = show(identity_of(value, _DEEPEST), _WHOLE)
            elif isinstance(value, FunctionType | type):
                named = [value] if isinstance(value, FunctionType) else _methods_of(value)
                own = [one for one in named if not _is_library(one.__code__)]
                if own:
                    found[name] = [_code(one.__code__) for one in own]
                known.add(id(value))
                known.update(map(id, own))
                waiting += own
            elif callable(value) and depth < _DEEPEST and not isinstance(value, BuiltinFunctionType):
                found[name] = identity_of(value, depth + 1)
    return [sorted(found.items())] if found else []


def _globals_read(code: CodeType) -> set[str]:
    """Return the module's variables that code reads and does not assign."""
    found: dict[str, set[Any]] = {"LOAD_GLOBAL": set(), "STORE_GLOBAL": set()}
    waiting = [code]
    while waiting:
        one = waiting.pop()
        waiting += [inner for inner in one.co_consts if isinstance(inner, CodeType)]
        for instruction in dis.get_instructions(one):
            if instruction.opname in found:
                found[instruction.opname].add(instruction.argval)
    return found["LOAD_GLOBAL"] - found["STORE_GLOBAL"]


def _code(code: CodeType) -> Any:
    """Return a function's code as JSON, without its docstring.

    Sets among its constants are sorted, as processes order them differently.
    """
    held = list(code.co_consts)
    if code.co_flags & _DOCUMENTED and not code.co_name.startswith("<"):  # else a lambda or a comprehension
        held[0] = None
    constants = [
        _code(one) if isinstance(one, CodeType) else sorted(map(repr, one)) if isinstance(one, frozenset) else repr(one)
        for one in held
    ]
    return [hashlib.sha256(code.co_code).hexdigest()[:16], list(code.co_names), constants]


def _object(part: Any, depth: int) -> Any:
    kind: Any = type(part)
    try:
        taken = set(inspect.signature(kind).parameters)
    except (TypeError, ValueError):  # written in C
        taken = set()
    settings: dict[str, Any] = {}
    for name, value in _attributes(part).items():
        if name.lstrip("_") in taken or isinstance(value, _SETTINGS):
            settings[name] = identity_of(value, depth + 1)
    code = [] if kind.__module__.partition(".")[0] == "aggregator" else _code_of_class(kind, depth)
    if not settings and not code and kind.__eq__ is not object.__eq__:  # a value, as a date or a path
        return [kind.__qualname__, show(part, _WHOLE)]
    return [kind.__qualname__, sorted(settings.items()), code]


def _attributes(thing: Any) -> dict[str, Any]:
    """Return an object's attributes, also those in slots, unless its repr shows these."""
    kind: Any = type(thing)
    held = dict(getattr(thing, "__dict__", ()))
    if kind.__repr__ is object.__repr__ or hasattr(kind, "__dataclass_fields__") or hasattr(kind, "__attrs_attrs__"):
        slots = [vars(base).get("__slots__", ()) for base in kind.__mro__]
        names = [name for own in slots for name in ([own] if isinstance(own, str) else own)]
        held |= {name: getattr(thing, name) for name in names if name != "__weakref__" and hasattr(thing, name)}
    return held


def content_of(value: Any) -> Any:
    """Return the content of an array, a data frame, an image or a plain object, byte for byte; None for anything else.

    Their repr leaves out the middle, or shows the class only.
    """
    if isinstance(value, msgspec.Struct | bytes | bytearray | memoryview):
        return None
    module = type(value).__module__.partition(".")[0]
    if module in ("pandas", "polars") and hasattr(value, "to_numpy"):
        index = [content_of(value.index.to_numpy())] if hasattr(value, "index") and module == "pandas" else []
        columns = [value[name] for name in value.columns] if hasattr(value, "columns") else []
        if columns:
            names = [show(name, _WHOLE) for name in value.columns]
            return ["frame", names, index, [content_of(one.to_numpy()) for one in columns]]
        return ["series", index, content_of(value.to_numpy())]
    if "torch" in sys.modules and hasattr(value, "detach") and hasattr(value, "cpu"):
        value = value.detach().cpu().numpy()
    if hasattr(value, "tobytes") and hasattr(value, "shape") and hasattr(value, "dtype"):
        if getattr(value.dtype, "hasobject", False):
            return ["array", str(value.dtype), list(value.shape), [show(one, _WHOLE) for one in value.ravel().tolist()]]
        return ["array", str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if hasattr(value, "tobytes") and hasattr(value, "size"):  # an image of Pillow's
        shape = [getattr(value, "mode", ""), show(value.size, _WHOLE)]
        return ["image", shape, hashlib.sha256(value.tobytes()).hexdigest()]
    return None
