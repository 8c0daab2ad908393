"""The worker processes of the sandbox: started on demand, replaced after a kill, ended with this process."""

from __future__ import annotations

import asyncio
import atexit
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from aggregator.errors import ConfigError, SandboxError, SandboxWarning
from aggregator.sandbox.crossing import FRAME_OVERHEAD, Call, Frame

STARTING = 30.0
"""Seconds that a worker may take to start."""

GRACE = 5.0
"""Seconds beyond a call's own limit after which the worker is considered dead."""

ENDING = 2.0
"""Seconds that an idle worker has to exit, before it is killed."""

MOST_WORKERS = 8

COMMAND = ("-B", "-P", "-X", "utf8", "-m", "aggregator.sandbox.worker")
"""How this interpreter becomes a worker: no bytecode, no current folder on the path, text as UTF-8."""

_OPEN_WAYS_SHOWN = 20


class Worker:
    """One worker process and the pipes to it; serves one call at a time.

    `packages` are those that its calls have imported. Calls with others get another worker, because the code could use
    what an earlier call has imported.
    """

    def __init__(self, command: Sequence[str] = COMMAND, packages: frozenset[str] = frozenset()) -> None:
        self.packages = packages
        environment = {
            "PYTHONHASHSEED": "0",  # a set has the same order in every worker
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path),  # noqa: PTH100 - as text
        }
        if "LD_LIBRARY_PATH" in os.environ:  # variables that the interpreter itself may need; the worker clears them
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        try:
            self.process = subprocess.Popen(  # noqa: S603 - this very interpreter
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise ConfigError(f"Expected a worker process for the sandbox, got {error}") from error
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self._number = 0

    def is_waiting(self) -> bool:
        """Return True if the worker can accept a call: it has not ended, and has sent nothing after its last answer."""
        poll = select.poll()
        poll.register(self.stdout, select.POLLIN)
        return self.process.poll() is None and not poll.poll(0)  # a dying child may hold the pipes a little longer

    def ask(self, call: Call, request: bytes) -> Frame:
        """Make one call; raises SandboxError if the worker ends, is late, or sends another answer than this call's."""
        if not self._number:
            self._greet()
        self._number += 1
        number = self._number.to_bytes(8, "big")
        try:
            view = memoryview((8 + len(request)).to_bytes(4, "big") + number + request)
            while view:
                view = view[self.stdin.write(view) or 0 :]
        except BrokenPipeError:
            raise SandboxError(f"Expected a worker for {call.name}, got one that had ended") from None
        frame = self._read(time.monotonic() + call.seconds + GRACE, call.output + FRAME_OVERHEAD)
        if frame is None:
            raise SandboxError(f"Expected an answer from the sandbox of {call.name}, but its worker ended without one")
        try:
            if frame[:8] == number:
                return msgspec.msgpack.decode(frame[8:], type=Frame)
            error: Exception | str = "that of another call"
        except (msgspec.MsgspecError, ValueError) as malformed:
            error = malformed
        raise SandboxError(f"Expected an answer from the sandbox of {call.name}, got {error}")

    def _greet(self) -> None:
        """Wait until the worker has started; warn about missing kernel features."""
        frame = self._read(time.monotonic() + STARTING, FRAME_OVERHEAD)
        if frame is None:
            raise ConfigError(
                "Expected a worker process for the sandbox to start, got none; "
                f"does `{sys.executable} -P -c 'import aggregator, msgspec'` work?"
            )
        ways = msgspec.msgpack.decode(msgspec.msgpack.decode(frame[8:], type=Frame).content, type=list[str])
        if ways:
            warnings.warn(
                f"The sandbox is not closed by this system's kernel. Code that sets out to reach them could reach: "
                f"{', '.join(ways[:_OPEN_WAYS_SHOWN])}. Use sandbox='monty', a container, or Linux 6.12 on x86-64",
                SandboxWarning,
                stacklevel=2,
            )

    def kill(self) -> None:
        """Kill the process and all its children, without waiting."""
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has ended by itself
                return

    def close(self) -> None:
        """Kill the process and its children, reap it and close the pipes."""
        self.stdin.close()  # an idle worker ends by that, its child first
        try:
            self.process.wait(ENDING)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        self.stdout.close()
        deadline = time.monotonic() + ENDING  # the system reaps the child of a killed worker
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process.pid, 0)
            except (ProcessLookupError, PermissionError):  # macOS reports the latter for a zombie
                return
            time.sleep(0.005)

    def _read(self, deadline: float, most: int) -> bytes | None:
        """Return the next frame; None if the stream ends, the deadline passes, or the frame is longer than `most`."""
        head = self._exactly(4, deadline)
        if head is None or (length := int.from_bytes(head, "big")) > most:
            return None
        return self._exactly(length, deadline)

    def _exactly(self, count: int, deadline: float) -> bytes | None:
        poll = select.poll()
        poll.register(self.stdout, select.POLLIN)
        pieces = []
        while count:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return None
            piece = self.stdout.read(min(count, 1 << 20))
            if not piece:
                return None
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)


class Ticket:
    """A call that can be cancelled while it waits or runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._cancelled = False

    def hold(self, worker: Worker | None) -> None:
        """Set the worker that serves the call, or None. If the call was cancelled, the worker is killed at once."""
        with self._lock:
            self._worker = worker
            if worker is not None and self._cancelled:
                worker.kill()

    def cancel(self) -> None:
        """Cancel the call and kill its worker."""
        with self._lock:
            self._cancelled = True
            if self._worker is not None:
                self._worker.kill()


class Pool:
    """Workers on demand, up to the number of processors."""

    def __init__(self) -> None:
        self.size = min(os.cpu_count() or 2, MOST_WORKERS)
        self._free = threading.BoundedSemaphore(self.size)
        self._idle: list[Worker] = []
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def run(self, call: Call, ticket: Ticket | None = None) -> Frame:
        """Make a call and wait for it; a worker whose call failed is not used again."""
        request = call.encode()
        with self._free:
            worker = self._take(call.packages)
            reusable = False
            try:
                if ticket:
                    ticket.hold(worker)
                frame = worker.ask(call, request)
                reusable = not frame.limit
            finally:
                if ticket:
                    ticket.hold(None)
                self._give_back(worker) if reusable else worker.close()
        return frame

    def _give_back(self, worker: Worker) -> None:
        with self._lock:
            self._idle.append(worker)
            surplus = self._idle.pop(0) if len(self._idle) > 2 * self.size else None
        if surplus is not None:
            surplus.close()

    def _take(self, packages: frozenset[str]) -> Worker:
        while True:
            with self._lock:
                at = next((i for i, idle in enumerate(self._idle) if idle.packages == packages), None)
                worker = None if at is None else self._idle.pop(at)
            if worker is None:
                return Worker(packages=packages)
            if worker.is_waiting():
                return worker
            worker.close()

    async def arun(self, call: Call) -> Frame:
        """Make a call in one of the pool's threads; cancelling kills its worker."""
        with self._lock:
            self._threads = self._threads or ThreadPoolExecutor(self.size, "aggregator-sandbox")
        ticket = Ticket()
        try:
            return await asyncio.wrap_future(self._threads.submit(self.run, call, ticket))
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    def close(self) -> None:
        """End every idle worker."""
        with self._lock:
            workers, self._idle = self._idle, []
            threads, self._threads = self._threads, None
        if threads:
            threads.shutdown()
        for worker in workers:
            worker.close()


_pools: dict[int, Pool] = {}  # by process: a fork does not use its parent's workers
_lock = threading.Lock()


def pool() -> Pool:
    """Return this process's workers; raises ConfigError if the system does not support them."""
    if not hasattr(os, "fork"):
        raise ConfigError("Expected a system with fork for sandbox='process', got none; leave sandbox out")
    with _lock:
        found = _pools.get(os.getpid())
        if found is None:
            found = _pools[os.getpid()] = Pool()
            atexit.register(_close, found, os.getpid())
        return found


def run(call: Call) -> Frame:
    """Make a call in a worker and wait for it."""
    return pool().run(call)


async def arun(call: Call) -> Frame:
    """Make a call in a worker without blocking the event loop; cancelling kills the worker."""
    return await pool().arun(call)


def _close(closing: Pool, pid: int) -> None:
    if os.getpid() == pid:
        closing.close()
