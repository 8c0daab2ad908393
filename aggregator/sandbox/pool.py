"""The worker processes of the sandbox: started when needed, replaced after a kill, ended with this process."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from aggregator.errors import ConfigError, SandboxError
from aggregator.sandbox.crossing import Answer, Call

STARTING = 30.0
"""Seconds that a worker may take to start."""

GRACE = 5.0
"""Seconds beyond a call's own limit after which the worker itself is taken for dead."""

MOST_WORKERS = 8

_SCRIPT = Path(__file__).with_name("worker.py")
_KEPT_VARIABLES = ("LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")


class Worker:
    """One worker process and the pipes to it; serves one call at a time."""

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}  # no keys, no secrets
        environment["PYTHONHASHSEED"] = "0"  # a set has the same order in every worker
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            self.process = subprocess.Popen(  # noqa: S603 - this very interpreter and our own script
                [sys.executable, "-B", "-P", str(_SCRIPT)],
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
        self._greeted = False

    def ask(self, call: Call, request: bytes) -> Answer:
        """Make one call; raises SandboxError where the worker ends or does not answer in time."""
        if not self._greeted and self._read(time.monotonic() + STARTING) is None:
            raise ConfigError(
                "Expected a worker process for the sandbox to start, got none; "
                f"does `{sys.executable} -P -c 'import msgspec'` work?"
            )
        self._greeted = True
        try:
            self._write(request)
        except BrokenPipeError:
            raise SandboxError(f"Expected a worker for {call.name}, got one that had ended") from None
        content = self._read(time.monotonic() + call.seconds + GRACE)
        if content is None:
            raise SandboxError(f"Expected an answer from the sandbox of {call.name}, but its worker ended without one")
        try:
            return msgspec.msgpack.decode(content, type=Answer)
        except msgspec.DecodeError as error:
            raise SandboxError(f"Expected an answer from the sandbox of {call.name}, got {error}") from None

    def kill(self) -> None:
        """End the process and all that it started, without waiting."""
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has ended by itself
                return

    def close(self) -> None:
        """End the process, collect it and close the pipes."""
        self.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()

    def _write(self, request: bytes) -> None:
        view = memoryview(len(request).to_bytes(4, "big") + request)
        while view:
            view = view[self.stdin.write(view) or 0 :]

    def _read(self, deadline: float) -> bytes | None:
        """Return the next frame, None where the stream ends or the deadline passes."""
        head = self._exactly(4, deadline)
        return None if head is None else self._exactly(int.from_bytes(head, "big"), deadline)

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
    """A call that may be given up while it waits or runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._cancelled = False

    def hold(self, worker: Worker | None) -> None:
        """Say which worker serves the call; one whose call has been given up is ended at once."""
        with self._lock:
            self._worker = worker
            if worker is not None and self._cancelled:
                worker.kill()

    def cancel(self) -> None:
        """Give the call up."""
        with self._lock:
            self._cancelled = True
            if self._worker is not None:
                self._worker.kill()


class Pool:
    """As many workers as are needed at once, up to the number of processors."""

    def __init__(self) -> None:
        self.size = min(os.cpu_count() or 2, MOST_WORKERS)
        self._free = threading.BoundedSemaphore(self.size)
        self._idle: list[Worker] = []
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def run(self, call: Call, ticket: Ticket | None = None) -> Answer:
        """Make a call and wait for it; a worker whose call went wrong is not used again."""
        request = call.encoded()
        with self._free:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            worker = worker or Worker()
            reusable = False
            try:
                if ticket:
                    ticket.hold(worker)
                answer = worker.ask(call, request)
                reusable = answer.limit is None
            finally:
                if ticket:
                    ticket.hold(None)
                self._put_back(worker, reusable=reusable)
        return answer

    async def arun(self, call: Call) -> Answer:
        """Make a call in a thread of the pool's own; cancelling ends its worker."""
        with self._lock:
            self._threads = self._threads or ThreadPoolExecutor(self.size, "aggregator-sandbox")
        ticket = Ticket()
        try:
            return await asyncio.wrap_future(self._threads.submit(self.run, call, ticket))
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    def close(self) -> None:
        """End every worker that is not at work."""
        with self._lock:
            workers, self._idle = self._idle, []
            threads, self._threads = self._threads, None
        if threads:
            threads.shutdown()
        for worker in workers:
            worker.close()

    def _put_back(self, worker: Worker, *, reusable: bool) -> None:
        if reusable:
            with self._lock:
                self._idle.append(worker)
        else:
            worker.close()


_pools: dict[int, Pool] = {}  # by process: a fork does not use its parent's workers
_lock = threading.Lock()


def pool() -> Pool:
    """Return this process's workers; raises ConfigError where there can be none."""
    if not hasattr(os, "fork"):
        raise ConfigError("Expected a system with fork for sandbox='process', got none; leave sandbox out")
    with _lock:
        found = _pools.get(os.getpid())
        if found is None:
            found = _pools[os.getpid()] = Pool()
            atexit.register(_close, found, os.getpid())
        return found


def _close(closing: Pool, pid: int) -> None:
    if os.getpid() == pid:
        closing.close()
