"""The border between synchronous callers and the event loop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
from contextvars import ContextVar
from typing import Any

import pytest

from aggregator import portal
from aggregator.errors import ConfigError

where: ContextVar[str] = ContextVar("where", default="nowhere")


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return number * 2


def test_a_script_calls() -> None:
    """No event loop is needed."""
    assert portal.call(double, 21) == 42


@pytest.mark.requirement("Trace's defect 5: asyncio.run failed under a running loop")
async def test_a_notebook_calls() -> None:
    """A running event loop in the same thread does not prevent a call."""
    assert portal.call(double, 21) == 42


def test_threads_call() -> None:
    """Any number of threads share the one event loop."""
    results: list[int] = []
    threads = [threading.Thread(target=lambda i=i: results.append(portal.call(double, i))) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [2 * i for i in range(20)]


def test_errors_and_cancellation_are_raised_to_the_caller() -> None:
    """Whatever the work raises, the caller gets."""

    async def fail() -> None:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        portal.call(fail)


def test_an_unknown_argument_does_not_hang() -> None:
    """A call with wrong arguments is an error for the caller, who would otherwise wait for ever."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'base'"):
        portal.call(double, 21, base=10)
    assert portal.call(double, 21) == 42


def test_the_context_is_passed_on() -> None:
    """The work has the caller's cassette, lineage and role; what it sets does not reach the caller."""

    async def look() -> str:
        found = where.get()
        where.set("changed inside")
        return found

    where.set("the caller's")
    assert portal.call(look) == "the caller's"
    assert where.get() == "the caller's"


def test_a_call_on_its_own_loop_is_refused() -> None:
    """It would wait for itself for ever; the error names the awaitable form."""

    async def inside() -> Any:
        return portal.call(double, 1)

    with pytest.raises(ConfigError, match="use the awaitable form"):
        portal.call(inside)


def run_script(script: str, *, interrupt: bool = False) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        out = process.stdout.readline()
        if interrupt:
            process.send_signal(signal.SIGINT)
        out, err = out + process.stdout.read(), process.stderr.read()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_ctrl_c_cancels_and_waits() -> None:
    """The work is cancelled, and its clean-up ends before the caller continues."""
    done = run_script(
        """
        import asyncio
        from aggregator import portal

        async def work():
            print("working", flush=True)
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)
                print("cleaned up", flush=True)

        try:
            portal.call(work)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        """,
        interrupt=True,
    )
    assert (done.stdout.split("\n")[:3], done.stderr) == (["working", "cleaned up", "interrupted"], "")


def test_ctrl_c_before_the_wait_cancels_and_waits() -> None:
    """Work may start, and be interrupted, before its caller waits for it: that call is cancelled too."""
    done = run_script(
        """
        import asyncio, os, signal
        from aggregator import portal

        cleaned = 0

        async def work():
            global cleaned
            os.kill(os.getpid(), signal.SIGINT)
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.001)
                cleaned += 1

        for _ in range(30):
            try:
                portal.call(work)
            except KeyboardInterrupt:
                pass
        print(cleaned)
        """
    )
    assert (done.stdout, done.stderr) == ("30\n", "")


def test_work_in_flight_at_exit_is_cancelled_and_closed() -> None:
    """At exit work in flight is cancelled first, then what was registered is closed."""
    done = run_script(
        """
        import asyncio
        from aggregator import portal

        async def background():
            try:
                await asyncio.sleep(60)
            finally:
                print("cancelled", flush=True)

        tasks = []

        async def begin():
            tasks.append(asyncio.get_running_loop().create_task(background()))
            await asyncio.sleep(0)

        async def close():
            print("closed", flush=True)

        portal.call(begin)
        portal.on_close(close)
        """
    )
    assert (done.stdout, done.stderr, done.returncode) == ("cancelled\nclosed\n", "", 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_after_a_fork_there_is_a_new_loop() -> None:
    """A child process does not have its parent's threads, so it starts its own."""
    done = run_script(
        """
        import os
        from aggregator import portal

        async def answer():
            return os.getpid()

        assert portal.call(answer) == os.getpid()
        child = os.fork()
        if child == 0:
            assert portal.call(answer) == os.getpid()
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        """.replace("-W error", "")
    )
    assert (done.stdout, done.returncode) == ("7\n", 0), done.stderr


@pytest.mark.requirement("built 8: uvloop")
def test_uvloop_on_request() -> None:
    """Before the first call the library's loop can be set to uvloop's; afterwards that is an error."""
    pytest.importorskip("uvloop")
    done = run_script(
        """
        import asyncio
        from aggregator import portal
        from aggregator.errors import ConfigError

        async def which():
            return type(asyncio.get_running_loop()).__module__

        portal.use_uvloop()
        print(portal.call(which), flush=True)
        try:
            portal.use_uvloop()
        except ConfigError as error:
            print(error, flush=True)
        """
    )
    assert done.stdout.startswith("uvloop\nExpected use_uvloop() before"), done.stderr
