"""The worker process of the sandbox: runs trained code in a fork restricted by the kernel.

The process that reads requests never runs trained code. It forks a child for each call in advance, which gives up its
rights (`kernel.py`, an audit hook), and then gets the code. Every call therefore starts from the same clean state, and
killing a call affects nothing else. A child's messages are passed on unread.

A frame is four bytes of length, eight of the call's number, and msgpack. The audit hook is not a barrier, because the
code can reach it; it describes what was refused.
"""

from __future__ import annotations
import __future__

import builtins
import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, Sequence, ValuesView
from contextlib import suppress
from functools import lru_cache
from traceback import walk_stack, walk_tb
from types import FrameType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import msgspec

from aggregator.sandbox.crossing import unpack
from aggregator.sandbox.kernel import WRITES, Kernel

FILE = "<trained code>"
_READ_BY_IMPORTS = (".py", ".pyc", ".so", ".zip", ".pth", ".egg-link")
_READABLE = ("/dev/urandom", "/dev/random", "/dev/null", "/usr/share/zoneinfo/", "/etc/localtime")
_ALLOWED_OS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.listdrives", "os.getxattr", "os.listxattr"}
_REFUSED = (
    ("socket.", "the network"),
    ("http.client.", "the network"),
    ("urllib.", "the network"),
    ("ftplib.", "the network"),
    ("smtplib.", "the network"),
    ("subprocess.", "other processes"),
    ("pty.", "other processes"),
    ("multiprocessing.", "other processes"),
    ("_thread.start_new_thread", "threads"),
    ("_posixsubprocess.", "other processes"),
    ("signal.", "signals"),
    ("ctypes.", "native code"),
    ("shutil.", "the file system"),
    ("tempfile.", "the file system"),
    ("sqlite3.", "the file system"),
    ("resource.", "its own limits"),
    ("syslog.", "the system log"),
    ("webbrowser.", "other processes"),
)
_PROCESSES = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "os.kill")
_NATIVE = {"ctypes", "_ctypes", "cffi", "_cffi_backend", "_testcapi", "_xxsubinterpreters"}

_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Threads of numeric libraries end in a fork, and cannot be started in a child."""


# ---- the parent of the forks


def main() -> None:
    """Serve requests until the other end of the pipe is closed."""
    incoming, outgoing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.environ.clear()  # the interpreter has read everything that it needs from it
    kernel = Kernel()
    readable_roots()  # once, not in every child
    send(outgoing, b"\0" * 8, ["", msgspec.msgpack.encode(kernel.open_ways())])
    spare: Child | None = None
    while (frame := read_frame(incoming)) is not None:
        request = msgspec.msgpack.decode(memoryview(frame)[8:], ext_hook=unpack)
        kind = Kind(request)
        if spare is None or spare.kind != kind:
            if spare is not None:
                spare.end()
            spare = Child(kind, kernel)
        send(outgoing, frame[:8], spare.serve(frame, request))
        spare.end()  # it has answered, or will not; nothing that it leaves behind reaches the next call
        spare = Child(kind, kernel)
    if spare is not None:
        spare.end()


def send(descriptor: int, number: bytes, content: list[Any]) -> None:
    """Write one frame."""
    body = msgspec.msgpack.encode(content)
    write_all(descriptor, (8 + len(body)).to_bytes(4, "big") + number + body)


def read_frame(descriptor: int) -> bytes | None:
    """Return the next frame without its length, or None at the end."""
    head = read_exactly(descriptor, 4)
    return None if head is None else read_exactly(descriptor, int.from_bytes(head, "big"))


def read_exactly(descriptor: int, count: int) -> bytes | None:
    """Return `count` bytes, or None if the stream ends before."""
    pieces = []
    while count:
        piece = os.read(descriptor, min(count, 1 << 20))
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of it, however often the pipe fills up."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


class Kind:
    """What a child must know before its call arrives, because it is forked and confined in advance."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.seconds: float = request["seconds"]
        self.memory: int = request["memory"]
        self.asynchronous: bool = request["asynchronous"]
        functions = request["functions"].values()
        modules = [module for function in functions for module in function["modules"].values()]
        self.modules = sorted({module.partition(":")[0] for module in modules})
        self.imports = sorted({module for function in functions for module in function["imports"]})

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class Child:
    """A process for one call: it has given up its rights, and waits for the code."""

    def __init__(self, kind: Kind, kernel: Kernel) -> None:
        os.environ.update(_ONE_THREAD)  # for the imports only: the child has no environment
        for module in kind.modules:  # the author's own imports, here so that they are paid for once
            importlib.import_module(module)
        for module in kind.imports:
            with suppress(Exception):  # the code fails at its own import, as it would without a sandbox
                importlib.import_module(module)
        os.environ.clear()
        if kind.asynchronous:
            importlib.import_module("asyncio")
        for module in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
            del sys.modules[module]  # so that the hook knows who imports it
        self.kind = kind
        requests, self._request = os.pipe()
        self._answer, answers = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            child_main(kind, kernel, requests, answers)
        os.close(requests)
        os.close(answers)
        self._status: int | None = None

    def serve(self, frame: bytes, request: dict[str, Any]) -> list[Any]:
        """Run one call; return the limit that ended it, or "", and the child's message."""
        deadline = time.monotonic() + request["seconds"]
        with suppress(BrokenPipeError):  # it has ended: see `ending`
            write_all(self._request, len(frame).to_bytes(4, "big") + frame)
        content, limit = drain(self._answer, deadline, request["output"])
        if limit == "time":
            return [f"it ran longer than {request['seconds']:g} seconds", b""]
        if limit == "output":
            return [f"its result is larger than {request['output']} bytes", b""]
        return ["", content] if content else [ending(self._wait()), b""]

    def end(self) -> None:
        """Kill the process, reap it, and close the pipes."""
        if self._status is None:
            os.kill(self._process, signal.SIGKILL)
            self._wait()
        os.close(self._request)
        os.close(self._answer)

    def _wait(self) -> int:
        _, self._status = os.waitpid(self._process, 0)
        return self._status


def drain(descriptor: int, deadline: float, cap: int) -> tuple[bytes, str]:
    """Return everything up to the end of the stream, and the exceeded limit ("" for none)."""
    pieces: list[bytes] = []
    size = 0
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return b"", "time"
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return b"".join(pieces), ""
        pieces.append(piece)
        size += len(piece)
        if size > cap:
            return b"", "output"


def ending(status: int) -> str:
    """Describe how a child without an answer ended."""
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGXCPU, -signal.SIGALRM):
        return "it used up its processor time"
    if code == -signal.SIGSYS:
        return "it made a system call of another architecture"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}, most often for want of memory"
    return f"it ended its process with exit code {code} instead of returning a value"


def reply(**content: Any) -> bytes:
    """Return an answer as bytes."""
    return msgspec.msgpack.encode(content)


# ---- the child that runs the code


def child_main(kind: Kind, kernel: Kernel, requests: int, answers: int) -> None:
    """Give up all unneeded rights, wait for the code, run it, answer, and end the process in any case."""
    try:
        close_all_but(requests, answers, kernel.ruleset)
        write_all(answers, run(kind, kernel, requests))
        os.close(answers)  # the rest, freeing all memory, need not be waited for
    finally:
        os._exit(1)  # never back into the parent's loop


def close_all_but(*kept: int) -> None:
    """Close every descriptor except the standard ones: the worker's pipes, and files opened by the author's modules."""
    first, most = 3, os.sysconf("SC_OPEN_MAX")
    for descriptor in (*sorted(kept), most if 0 < most < 1 << 20 else 1 << 20):
        if descriptor >= first:
            os.closerange(first, descriptor)
            first = descriptor + 1


def run(kind: Kind, kernel: Kernel, requests: int) -> bytes:
    """Run one call and return its answer as bytes."""
    refused: list[str] = []
    runner = new_runner() if kind.asynchronous else None
    hook = guard(refused, readable_roots())
    try:
        kernel.confine(kind.memory, kind.seconds)
    except OSError as error:
        return reply(limit=f"the system did not close it in: {error}")
    frame = read_frame(requests)
    if frame is None:
        os._exit(0)  # the worker has ended
    os.close(requests)
    request = msgspec.msgpack.decode(memoryview(frame)[8:], ext_hook=unpack)
    del frame
    if not kernel.filters:
        signal.setitimer(signal.ITIMER_REAL, kind.seconds + 2)  # ends a child that outlived the worker that watches it
    sys.addaudithook(hook)
    try:
        content = returned(call(request, runner))
    except MemoryError:
        return reply(limit=f"it used more than {kind.memory >> 20} MiB of memory")
    except BaseException as error:  # noqa: BLE001 - the border of the process: it crosses as data
        content = failure(error, request)
    return reply(limit=f"it tried to use {refused[0]}") if refused else content


def call(request: dict[str, Any], runner: Any) -> Any:
    """Define the functions and make the call."""
    made = {key: define(function) for key, function in request["functions"].items()}
    for key, function in request["functions"].items():
        names = made[key].__globals__
        names |= {name: made[used] for name, used in function["uses"].items()}
    args = request["args"]
    if request["owner"] is not None:
        owner = Owner(request["owner"])
        for name, key in request["methods"].items():
            setattr(owner, name, MethodType(made[key], owner))
        args = [owner, *args]
    result = made[""](*args, **request["kwargs"])
    return runner.run(result) if runner else result


def define(function: dict[str, Any]) -> Any:
    """Return a function in a new namespace, with the modules and values that it uses."""
    known = {name: imported_as(module) for name, module in function["modules"].items()} | function["values"]
    module = ModuleType(known.get("__name__", "trained_code"))
    names = vars(module)
    names |= known
    sys.modules.setdefault(module.__name__, module)  # a data class looks for the module of its annotations
    flags = __future__.annotations.compiler_flag  # annotations may name anything
    exec(compile(function["source"], FILE, "exec", flags=flags, dont_inherit=True), names)  # noqa: S102 - the purpose
    made = names.pop(function["name"]) if function["is_method"] else names[function["name"]]
    names |= known  # a method may use a function of the same name
    return made


def imported_as(module: str) -> Any:
    """Return a module, or `name` of it for `module:name`."""
    home, _, name = module.partition(":")
    return getattr(sys.modules[home], name) if name else sys.modules[home]


class Owner:
    """Replaces `self`: the instance's parameters and plain values."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        for name, (is_parameter, value) in attributes.items():
            setattr(self, name, SimpleNamespace(data=value) if is_parameter else value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"self.{name} is not available in the sandbox: only parameters and plain values are, and a text that looks "
            "like a secret only if the operation as written uses it"
        )


# ---- data sent back


def returned(value: Any) -> bytes:
    """Return a result as data, or the limit that prevents it from leaving the sandbox."""
    try:
        return msgspec.msgpack.encode({"value": value}, enc_hook=as_plain)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return reply(limit=f"its result cannot leave it ({error}); plain data can: str, numbers, lists, dicts")


def as_plain(value: Any) -> Any:
    """Return a number, text or sequence of another class as Python's own: of numpy, `deque`, `range`, subclasses."""
    kind = next((kind for kind in (str, bytes, float, int) if isinstance(value, kind)), None)
    if kind is not None:
        return kind(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence | KeysView | ValuesView | ItemsView):
        return list(value)
    raise TypeError(f"Encoding objects of type {type(value).__qualname__} is unsupported")


def failure(error: BaseException, request: dict[str, Any]) -> bytes:
    """Return an exception as data: class, arguments, text and line of the source."""
    if isinstance(error, NameError) and error.name:
        for function in request["functions"].values():
            if what := function["missing"].get(error.name):
                return reply(limit=f"it needs {error.name}, {what}, which cannot be sent to it")
    line, trace = 0, error.__traceback__
    if isinstance(error, PermissionError) and (advice := remedy(walk_tb(trace))):
        return reply(limit=f"it tried to use the file system{advice}")
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename == FILE:
        line = error.lineno or 0
    kind = type(error)
    facts = {
        "kind": kind.__name__ if getattr(builtins, kind.__name__, kind) is kind else kind.__qualname__,
        "line": line,
        "text": text_of(error),
    }
    try:
        return reply(error={**facts, "args": list(error.args)})
    except (TypeError, ValueError, OverflowError, RecursionError):
        return reply(error={**facts, "args": [text_of(error)]})


def text_of(error: BaseException) -> str:
    """Return an exception's text, or "" if its class cannot give one."""
    try:
        return str(error)[:10_000].encode("utf-8", "replace").decode()
    except Exception:  # noqa: BLE001 - an exception class of the trained code's own
        return ""


def new_runner() -> Any:
    """Return an event loop, created while sockets may still be created (it uses a pair of them)."""
    from asyncio import Runner

    runner = Runner()
    runner.get_loop()
    return runner


@lru_cache(maxsize=1)
def readable_roots() -> tuple[str, ...]:
    """Return the folders with files that imports need: the interpreter's and its packages'."""
    return tuple({os.path.realpath(root) + os.sep for root in (sys.prefix, sys.base_prefix, sys.exec_prefix)})


def guard(refused: list[str], roots: tuple[str, ...]) -> Callable[[str, tuple[Any, ...]], None]:
    """Return the audit hook: it raises PermissionError for forbidden actions, and notes them in `refused`."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        what = ""
        if event == "open":
            what = opened(args, roots)
        elif event == "import":
            what = imported(args[0])
        elif event.startswith("os."):
            what = "" if event in _ALLOWED_OS else "other processes" if event in _PROCESSES else "the file system"
        else:
            what = next((what for prefix, what in _REFUSED if event.startswith(prefix)), "")
        if what:
            refused.append(f"{what} ({event}){remedy(reversed([*walk_stack(None)]))}")
            raise PermissionError(f"the sandbox does not allow {what} ({event})")

    return hook


def imported(module: str) -> str:
    """Return the refused part of an import."""
    return "native code" if module.partition(".")[0] in _NATIVE else ""


def remedy(frames: Iterable[tuple[FrameType, int]]) -> str:
    """Return how to permit the package that is imported by the outermost of these frames, or "" if none is."""
    imports = [frame for frame, _ in frames if frame.f_code.co_name == "_find_and_load"]
    package = str(imports[0].f_locals.get("name")).partition(".")[0] if imports else ""
    if not package or package in sys.stdlib_module_names:
        return ""
    permit = f"sandbox=Limits(packages=[{package!r}])"
    return f" while it imported {package}; import it in the operation as you wrote it, or permit it with {permit}"


def opened(args: tuple[Any, ...], roots: tuple[str, ...]) -> str:
    """Return the refused part of an `open`: any writing, and reading files that imports do not need."""
    path, mode, flags = (*args, None, None, None)[:3]
    if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & WRITES):
        return f"the file system: writing {path!r}"
    if isinstance(path, int):
        return ""
    name = os.path.realpath(os.fsdecode(path))
    if name.startswith((*roots, *_READABLE)) or name.endswith(_READ_BY_IMPORTS):
        return ""
    return f"the file system: reading {path!r}"


if __name__ == "__main__":
    main()
