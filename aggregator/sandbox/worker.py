"""The worker process of the sandbox: a script that imports nothing of the library and runs trained code in a fork.

The process that reads requests never runs trained code. For each request it forks a child, which gives up what it may
not use (limits of the kernel, an audit hook, a system call filter) and then runs the code; so every call starts from
the same clean state, and a call that is killed takes nothing with it. Frames are four bytes of length and msgpack.
"""

from __future__ import annotations
import __future__

import importlib
import math
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec

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
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | EPERM
_SYSTEM_CALLS = (  # x86-64
    *(41, 42, 43, 49, 50, 53, 288),  # socket connect accept bind listen socketpair accept4
    *(56, 57, 58, 59, 322, 435),  # clone fork vfork execve execveat clone3
    *(62, 101, 311, 424),  # kill ptrace process_vm_writev pidfd_send_signal
    *(
        76,
        82,
        83,
        84,
        85,
        86,
        87,
        88,
        90,
        92,
        94,
        133,
        188,
    ),  # truncate rename ... unlink symlink chmod chown ... setxattr
    *(258, 259, 260, 263, 264, 265, 266, 268, 316, 437),  # the same with ...at, renameat2, openat2
    *(165, 272, 302, 308, 321, 425),  # mount unshare prlimit64 setns bpf io_uring_setup
)


def main() -> None:
    """Serve requests until the other end of the pipe is closed."""
    incoming, outgoing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    install_filter = system_call_filter()
    write_all(outgoing, framed(b""))  # started
    while (frame := read_frame(incoming)) is not None:
        request = msgspec.msgpack.decode(frame)
        write_all(outgoing, framed(serve(request, (incoming, outgoing), install_filter)))


def framed(content: bytes) -> bytes:
    """Return a message with its length in front."""
    return len(content).to_bytes(4, "big") + content


def read_frame(descriptor: int) -> bytes | None:
    """Return the next message, None at the end."""
    head = read_exactly(descriptor, 4)
    return None if head is None else read_exactly(descriptor, int.from_bytes(head, "big"))


def read_exactly(descriptor: int, count: int) -> bytes | None:
    """Return `count` bytes, None where the stream ends before."""
    pieces = []
    while count:
        piece = os.read(descriptor, min(count, 1 << 20))
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of it, however many times the pipe has to be filled."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def serve(request: dict[str, Any], inherited: tuple[int, ...], install_filter: Callable[[], None]) -> bytes:
    """Run one call in a child and return its answer, or the limit that ended it."""
    for module in request["modules"].values():  # the author's own imports, here so that they are paid for once
        importlib.import_module(module)
    if request["asynchronous"]:
        importlib.import_module("asyncio")
    result, answer = os.pipe()
    child = os.fork()
    if child == 0:
        for descriptor in (*inherited, result):
            os.close(descriptor)
        child_main(request, answer, install_filter)
    os.close(answer)
    content, limit = drain(result, time.monotonic() + request["seconds"], request["output"])
    os.close(result)
    os.kill(child, signal.SIGKILL)  # a child that has answered has nothing left to do
    _, status = os.waitpid(child, 0)
    if limit == "time":
        return reply(limit=f"it ran longer than {request['seconds']:g} seconds")
    if limit == "output":
        return reply(limit=f"its result is larger than {request['output']} bytes")
    return content or reply(limit=ending(status))


def drain(descriptor: int, deadline: float, cap: int) -> tuple[bytes, str]:
    """Return what comes until the end of the stream, and which limit was hit ("" for none)."""
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
    """Say how a child ended that gave no answer."""
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGXCPU, -signal.SIGALRM):
        return "it used up its processor time"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}, most often for want of memory"
    return f"it ended its process with exit code {code} instead of returning a value"


def reply(**content: Any) -> bytes:
    """Return an answer as bytes."""
    return msgspec.msgpack.encode(content)


def child_main(request: dict[str, Any], answer: int, install_filter: Callable[[], None]) -> None:
    """Run the code under its limits, write the answer, and end the process whatever happens."""
    try:
        write_all(answer, run(request, install_filter))
    finally:
        os._exit(1)  # never back into the loop of the parent


def run(request: dict[str, Any], install_filter: Callable[[], None]) -> bytes:
    """Run one call and return its answer as bytes."""
    refused: list[str] = []
    runner = new_runner() if request["asynchronous"] else None
    confine(request["memory"], request["seconds"])
    install_filter()
    sys.addaudithook(guard(refused, readable_roots()))
    try:
        content = returned(call(request, runner))
    except MemoryError:
        return reply(limit=f"it used more than {request['memory'] >> 20} MiB of memory")
    except BaseException as error:  # noqa: BLE001 - the border of the process: it crosses as data
        content = failure(error)
    return reply(limit=f"it tried to use {refused[0]}") if refused else content


def call(request: dict[str, Any], runner: Any) -> Any:
    """Define the function and call it."""
    modules = {name: sys.modules[module] for name, module in request["modules"].items()}
    names: dict[str, Any] = {"__name__": "trained_code", **modules, **request["values"]}
    flags = __future__.annotations.compiler_flag  # annotations name what the model imagined
    exec(compile(request["source"], FILE, "exec", flags=flags, dont_inherit=True), names)  # noqa: S102 - the purpose
    args = request["args"]
    if request["owner"] is not None:
        args = [Owner(request["owner"]), *args]
    result = names[request["name"]](*args, **request["kwargs"])
    return runner.run(result) if runner else result


class Owner:
    """What stands for `self`: the instance's parameters and plain values."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        for name, (is_parameter, value) in attributes.items():
            setattr(self, name, SimpleNamespace(data=value) if is_parameter else value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"self.{name} is not available in the sandbox: only parameters and plain values are")


def returned(value: Any) -> bytes:
    """Return a result as data, or say that it cannot leave."""
    try:
        return reply(value=value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return reply(limit=f"its result cannot leave it ({error}); plain data can: str, numbers, lists, dicts")


def failure(error: BaseException) -> bytes:
    """Return an exception as data: class, arguments, text and the line of the source it left."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename == FILE:
        line = error.lineno or 0
    facts = {"kind": type(error).__name__, "line": line, "text": text_of(error), "builtin": is_builtin(error)}
    try:
        return reply(error={**facts, "args": list(error.args)})
    except (TypeError, ValueError, OverflowError, RecursionError):
        return reply(error={**facts, "args": [text_of(error)]})


def text_of(error: BaseException) -> str:
    """Return an exception's text, "" where its class cannot give one."""
    try:
        return str(error)[:10_000].encode("utf-8", "replace").decode()
    except Exception:  # noqa: BLE001 - an exception class of the trained code's own
        return ""


def is_builtin(error: BaseException) -> bool:
    """Say whether the other side knows this exception class under the same name."""
    return type(error).__module__ == "builtins" and isinstance(error, Exception)


def new_runner() -> Any:
    """Return an event loop, made while sockets may still be made (it wakes itself through a pair of them)."""
    from asyncio import Runner

    runner = Runner()
    runner.get_loop()
    return runner


def confine(memory: int, seconds: float) -> None:
    """Give up memory, processor time, new processes, files and core dumps beyond the limits, for good."""
    cpu = math.ceil(seconds) + 1
    limits = [
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ]
    for limit, value in limits:
        _, hard = resource.getrlimit(limit)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (most, most))
    signal.setitimer(signal.ITIMER_REAL, seconds + 2)  # ends a child that outlived the worker that watches it


def readable_roots() -> tuple[str, ...]:
    """Return the folders whose files imports need: the interpreter's and its packages'."""
    return tuple({os.path.realpath(root) + os.sep for root in (sys.prefix, sys.base_prefix, sys.exec_prefix)})


def guard(refused: list[str], roots: tuple[str, ...]) -> Callable[[str, tuple[Any, ...]], None]:
    """Return the audit hook: it raises PermissionError for what trained code may not do, and notes it in `refused`."""

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
            refused.append(f"{what} ({event})")
            raise PermissionError(f"the sandbox does not allow {what} ({event})")

    return hook


def imported(module: str) -> str:
    """Return what an import would give that is refused."""
    if module == "_posixsubprocess":
        return "other processes"
    return "native code" if module.partition(".")[0] in _NATIVE else ""


def opened(args: tuple[Any, ...], roots: tuple[str, ...]) -> str:
    """Return what an `open` would use that is refused: any writing, and reading what imports do not need."""
    path, mode, flags = (*args, None, None, None)[:3]
    if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & _WRITES):
        return f"the file system: writing {path!r}"
    if isinstance(path, int):
        return ""
    name = os.path.realpath(os.fsdecode(path))
    if name.startswith((*roots, *_READABLE)) or name.endswith(_READ_BY_IMPORTS):
        return ""
    return f"the file system: reading {path!r}"


def system_call_filter() -> Callable[[], None]:
    """Return what makes the kernel refuse processes, sockets and changes to files; it does nothing where it cannot.

    Made before the fork, so that a child need not import ctypes. The program is a seccomp filter: load the number of
    the system call, compare it with each refused one, and look at the flags of `open` and `openat`.
    """
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return lambda: None
    import ctypes

    steps = [(0x20, 0, 0, 4), (0x15, 1, 0, 0xC000003E), (0x06, 0, 0, _ALLOW), (0x20, 0, 0, 0)]  # x86-64 only
    steps += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, _REFUSE)]  # the x32 numbering
    for number, flags in ((2, 24), (257, 32)):  # open, openat: where their flags stand
        steps += [(0x15, 0, 4, number), (0x20, 0, 0, flags), (0x45, 0, 1, _WRITES), (0x06, 0, 0, _REFUSE)]
        steps += [(0x06, 0, 0, _ALLOW)]
    for number in _SYSTEM_CALLS:
        steps += [(0x15, 0, 1, number), (0x06, 0, 0, _REFUSE)]
    steps += [(0x06, 0, 0, _ALLOW)]
    program = b"".join(struct.pack("HBBI", *step) for step in steps)
    memory = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(memory)))
    prctl = ctypes.CDLL(None).prctl

    def install() -> None:
        prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: a child does not outlive its worker
        prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which a filter asks for
        prctl(22, 2, header, memory)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        for module in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
            del sys.modules[module]

    return install


if __name__ == "__main__":
    main()
