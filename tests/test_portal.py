"""Where synchronous callers meet the event loop."""

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
    """No loop is needed."""
    assert portal.call(double, 21) == 42


@pytest.mark.requirement("Trace's defect 5: asyncio.run failed under a running loop")
async def test_a_notebook_calls() -> None:
    """A running loop in the same thread is no obstacle."""
    assert portal.call(double, 21) == 42


def test_threads_call() -> None:
    """Any number of threads wait on the one loop."""
    results: list[int] = []
    threads = [threading.Thread(target=lambda i=i: results.append(portal.call(double, i))) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [2 * i for i in range(20)]


def test_errors_and_cancellation_come_back() -> None:
    """What the work raises, the caller meets."""

    async def fail() -> None:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        portal.call(fail)


def test_an_unknown_argument_does_not_hang() -> None:
    """What cannot even be called is an error for the caller, who would else wait without end."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'base'"):
        portal.call(double, 21, base=10)
    assert portal.call(double, 21) == 42


def test_context_travels_along() -> None:
    """Cassette, lineage and role are those of the caller; what the work sets stays with it."""

    async def look() -> str:
        found = where.get()
        where.set("changed inside")
        return found

    where.set("the caller's")
    assert portal.call(look) == "the caller's"
    assert where.get() == "the caller's"


def test_on_its_own_loop_it_refuses() -> None:
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
    """The work is cancelled, its clean-up has run before the caller goes on."""
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


def test_ctrl_c_before_the_wait_has_begun_cancels_and_waits() -> None:
    """Work may start, and be interrupted, before its caller waits for it: that call is cancelled like any other."""
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


def test_what_still_runs_at_the_end_is_cancelled_and_closed() -> None:
    """A script that ends with work under way ends cleanly: cancelled first, then what was registered is closed."""
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
    """A child process has no thread of its parent's; it makes its own."""
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
def test_uvloop_when_asked_for() -> None:
    """Before the first call the library's loop can be uvloop's; afterwards it is too late, and said so."""
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
