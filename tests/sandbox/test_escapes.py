"""Code that sets out to break out: every way that the kernel can close is closed, with the audit hook switched off.

Each body runs with the hook disabled, as code that wants to disables it. What is left is what the kernel enforces.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from aggregator import Module, bundle
from aggregator.agents.code import CodeParameter
from aggregator.agents.sandbox import prepare
from aggregator.errors import SandboxError, SandboxWarning
from aggregator.sandbox.crossing import Call, result_of
from aggregator.sandbox.kernel import Kernel, system_call_filter
from aggregator.sandbox.limits import Limits
from aggregator.sandbox.pool import Worker, pool

KERNEL = Kernel()
needs_filter = pytest.mark.skipif(not KERNEL.filters, reason="the system call filter is for Linux on x86-64")
needs_landlock = pytest.mark.skipif(not KERNEL.landlock, reason="Landlock needs Linux 5.13")

OPEN = """
import __main__
__main__.opened = lambda *a: ''
__main__.imported = lambda *a: ''
__main__._REFUSED = ()
__main__._PROCESSES = ()
__main__._ALLOWED_OS = type('All', (), {'__contains__': lambda *a: True})()
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def syscall(*args):
    return ('did', libc.syscall(*args)) if libc.syscall(*args) >= 0 else os.strerror(ctypes.get_errno())
"""


class Agent(Module):
    @bundle(trainable=True, sandbox=Limits(seconds=10))
    def op(self, x: Any = None) -> Any:
        return x


def run(body: str, x: Any = None) -> Any:
    agent = Agent()
    lines = "\n".join(f"    {line}" for line in (OPEN + body).strip().split("\n"))
    agent.parameters_dict()["op__code"].data = f"def op(self, x=None):\n{lines}\n"
    return agent.op(x)


@pytest.fixture(scope="module", autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    pool().close()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "key.py"  # the hook allows imports to read such a name
    path.write_text("canary")
    return path


def test_the_hook_is_off_in_these_tests() -> None:
    """Otherwise they would prove nothing about the kernel."""
    assert run("return open('/dev/null').read(), os.getcwd() != ''") == ["", True]
    assert run("return [isinstance(libc.getpid(), int)]") == [True]


@needs_landlock
@pytest.mark.parametrize(
    "read",
    [
        "open({path!r}).read()",
        "os.read(os.open({path!r}, os.O_RDONLY), 9)",
        "os.listdir(os.path.dirname({path!r}))",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "open(f'/proc/{{os.getppid()}}/environ').read()",
        "open(f'/proc/{{os.getppid()}}/mem', 'rb')",
        "open(f'/proc/{{os.getppid()}}/maps').read()",
        "open(f'/proc/{{os.getppid()}}/cmdline').read()",
        "os.readlink(f'/proc/{{os.getppid()}}/fd/0')",
        "os.listdir('/proc')",
        "os.listdir('/')",
        "os.listdir(os.path.expanduser('~'))",
        "open('/sys/kernel/notes', 'rb').read()",
        "open('/dev/tty')",
    ],
)
def test_files_cannot_be_read(read: str, secret: Path) -> None:
    """Reading is limited to the interpreter's own folders, without /proc."""
    with pytest.raises(OSError, match="denied|not permitted|No such"):
        run(f"return str({read.format(path=str(secret))})")


@needs_filter
@pytest.mark.parametrize(
    "write",
    [
        "open(x, 'w')",
        "os.open(x, os.O_CREAT | os.O_WRONLY)",
        "os.mkdir(x + 'd')",
        "os.unlink(x)",
        "os.rename(x, x + '2')",
        "os.symlink('/etc', x + '3')",
        "os.link(x, x + '4')",
        "os.chmod(x, 0o777)",
        "os.truncate(x, 0)",
        "os.utime(x)",
        "os.mkfifo(x + '5')",
        "os.chdir('/')",
        "os.setxattr(x, 'user.a', b'1')",
        "os.memfd_create('m')",
        "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    ],
)
def test_nothing_can_be_written(write: str, secret: Path) -> None:
    """No file changes, is created or is removed."""
    before = sorted(secret.parent.iterdir())
    with pytest.raises(OSError, match="not permitted|denied"):
        run(f"return str({write})", str(secret))
    assert (sorted(secret.parent.iterdir()), secret.read_text()) == (before, "canary")


CALLS = {  # a system call of x86-64 and its arguments
    "ptrace": "101, 16, os.getppid(), 0, 0",
    "process_vm_readv": "310, os.getppid(), 0, 0, 0, 0, 0",
    "process_vm_writev": "311, os.getppid(), 0, 0, 0, 0, 0",
    "kill": "62, os.getppid(), 0",
    "tkill": "200, os.getppid(), 0",
    "tgkill of the parent": "234, os.getppid(), os.getppid(), 0",
    "rt_sigqueueinfo": "129, os.getppid(), 0, 0",
    "rt_tgsigqueueinfo": "297, os.getppid(), os.getppid(), 0, 0",
    "pidfd_open": "434, os.getppid(), 0",
    "pidfd_send_signal": "424, 0, 0, 0, 0",
    "pidfd_getfd": "438, 0, 0, 0",
    "kcmp": "312, os.getpid(), os.getppid(), 0, 0, 0",
    "socket": "41, 2, 1, 0",
    "socket of unix": "41, 1, 1, 0",
    "socket of netlink": "41, 16, 3, 0",
    "socketpair": "53, 1, 1, 0, 0",
    "add_key": "248, b'user', b'h9', b'x', 1, -3",
    "request_key": "249, b'user', b'h9', 0, -3",
    "keyctl": "250, 0, -3, 0",
    "fork": "57",
    "vfork": "58",
    "clone": "56, 17, 0, 0, 0, 0",
    "clone3": "435, 0, 0",
    "execve": "59, b'/bin/true', 0, 0",
    "execveat": "322, -100, b'/bin/true', 0, 0, 0",
    "io_uring_setup": "425, 8, 0",
    "bpf": "321, 0, 0, 0",
    "perf_event_open": "298, 0, 0, -1, -1, 0",
    "userfaultfd": "323, 0",
    "mount": "165, 0, 0, 0, 0, 0",
    "unshare": "272, 0x10000000",
    "setns": "308, 0, 0",
    "fchmod": "91, 1, 0o777",
    "open_by_handle_at": "304, 0, 0, 0",
    "openat2": "437, -100, b'/etc/passwd', 0, 0",
    "creat": "85, b'/tmp/h9', 0o600",
    "seccomp": "317, 1, 0, 0",
    "prctl": "157, 4, 0, 0, 0, 0",
    "setrlimit": "160, 7, 0",
    "setitimer, which would end its own deadline": "38, 0, 0, 0",
    "setpriority": "141, 0, os.getppid(), 19",
    "shmget": "29, 0, 4096, 0o1600",
    "msgget": "68, 0, 0o1600",
    "semget": "64, 0, 1, 0o1600",
    "mq_open": "240, b'h9', 64, 0o600, 0",
    "inotify_init1": "294, 0",
    "fanotify_init": "300, 0, 0",
    "fcntl F_SETOWN": "72, 0, 8, os.getppid()",
    "fcntl F_SETSIG": "72, 0, 10, 9",
    "fcntl F_SETLEASE": "72, 0, 1024, 0",
    "ioctl TIOCSTI": "16, 0, 0x5412, b'x'",
    "ioctl FIOSETOWN": "16, 0, 0x8901, 0",
    "a call that no kernel has yet": "600",
}


@needs_filter
@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_refuses_calls_outside_the_allow_list(name: str) -> None:
    """Other processes, sockets, keys and newer kernel interfaces cannot be reached."""
    assert run(f"return syscall({CALLS[name]})") == "Operation not permitted"


@needs_filter
@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("socket by int 0x80", "53b867010000bb02000000b90100000031d2cd805bc3"),
        ("fork by int 0x80", "b802000000cd80c3"),
        ("getpid by int 0x80", "b814000000cd80c3"),
        ("getpid in the numbering of x32", "b8270000400f05c3"),
    ],
)
def test_calls_of_another_architecture_end_the_process(what: str, code: str) -> None:
    """A filter for one architecture's numbers does not cover the others, so they are refused."""
    body = f"""
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
page = libc.mmap(0, 4096, 7, 0x62, -1, 0)
code = bytes.fromhex({code!r})
ctypes.memmove(page, code, len(code))
return ctypes.CFUNCTYPE(ctypes.c_int)(page)()
"""
    with pytest.raises(SandboxError, match="it made a system call of another architecture"):
        run(body)


ALONE = {
    "tgkill of the parent": "libc.syscall(234, parent, parent, 0)",
    "a limit of the parent": "libc.syscall(302, parent, 7, 0, limit)",
    "a limit of its own": "libc.syscall(302, 0, 7, limit, 0)",
    "a descriptor's owner": "libc.syscall(72, 0, 8, parent)",
}


@needs_filter
@pytest.mark.parametrize("name", ALONE)
def test_the_filter_is_enough_without_landlock(name: str) -> None:
    """On kernels before 6.12 the filter alone protects other processes from signals and limits."""
    script = f"""
import ctypes, os, sys
from aggregator.sandbox.kernel import Kernel
kernel, parent, libc = Kernel(), os.getppid(), ctypes.CDLL(None, use_errno=True)
kernel.landlock = 0
limit = ctypes.create_string_buffer(16)
kernel.confine(1 << 30, 5)
result = {ALONE[name]}
os.write(1, os.strerror(ctypes.get_errno()).encode() if result < 0 else b"did it")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("Operation not permitted", "")


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has none of the parent's variables, not even those the worker was started with."""
    monkeypatch.setenv("MY_KEY", "canary")
    pool().close()
    assert run("return dict(os.environ), libc.getenv(b'MY_KEY'), libc.getenv(b'PYTHONPATH')") == [{}, 0, 0]


def test_only_its_own_descriptors_are_open() -> None:
    """Only the worker's pipes are open; files of the author's modules are closed."""
    body = """
import stat
found = []
for number in range(64):
    try:
        found.append((number, stat.S_IFMT(os.fstat(number).st_mode)))
    except OSError:
        pass
return [number for number, kind in found if not (kind == stat.S_IFCHR and number < 3)], len(found)
"""
    own, count = run(body)
    assert (len(own), count) == (1, 4)  # the pipe for its answer, and /dev/null three times


def test_a_forged_frame_is_only_an_answer() -> None:
    """Code that writes to its pipe itself can only send what it could have returned."""
    body = """
for number in range(3, 64):
    try:
        os.write(number, bytes.fromhex('81a576616c75650a') * x)
    except OSError:
        pass
os._exit(0)
"""
    assert run(body, 1) == 10
    with pytest.raises(SandboxError, match="Expected an answer from the sandbox of op"):
        run(body, 2)


FAKE = """
import sys, msgspec
def frame(number, *content):
    body = msgspec.msgpack.encode(content)
    return (8 + len(body)).to_bytes(4, 'big') + number + body
def send(number, *content, more=b''):
    sys.stdout.buffer.write(frame(number, *content) + more)
    sys.stdout.buffer.flush()
send(bytes(8), '', msgspec.msgpack.encode({ways}))
answer = msgspec.msgpack.encode({{'value': 10}})
size = int.from_bytes(sys.stdin.buffer.read(4), 'big')
number = sys.stdin.buffer.read(size)[:8]
{then}
sys.stdin.buffer.read()
"""


def fake_worker(then: str, ways: Sequence[str] = ()) -> Worker:
    return Worker(["-c", FAKE.format(then=then, ways=list(ways))])


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("send(bytes(7) + b'9', '', answer)", "got that of another call"),
        ("sys.stdout.buffer.write(b'\\xff\\xff\\xff\\xff'); sys.stdout.buffer.flush()", "ended without one"),
        ("send(number, 'text')", "got "),
        ("send(number, 1, answer)", "got "),
        ("sys.exit()", "ended without one"),
    ],
)
def test_a_frame_that_is_not_this_calls_answer_is_refused(then: str, reason: str) -> None:
    """Another call's number, a length beyond the result's limit, another shape, no frame at all."""
    call, worker = prepared(), fake_worker(then)
    try:
        with pytest.raises(SandboxError, match=f"Expected an answer from the sandbox of op, .*{reason}"):
            result_of(worker.ask(call, call.encode()), call)
    finally:
        worker.close()


def test_a_frame_beyond_the_limit_of_the_result_is_not_read() -> None:
    """A worker that ignores the limit is not trusted either."""
    call = prepared(Limits(output=1_000))
    worker = fake_worker("send(number, '', msgspec.msgpack.encode({'value': 'x' * 100_000}))")
    try:
        with pytest.raises(SandboxError, match="its worker ended without one"):
            worker.ask(call, call.encode())
    finally:
        worker.close()


def test_a_worker_that_died_while_idle_is_replaced_silently() -> None:
    """The next call's code is not the cause."""
    assert Agent().op(1) == 1
    for worker in pool()._idle:
        os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    assert [Agent().op(i) for i in range(3)] == [0, 1, 2]


def test_a_worker_that_sends_a_second_frame_is_not_used_again() -> None:
    """The second frame would be read as the next call's answer."""
    call, worker = prepared(), fake_worker("send(number, '', answer, more=frame(bytes(7) + b'2', '', answer))")
    try:
        assert result_of(worker.ask(call, call.encode()), call) == 10
        assert not worker.is_waiting()
    finally:
        worker.close()


def test_missing_kernel_features_give_a_warning() -> None:
    """The first worker reports them, and the warning names a remedy."""
    call, worker = prepared(), fake_worker("send(number, '', answer)", ["the network"])
    try:
        with pytest.warns(SandboxWarning, match="could reach: the network. Use sandbox='monty', a container, or Linux"):
            worker.ask(call, call.encode())
    finally:
        worker.close()


def prepared(limits: Limits = Limits()) -> Call:  # noqa: B008 - frozen
    agent = Agent()
    code = agent.parameters_dict()["op__code"]
    assert isinstance(code, CodeParameter)
    return prepare(code.data, code.original, agent, (agent,), {}, limits)


@needs_landlock
def test_imports_of_packages_and_their_libraries_work() -> None:
    """The sandbox keeps the interpreter usable: modules with system libraries, data files, time zones."""
    body = """
import bz2, decimal, hashlib, json, lzma, sqlite3, statistics, zlib, zoneinfo, email, xml.dom.minidom, html, difflib
import msgspec, unicodedata, datetime, random, fractions, string, textwrap, csv, io
zone = zoneinfo.ZoneInfo('Europe/Paris')
return [zlib.crc32(b'x'), hashlib.sha256(b'x').hexdigest()[:6], str(zone), random.random() < 1]
"""
    plain = body.replace("sqlite3, ", "")
    assert run(plain)[1:] == ["2d7116", "Europe/Paris", True]


@pytest.mark.skipif(sys.platform != "linux", reason="what Linux of today closes")
def test_no_warning_with_all_kernel_features() -> None:
    """A kernel with all of them gives no warning."""
    pool().close()
    with warnings.catch_warnings():
        if not KERNEL.open_ways():
            warnings.simplefilter("error")
        assert Agent().op(3) == 3


class Older(Kernel):
    """A kernel without some features."""

    def __init__(self, landlock: int, *, filters: bool) -> None:
        self.landlock, self.filters = landlock, filters


@pytest.mark.parametrize(
    ("landlock", "filters", "ways"),
    [
        (6, True, []),
        (1, True, []),
        (0, True, ["every file that you can read, the environment of your processes included"]),
        (6, False, ["sockets other than TCP", "new processes", "the keyring"]),
        (4, False, ["sockets other than TCP", "new processes", "the keyring", "signals to other processes"]),
        (1, False, ["the network", "new processes", "the keyring", "signals to other processes"]),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the keyring is Linux's")
def test_missing_kernel_features_are_named(landlock: int, filters: bool, ways: list[str]) -> None:
    """On ARM there is no filter, on old kernels no Landlock: the warning lists what is not protected."""
    assert Older(landlock, filters=filters).open_ways() == ways


def test_a_system_without_any_feature() -> None:
    """As on macOS: everything is listed."""
    ways = Older(0, filters=False).open_ways()
    assert {"the network", "new processes", "the memory of your processes"} <= set(ways)


def test_the_filter_respects_the_kernels_limits() -> None:
    """A seccomp program has at most 4,096 instructions, and its jumps at most 255."""
    program = system_call_filter(os.getpid())
    assert len(program) % 8 == 0
    assert len(program) // 8 < 4_096
