"""What a part is, told apart from others of its kind: its class, its code and its settings, not what it has seen.

A run is resumed only with the same guide, gate, rule, optimizer, models and search, and with the same data to the byte.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import CodeType, FunctionType, MethodType
from typing import Any

import msgspec

from aggregator.text import show

_DEEPEST = 8
_WHOLE = 2**62
_METHODS = ("__call__", "get_feedback", "propose", "judge", "explore", "trials", "choose", "keep")
"""What decides in a part of the user's own, and is compared as code."""


def identity_of(part: Any, depth: int = 0) -> Any:
    """Return JSON that says what a part is: models by name, functions by their code and what they hold.

    Of an object it has the class and the settings: what its constructor takes, and its texts and fractions.
    Counters and lists that it fills are not among them, so that a part that was used is still the same.

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
    if isinstance(part, msgspec.Struct):
        fields = part.__struct_fields__
        return [type(part).__qualname__, [[name, identity_of(getattr(part, name), depth + 1)] for name in fields]]
    if hasattr(part, "complete") and hasattr(part, "model"):
        return ["model", str(part.model)]
    if hasattr(part, "train") and hasattr(part, "agent"):  # a hooked rule knows its trainer
        return type(part).__qualname__
    content = content_of(part)
    return content if content is not None else _object(part, depth)


def _function(function: Any, depth: int) -> Any:
    code = function.__code__
    held: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            held[name] = identity_of(cell.cell_contents, depth + 1)
        except ValueError:  # a variable that has no value yet
            held[name] = None
    defaults = [identity_of(one, depth + 1) for one in function.__defaults__ or ()]
    named = identity_of(function.__kwdefaults__ or {}, depth + 1)
    return [function.__qualname__, _code(code), sorted(held.items()), defaults, named]


def _code(code: CodeType) -> Any:
    """Return what code does; sets among its constants in order, which differs from process to process."""
    constants = [
        _code(one) if isinstance(one, CodeType) else sorted(map(repr, one)) if isinstance(one, frozenset) else repr(one)
        for one in code.co_consts
    ]
    return [hashlib.sha256(code.co_code).hexdigest()[:16], list(code.co_names), constants]


def _object(part: Any, depth: int) -> Any:
    kind = type(part)
    try:
        taken = set(inspect.signature(kind).parameters)
    except (TypeError, ValueError):  # written in C
        taken = set()
    settings: dict[str, Any] = {}
    for name, value in getattr(part, "__dict__", {}).items():
        if name.lstrip("_") in taken or isinstance(value, str | float):
            settings[name] = identity_of(value, depth + 1)
    own = [] if kind.__module__.partition(".")[0] == "aggregator" else [getattr(kind, name, None) for name in _METHODS]
    code = [_code(method.__code__) for method in own if inspect.isfunction(method)]
    return [kind.__qualname__, sorted(settings.items()), code]


def content_of(value: Any) -> Any:
    """Return what an array, a data frame, an image or a plain object holds, byte for byte; None for anything else.

    Their repr leaves out the middle, or says nothing but the class.
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
