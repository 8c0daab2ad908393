"""The data sent to a worker process and back, in msgpack.

A worker runs code that a model wrote, so nothing that it sends is trusted: a frame has a length limit and the number of
its call, a result has a limit of values and depth, and an exception is built from a fixed table of classes.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.errors import ConfigError, SandboxError

DEPTH = 64
"""The maximum nesting of containers in a value."""

FRAME_OVERHEAD = 1 << 16
"""The number of bytes of a worker's frame beyond the result: call number, limit, an error's text."""

TUPLE, SET, FROZENSET, PATTERN = 1, 2, 3, 4
"""The extension types for values that msgpack lacks. They are sent to a worker; none is accepted back."""

_SETS: dict[type, int] = {set: SET, frozenset: FROZENSET}
_MADE: dict[int, type] = {TUPLE: tuple, SET: set, FROZENSET: frozenset}
_TUPLE_KEYS = 1_000  # keys that are tuples: their hashes can be chosen to collide, which makes a dict slow
_TEXT = 10_000
_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(ArithmeticError, AssertionError, AttributeError, BlockingIOError, BrokenPipeError, BufferError),
        *(ChildProcessError, ConnectionAbortedError, ConnectionError, ConnectionRefusedError, ConnectionResetError),
        *(EOFError, Exception, FileExistsError, FileNotFoundError, FloatingPointError, ImportError, IndentationError),
        *(IndexError, InterruptedError, IsADirectoryError, KeyError, LookupError, ModuleNotFoundError, NameError),
        *(NotADirectoryError, NotImplementedError, OSError, OverflowError, PermissionError, ProcessLookupError),
        *(RecursionError, ReferenceError, RuntimeError, StopAsyncIteration, StopIteration, SyntaxError, SystemError),
        *(TabError, TimeoutError, TypeError, UnboundLocalError, UnicodeDecodeError, UnicodeEncodeError, UnicodeError),
        *(UnicodeTranslateError, ValueError, ZeroDivisionError),
    )
}
"""The exceptions of trained code that keep their class; any other becomes a SandboxError that names it."""


class Function(Struct, frozen=True, kw_only=True):
    """One function as source, and what it uses: plain values, modules by name, other functions by key.

    The name of a method is not a name of its module. `imports` are modules that the source imports itself, of packages
    that it may use. `missing` maps a name that cannot be sent to its description.
    """

    source: str
    name: str
    is_method: bool = False
    values: dict[str, Any] = {}
    modules: dict[str, str] = {}
    imports: list[str] = []
    uses: dict[str, str] = {}
    missing: dict[str, str] = {}


class Call(Struct, frozen=True, kw_only=True):
    """One call to make in a worker: of `functions[""]`, with everything that it needs.

    `owner` holds the plain attributes of `self`, each with True if it is a parameter; None for a function without one.
    `methods` maps the methods of `self` to their keys in `functions`.
    """

    functions: dict[str, Function]
    args: list[Any]
    kwargs: dict[str, Any]
    owner: dict[str, tuple[bool, Any]] | None
    methods: dict[str, str] = {}
    asynchronous: bool
    seconds: float
    memory: int
    output: int
    most_values: int

    @property
    def name(self) -> str:
        """The name of the operation."""
        return self.functions[""].name

    @property
    def packages(self) -> frozenset[str]:
        """The names of packages, Python's own excepted, that its worker has imported."""
        found = {
            name for function in self.functions.values() for name in (*function.modules.values(), *function.imports)
        }
        return frozenset({name.partition(":")[0].partition(".")[0] for name in found} - sys.stdlib_module_names)

    def encode(self) -> bytes:
        """Return the request as bytes; raises ConfigError for a value that msgpack does not support."""
        try:
            return msgspec.msgpack.encode(self)
        except (OverflowError, RecursionError, ValueError) as error:
            raise ConfigError(f"Expected arguments of {self.name} that can cross to its sandbox, got {error}") from None


def pack(value: Any, *, wide: bool = False, levels: int = DEPTH) -> Any:
    """Return a plain value for msgpack, with tuples marked as such.

    Plain are None, bool, int, float, str, bytes, and lists, tuples and dicts of them; with `wide` also sets and regular
    expressions. Raises TypeError with the name of the type for anything else.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes):
        return value
    if not levels:
        raise TypeError(f"a value nested deeper than {DEPTH} levels")
    if kind is list:
        return [pack(item, wide=wide, levels=levels - 1) for item in value]
    if wide and kind is re.Pattern:
        return msgspec.msgpack.Ext(PATTERN, msgspec.msgpack.encode([value.pattern, value.flags]))
    if kind is tuple or (wide and kind in _SETS):
        items = [pack(item, wide=wide, levels=levels - 1) for item in value]
        if kind is not tuple:
            items.sort(key=repr)  # an order that does not depend on hashing
        return msgspec.msgpack.Ext(TUPLE if kind is tuple else _SETS[kind], msgspec.msgpack.encode(items))
    if kind is not dict:
        raise TypeError(kind.__name__)
    for key in value:
        pack(key, levels=1)
    return {key: pack(item, wide=wide, levels=levels - 1) for key, item in value.items()}


def unpack(kind: int, data: memoryview) -> Any:
    """Return a value marked by `pack` as a type that msgpack lacks."""
    items = msgspec.msgpack.decode(data, ext_hook=unpack)
    return re.compile(*items) if kind == PATTERN else _MADE[kind](items)


def plain(call: Call) -> dict[str, Any]:
    """Return a call as a worker sees it, unpacked."""
    seen: dict[str, Any] = msgspec.msgpack.decode(call.encode(), ext_hook=unpack)
    return seen


class Frame(Struct, frozen=True, array_like=True):
    """A worker's message: the limit that ended the call ("" for none), and the bytes of the code's own answer."""

    limit: str
    content: bytes


class Fault(Struct, frozen=True, kw_only=True):
    """An exception of trained code, as it describes itself."""

    kind: str
    text: str
    line: int = 0
    args: list[Any] = []


class Answer(Struct, frozen=True, kw_only=True):
    """The answer of trained code: a value, the error that it raised, or the limit that it exceeded."""

    value: Any = None
    error: Fault | None = None
    limit: str = ""


def result_of(frame: Frame, call: Call) -> Any:
    """Return a call's value, or raise its error.

    Raises SandboxError for a limit, for an exception that is not a builtin one, and for a malformed answer.
    """
    if frame.limit:
        raise _beyond(call, frame.limit)
    try:
        check_content(frame.content, call.most_values)
        answer = msgspec.msgpack.decode(frame.content, type=Answer)
    except _TooLarge as error:
        raise _beyond(call, str(error)) from None
    except (msgspec.MsgspecError, ValueError, RecursionError, TypeError, OverflowError) as error:
        raise SandboxError(
            f"Expected an answer from the sandbox of {call.name}, got one that is no data: {error}"
        ) from None
    if answer.limit:
        raise _beyond(call, answer.limit)
    if answer.error is not None:
        raise rebuild(answer.error, call.name)
    return answer.value


def _beyond(call: Call, limit: str) -> SandboxError:
    return SandboxError(f"Expected {call.name} to stay within its sandbox, but {limit[:_TEXT]}")


def rebuild(fault: Fault, name: str) -> Exception:
    """Return the exception of trained code, with its own class if the table has it."""
    kind, text = _ERRORS.get(fault.kind), fault.text[:_TEXT]
    error: Exception = SandboxError(f"{name} failed with {fault.kind[:200]}: {text}")
    if kind is not None:
        args = fault.args if _are_sound(kind, fault.args) else [text]
        try:
            error = kind(*args)
        except (TypeError, ValueError, OverflowError):  # a class with other arguments
            error = SandboxError(f"{name} failed with {kind.__name__}: {text}")
    error.__dict__["source_line"] = fault.line if 0 <= fault.line <= 1_000_000 else 0
    return error


def _are_sound(kind: type[Exception], args: list[Any]) -> bool:
    """Return True for a few plain values, which for a Unicode error have a position inside its object.

    CPython reads at that position without a check when it prints the error.
    """
    if len(args) > 5 or not all(
        arg is None or type(arg) in (bool, int, float) or (type(arg) in (str, bytes) and len(arg) <= _TEXT)
        for arg in args
    ):
        return False
    if not issubclass(kind, UnicodeDecodeError | UnicodeEncodeError | UnicodeTranslateError):
        return True
    texts = [arg for arg in args if type(arg) in (str, bytes)]  # the object comes before the reason
    places = [arg for arg in args if type(arg) is int]
    return len(texts) >= 2 and len(places) == 2 and 0 <= places[0] < places[1] <= len(texts[-2])


class _TooLarge(Exception):  # noqa: N818 - an answer between two functions of this file
    pass


_SCALAR, _ARRAY, _MAP, _EXTENSION = range(4)


def _shape(head: int) -> tuple[int, int, int]:
    """Return the meaning of a first byte of msgpack: the kind, the number of length bytes, and the length if known."""
    if 0x80 <= head < 0xC0:
        kind = _MAP if head < 0x90 else _ARRAY if head < 0xA0 else _SCALAR
        return kind, 0, head & (0x1F if kind == _SCALAR else 0x0F)
    if head in (0xDC, 0xDD, 0xDE, 0xDF):
        return (_ARRAY if head < 0xDE else _MAP), 2 << (head & 1), 0
    if 0xC4 <= head <= 0xC9:  # bin, ext
        return (_SCALAR, 1 << (head - 0xC4), 0) if head < 0xC7 else (_EXTENSION, 1 << (head - 0xC7), 0)
    if 0xD4 <= head <= 0xD8:
        return _EXTENSION, 0, 1 << (head - 0xD4)
    if 0xD9 <= head <= 0xDB:
        return _SCALAR, 1 << (head - 0xD9), 0
    return _SCALAR, 0, {0xCA: 4, 0xCB: 8}.get(head, 1 << (head & 3) if 0xCC <= head <= 0xD3 else 0)


_SHAPES = tuple(map(_shape, range(256)))


def _token(data: bytes, at: int) -> tuple[int, int, int]:
    """Return the kind of the value at a position, the position of the next one, and the number of its values."""
    if at >= len(data):
        raise ValueError("it is cut short")
    kind, width, number = _SHAPES[data[at]]
    at += 1 + width
    if width:
        number = int.from_bytes(data[at - width : at], "big")
    if kind == _SCALAR:
        return kind, at + number, 0
    if kind == _EXTENSION:
        if data[at : at + 1] != b"\xff":
            raise ValueError("it has an extension type that is no timestamp")
        return kind, at + 1 + number, 0
    return kind, at, number if kind == _ARRAY else 2 * number


def check_content(data: bytes, most_values: int) -> None:
    """Check msgpack before it is decoded: the number of values, the depth, and the types of keys.

    A byte can become a hundred in memory (an empty list), so a limit of bytes alone does not bound the memory of
    decoding. Raises ValueError for malformed data.
    """
    at, count, tuple_keys = 0, 0, 0
    left, in_map = 1, False  # the number of values that the innermost open container still expects
    outer: list[tuple[int, bool]] = []
    while left or outer:
        if not left:
            left, in_map = outer.pop()
            continue
        is_key = in_map and not left & 1
        left -= 1
        count += 1
        kind, at, inside = _token(data, at)
        if kind in (_ARRAY, _MAP):
            tuple_keys += is_key
            outer.append((left, in_map))
            left, in_map = inside, kind == _MAP
        if count > most_values:
            raise _TooLarge(f"its result holds more than {most_values} values")
        if tuple_keys > _TUPLE_KEYS:
            raise _TooLarge(f"its result has more than {_TUPLE_KEYS} keys that are tuples")
        if len(outer) > DEPTH + 1:  # the answer itself is one level
            raise _TooLarge(f"its result is nested deeper than {DEPTH} levels")
    if at != len(data):
        raise ValueError("its length is wrong")
