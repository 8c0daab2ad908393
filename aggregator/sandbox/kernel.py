"""Restrictions of trained code by the kernel: system calls by a seccomp filter, files by Landlock, amounts by limits.

Runs in the worker. `Kernel()` prepares everything that needs the worker's rights, once; `confine` gives them up
irreversibly, in the child that will run trained code. Both are allow lists: anything else, including additions of a
later kernel, is refused.

The filter exists for x86-64 on Linux; any other architecture's calls (`int 0x80`, x32) end the process. Landlock needs
Linux 5.13, and covers network and signals from 6.7 and 6.12 on. `Kernel.open_ways` lists what a system does not
protect.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Iterable

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_READABLE = ("/dev/urandom", "/dev/random", "/dev/null", "/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache")

_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # SECCOMP_RET_ALLOW, _ERRNO | EPERM, _KILL_PROCESS
_X86_64, _X32 = 0xC000003E, 0x40000000  # AUDIT_ARCH_X86_64, the bit of the x32 numbering
_LOAD, _EQUAL, _AT_LEAST, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06  # opcodes of BPF
_OWN = 0x7AFEC0DE  # the process's own number, in a filter that is made before it is known
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in seccomp's data; argument i is at 16 + 8 * i

_SYSTEM_CALLS = {  # by their numbers on x86-64; what an interpreter needs to compute, import and wait
    "descriptors": (0, 1, 3, 5, 8, 17, 18, 19, 20, 295, 22, 293, 32, 33, 292, 221),
    # read write close fstat lseek pread64 pwrite64 readv writev preadv pipe pipe2 dup dup2 dup3 fadvise64
    "what lies where": (4, 6, 21, 79, 89, 137, 138, 217, 78, 262, 267, 269, 332, 439),
    # stat lstat access getcwd readlink statfs fstatfs getdents64 getdents newfstatat readlinkat faccessat statx
    # faccessat2
    "memory": (9, 10, 11, 12, 25, 28),  # mmap mprotect munmap brk mremap madvise
    "waiting": (7, 23, 24, 35, 202, 213, 230, 232, 233, 270, 271, 281, 284, 290, 291, 441),
    # poll select sched_yield nanosleep futex epoll_create clock_nanosleep epoll_wait epoll_ctl pselect6 ppoll
    # epoll_pwait eventfd eventfd2 epoll_create1 epoll_pwait2
    "an event loop's own pair of sockets": (44, 45),  # sendto recvfrom: no others can be made
    "own signals": (13, 14, 15, 131, 219),  # rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    "facts": (39, 63, 96, 97, 98, 99, 100, 102, 104, 107, 108, 110, 111, 186, 201, 204, 228, 229, 309, 318),
    # getpid uname gettimeofday getrlimit getrusage sysinfo times getuid getgid geteuid getegid getppid getpgrp gettid
    # time sched_getaffinity clock_gettime clock_getres getcpu getrandom
    "ending": (60, 231),  # exit exit_group
}
_OPEN = ((2, 1), (257, 2))  # open, openat, each with the position of its flags
_IOCTL, _FCNTL, _PRLIMIT, _TGKILL = 16, 72, 302, 234
_TERMINALS = (0x5401, 0x5421, 0x541B, 0x5450, 0x5451)  # TCGETS FIONBIO FIONREAD FIONCLEX FIOCLEX
_FLAGS_OF_FILES = (0, 1, 2, 3, 4, 1030)  # F_DUPFD F_GETFD F_SETFD F_GETFL F_SETFL F_DUPFD_CLOEXEC: no owner, no lease

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by version of Landlock
_NETWORK_RIGHTS = 0b11  # to bind and to connect TCP, from version 4 on
_SCOPES = 0b11  # abstract sockets and signals stay inside, from version 6 on


class Kernel:
    """The restrictions that this system supports, prepared once before any trained code runs."""

    def __init__(self) -> None:
        self.landlock = 0  # the kernel's version
        self.filters = sys.platform == "linux" and os.uname().machine == "x86_64"
        self.ruleset = -1
        if sys.platform != "linux":
            return
        import ctypes

        self._errno, self._copy = ctypes.get_errno, ctypes.memmove
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.landlock = max(self._libc.syscall(_CREATE_RULESET, None, 0, 1), 0)
        if self.landlock:
            self.ruleset = self._make_ruleset()
        self.landlock *= self.ruleset >= 0
        program, own = system_call_filter(_OWN), struct.pack("I", _OWN)
        self._program = ctypes.create_string_buffer(program, len(program))  # not in each child: it makes a type
        start = ctypes.addressof(self._program)
        self._own_places = [start + at for at in range(0, len(program), 4) if program[at : at + 4] == own]
        header = struct.pack("HxxxxxxP", len(program) // 8, start)
        self._header = ctypes.create_string_buffer(header, len(header))
        self.filters = self.filters and self._libc.prctl(21, 0, 0, 0, 0) >= 0  # PR_GET_SECCOMP: was it built in?

    def open_ways(self) -> list[str]:
        """Return descriptions of what trained code could reach on this system."""
        ways = [] if self.landlock else ["every file that you can read, the environment of your processes included"]
        if not self.filters:
            ways += ["sockets other than TCP"] if self.landlock >= 4 else ["the network"]
            ways += ["new processes"] if sys.platform != "linux" else ["new processes", "the keyring"]
            ways += [] if self.landlock >= 6 else ["signals to other processes"]
            ways += [] if self.landlock else ["the memory of your processes"]
        return ways

    def confine(self, memory: int, seconds: float) -> None:
        """Give up all rights that trained code may not use. Raises OSError if the kernel refuses."""
        limit_amounts(memory, seconds)
        if sys.platform != "linux":
            return
        self._demand(self._libc.prctl(1, signal.SIGKILL, 0, 0, 0))  # PR_SET_PDEATHSIG: ends with its worker
        self._demand(self._libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS, which the other two require
        if self.landlock:
            self._demand(self._libc.syscall(_RESTRICT_SELF, self.ruleset, 0))
            os.close(self.ruleset)
        if self.filters:
            for place in self._own_places:
                self._copy(place, struct.pack("I", os.getpid()), 4)
            self._demand(self._libc.prctl(22, 2, self._header, 0, 0))  # PR_SET_SECCOMP

    def _demand(self, result: int) -> None:
        if result != 0:
            raise OSError(self._errno(), "the kernel refused to close trained code in")

    def _make_ruleset(self) -> int:
        """Return a descriptor of the rules: reading the interpreter's own folders, and nothing else."""
        handled = max(rights for version, rights in _FILE_RIGHTS.items() if version <= self.landlock)
        network = _NETWORK_RIGHTS if self.landlock >= 4 else 0
        scopes = _SCOPES if self.landlock >= 6 else 0
        size = 24 if self.landlock >= 6 else 16 if self.landlock >= 4 else 8
        attributes = struct.pack("QQQ", handled, network, scopes)[:size]
        ruleset: int = self._libc.syscall(_CREATE_RULESET, attributes, size, 0)
        for path in readable_places():
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:  # not on this system
                continue
            rights = _READ_FILE | _READ_FOLDER if os.path.isdir(path) else _READ_FILE  # noqa: PTH112 - no more imports
            self._libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0)
            os.close(place)
        return ruleset


def limit_amounts(memory: int, seconds: float) -> None:
    """Limit memory, processor time, new processes, files and core dumps, irreversibly."""
    limits = [
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ]
    for limit, value in limits:
        _, hard = resource.getrlimit(limit)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(limit, (most, most))
        except ValueError as error:  # macOS does not support every limit
            if sys.platform == "linux":
                raise OSError(f"it refused a limit: {error}") from error


def readable_places() -> list[str]:
    """Return the folders and files that imports need: the interpreter's library, its packages, the system's libraries.

    They exclude the user's own folders: modules that an operation uses are imported before it is confined.
    """
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages", ".zip"))}
    folders |= {os.path.dirname(path) for path in _loaded_libraries()}  # noqa: PTH120 - no more imports
    return sorted({os.path.realpath(path) for path in (*folders, *_READABLE) if path})


def _loaded_libraries() -> Iterable[str]:
    """Return the shared libraries of this process, because extension modules need others in the same folders."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - no more imports
            paths = (line.split(maxsplit=5)[5].strip() for line in file if ".so" in line)
            return {path for path in paths if path.startswith("/")}
    except OSError:
        return ()


def system_call_filter(own: int) -> bytes:
    """Return the seccomp program for the process `own`: instructions of BPF, eight bytes each.

    It allows the listed calls, and a few only partly: opening to read, reading a limit, a signal to itself.
    """
    steps = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _X86_64), (_RETURN, 0, 0, _KILL)]
    steps += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for first, last in _ranges({number for group in _SYSTEM_CALLS.values() for number in group}):
        steps += [(_EQUAL, 0, 1, first)] if first == last else [(_AT_LEAST, 0, 2, first), (_ABOVE, 1, 0, last)]
        steps.append((_RETURN, 0, 0, _ALLOW))
    for number, flags in _OPEN:
        steps += _when(number, [(_LOAD, 0, 0, 16 + 8 * flags), (_ANY_BIT, 0, 1, WRITES), (_RETURN, 0, 0, _REFUSE)])
    steps += _when(_IOCTL, _one_of(1, _TERMINALS))
    steps += _when(_FCNTL, _one_of(1, _FLAGS_OF_FILES))
    steps += _when(_PRLIMIT, [*_one_of(0, (0,)), *_zero(2)])
    steps += _when(_TGKILL, _one_of(0, (own,)))
    steps.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def _ranges(numbers: set[int]) -> Iterable[tuple[int, int]]:
    """Yield (first, last) of each contiguous range: fewer steps, which the kernel runs for each call."""
    for number in sorted(numbers):
        if number - 1 not in numbers:
            last = number
            while last + 1 in numbers:
                last += 1
            yield number, last


_Step = tuple[int, int, int, int]


def _when(number: int, conditions: list[_Step]) -> list[_Step]:
    """Allow a call that passes the conditions, which refuse themselves; any other call continues with the next rule."""
    body = [*conditions, (_RETURN, 0, 0, _ALLOW)]
    return [(_EQUAL, 0, len(body), number), *body]


def _one_of(argument: int, values: tuple[int, ...]) -> list[_Step]:
    """Refuse an argument that is not one of the values. The kernel reads these arguments as 32 bits."""
    tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [(_LOAD, 0, 0, 16 + 8 * argument), *tests, (_RETURN, 0, 0, _REFUSE)]


def _zero(argument: int) -> list[_Step]:
    """Refuse an argument, a pointer, that is not null."""
    halves = (16 + 8 * argument, 20 + 8 * argument)
    return [step for half in halves for step in ((_LOAD, 0, 0, half), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _REFUSE))]
