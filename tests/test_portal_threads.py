"""Threads, pools and processes started during a run or in a cassette: which context they have."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import multiprocessing.pool
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import anyio.to_thread
import pytest

from aggregator import portal
from aggregator.errors import ConfigError

value: ContextVar[str] = ContextVar("value", default="stored")


@contextmanager
def run(name: str) -> Iterator[None]:
    """A run with a candidate's values."""
    token = value.set(name)
    with portal.carrying():
        yield
    value.reset(token)


def see(_: object = None) -> tuple[str, str]:
    branch = portal.current_branch()
    return value.get(), "" if branch is None else branch.path


def by_thread() -> list[tuple[str, str]]:
    seen: list[tuple[str, str]] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: seen.append(see()))
        thread.start()
        thread.join()
    return seen


def by_own_thread_class() -> list[tuple[str, str]]:
    class Own(threading.Thread):
        def run(self) -> None:
            self.seen = see()

    threads = [Own(daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    return [thread.seen for thread in threads]


def by_timer() -> list[tuple[str, str]]:
    seen: list[tuple[str, str]] = []
    for _ in range(3):
        timer = threading.Timer(0, lambda: seen.append(see()))
        timer.start()
        timer.join()
    return seen


def by_map() -> list[tuple[str, str]]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(see, range(3)))


def by_submit() -> list[tuple[str, str]]:
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(see) for _ in range(3)]]


def by_submit_of_a_copied_context() -> list[tuple[str, str]]:
    """Submit as LangChain's `.batch` and litellm do."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(copy_context().run, see) for _ in range(3)]]


def by_thread_pool_map() -> list[tuple[str, str]]:
    with multiprocessing.pool.ThreadPool(2) as pool:
        return pool.map(see, range(3))


def by_thread_pool_starmap() -> list[tuple[str, str]]:
    with multiprocessing.pool.ThreadPool(2) as pool:
        return pool.starmap(see, [(n,) for n in range(3)])


def by_thread_pool_imap() -> list[tuple[str, str]]:
    with multiprocessing.pool.ThreadPool(2) as pool:
        return list(pool.imap(see, iter(range(3)), chunksize=2))


def by_thread_pool_apply() -> list[tuple[str, str]]:
    with multiprocessing.pool.ThreadPool(2) as pool:
        return [result.get() for result in [pool.apply_async(see) for _ in range(3)]]


def by_run_in_executor() -> list[tuple[str, str]]:
    async def ask() -> list[tuple[str, str]]:
        loop = asyncio.get_running_loop()
        return list(await asyncio.gather(*[loop.run_in_executor(None, see) for _ in range(3)]))  # noqa: TID251 - what agents do

    return asyncio.run(ask())  # noqa: TID251 - what agents do


def by_to_thread() -> list[tuple[str, str]]:
    async def ask() -> list[tuple[str, str]]:
        return list(await asyncio.gather(*[asyncio.to_thread(see) for _ in range(3)]))  # noqa: TID251 - what agents do

    return asyncio.run(ask())  # noqa: TID251 - what agents do


def by_anyio() -> list[tuple[str, str]]:
    async def ask() -> list[tuple[str, str]]:
        return list(await asyncio.gather(*[anyio.to_thread.run_sync(see) for _ in range(3)]))  # noqa: TID251 - what agents do

    return asyncio.run(ask())  # noqa: TID251 - what agents do


WAYS: list[Callable[[], list[tuple[str, str]]]] = [
    by_thread,
    by_own_thread_class,
    by_timer,
    by_map,
    by_submit,
    by_submit_of_a_copied_context,
    by_thread_pool_map,
    by_thread_pool_starmap,
    by_thread_pool_imap,
    by_thread_pool_apply,
    by_run_in_executor,
    by_to_thread,
    by_anyio,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_threads_read_the_stored_value_instead_of_the_candidates(way: Callable[[], list[tuple[str, str]]]) -> None:
    """However the thread is started or gets work, it sees the run's values."""
    with run("candidate"):
        assert [seen for seen, _ in way()] == ["candidate"] * 3


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_started_work_is_numbered_in_order(way: Callable[[], list[tuple[str, str]]]) -> None:
    """Two runs of one program give the same work the same lineage, and different work different lineages."""
    places = []
    for _ in range(2):
        with run("candidate"):
            places.append([place for _, place in way()])
    assert places[0] == places[1]
    assert len(set(places[0])) == 3
    assert sorted(places[0], key=lambda place: [int(n) for n in place.split(".")]) == places[0]


def test_items_of_a_pool_within_a_pool_had_one_lineage() -> None:
    """A framework passes a copy of the context to its pool, from an item that was submitted in the same way."""

    def inner() -> list[tuple[str, str]]:
        with ThreadPoolExecutor(3) as pool:
            return [work.result() for work in [pool.submit(copy_context().run, see) for _ in range(3)]]

    with run("candidate"), ThreadPoolExecutor(1) as outer:
        found = outer.submit(copy_context().run, inner).result()
    assert len({place for _, place in found}) == 3
    assert [seen for seen, _ in found] == ["candidate"] * 3


def test_a_reused_thread_of_a_pool_kept_the_context_of_its_first_item() -> None:
    """A pool that outlives the run that started its threads uses each caller's context."""
    pool = ThreadPoolExecutor(1)
    threads = multiprocessing.pool.ThreadPool(1)
    try:
        with run("first"):
            assert (pool.submit(see).result()[0], threads.apply(see)[0]) == ("first", "first")
        with run("second"):
            assert (pool.submit(see).result()[0], threads.apply(see)[0]) == ("second", "second")
        assert (pool.submit(see).result(), threads.apply(see)) == (("stored", ""), ("stored", ""))
    finally:
        pool.shutdown()
        threads.terminate()


def test_a_pool_made_inside_a_run_starts_threads_without_its_context() -> None:
    """A pool's own threads never start with a run's context."""
    begun: list[str] = []
    with run("first"), ThreadPoolExecutor(1, initializer=lambda: begun.append(value.get())) as pool:
        assert pool.submit(see).result()[0] == "first"
    assert begun == ["stored"]


def test_outside_a_run_no_context_is_passed_on() -> None:
    """Code outside a run starts threads as before, also during another run."""
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with run("other's"):
            entered.set()
            leave.wait(5)

    somebody = threading.Thread(target=other)
    somebody.start()
    entered.wait(5)
    token = value.set("mine")
    try:
        assert by_thread() == by_map() == [("stored", "")] * 3
    finally:
        value.reset(token)
        leave.set()
        somebody.join()


def test_functions_are_restored_exactly() -> None:
    """After the last holder no patch is left, and an inherited function is inherited again."""
    owners: list[Any] = [
        threading.Thread,
        ThreadPoolExecutor,
        ProcessPoolExecutor,
        multiprocessing.pool.Pool,
        multiprocessing.pool.ThreadPool,
        asyncio.BaseEventLoop,
    ]
    before = [dict(vars(owner)) for owner in owners]
    finders = list(sys.meta_path)
    with run("a"):
        with run("b"):
            pass
        assert vars(threading.Thread) != before[0]
    assert [dict(vars(owner)) for owner in owners] == before
    assert sys.meta_path == finders


def test_another_librarys_patch_on_top_is_kept() -> None:
    """Removing our patch keeps another library's, and ours beneath it passes calls on."""
    original = threading.Thread.start

    with run("a"):
        ours = threading.Thread.start

        def theirs(self: threading.Thread) -> None:
            ours(self)

        threading.Thread.start = theirs  # type: ignore[method-assign]
    try:
        assert threading.Thread.start is theirs
        assert by_thread() == [("stored", "")] * 3
    finally:
        threading.Thread.start = original  # type: ignore[method-assign]


def test_a_module_imported_inside_is_patched_too(tmp_path: Any) -> None:
    """`from concurrent.futures import ProcessPoolExecutor` inside the agent runs after the run has started."""
    script = """
        import sys
        from aggregator import portal
        with portal.carrying():
            assert "multiprocessing.pool" not in sys.modules
            from multiprocessing.pool import ThreadPool
            with ThreadPool(1) as pool:
                print(pool.apply(lambda: portal.current_branch().path))
        print(sys.modules["multiprocessing.pool"].__spec__.loader.__class__.__name__)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["0", "SourceFileLoader"]


def stray() -> str:
    try:
        portal.refuse_strays("a call of a model")
    except ConfigError as error:
        return str(error)
    return "not refused"


CONTEXTS = [name for name in ("fork", "spawn") if name in multiprocessing.get_all_start_methods()]


@pytest.mark.parametrize("method", CONTEXTS)
def test_a_process_pool_called_a_model_without_budget_and_journal(method: str) -> None:
    """Work that a pool would run in another process is refused with the remedy, for every start method."""
    context = multiprocessing.get_context(method)
    with run("candidate"), ProcessPoolExecutor(1, mp_context=context) as pool:
        told = pool.submit(stray).result()
    assert f"open in process {os.getpid()}" in told
    assert "use threads" in told
    with run("candidate"), context.Pool(1) as processes:
        assert "use threads" in processes.apply(stray)
        assert "use threads" in processes.map(_stray_of, [1])[0]


def _stray_of(_: int) -> str:
    return stray()


@pytest.mark.parametrize("method", CONTEXTS)
def test_a_process_started_in_a_run_is_refused(method: str) -> None:
    """This includes `multiprocessing.Process`."""
    context = multiprocessing.get_context(method)
    told = context.SimpleQueue()
    with run("candidate"):
        process = context.Process(target=_tell, args=(told,))  # type: ignore[attr-defined]
        process.start()
        assert "use threads" in told.get()
        process.join()


def _tell(told: Any) -> None:
    told.put(stray())


def test_a_process_with_its_own_run_is_allowed() -> None:
    """A child that opens its own cassette can make calls, and so can one started outside a run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(CONTEXTS[0])) as pool:
        assert pool.submit(stray).result() == "not refused"
        with run("candidate"):
            assert pool.submit(_own_run).result() == "not refused"
        assert pool.submit(stray).result() == "not refused"


def _own_run() -> str:
    with run("own"):
        return stray()


def test_a_thread_of_c_code_is_refused_during_a_run() -> None:
    """It has no context, so its calls would reach no budget and no journal."""
    import _thread

    def ask() -> str:
        told: list[str] = []
        done = threading.Event()

        def work() -> None:
            told.append(stray())
            done.set()

        _thread.start_new_thread(work, ())
        done.wait(5)
        return told[0]

    assert ask() == "not refused"
    with run("candidate"):
        assert "start it with threading.Thread" in ask()


def test_a_synchronous_call_in_a_thread_of_c_code_is_refused() -> None:
    """The call is passed to the library's loop, whose thread has another context."""
    import _thread

    async def call() -> str:
        return stray()

    def ask() -> str:
        told: list[str] = []
        done = threading.Event()

        def work() -> None:
            told.append(portal.call(call))
            done.set()

        _thread.start_new_thread(work, ())
        done.wait(5)
        return told[0]

    assert ask() == "not refused"
    with run("candidate"):
        assert "start it with threading.Thread" in ask()


def test_a_callback_of_a_future_had_no_context() -> None:
    """It runs in a thread of the pool, after the item."""
    seen: list[tuple[str, str]] = []
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool, run("candidate"):
        future = pool.submit(begun.wait, 5)
        future.add_done_callback(lambda _: seen.append(see()))
        begun.set()
        future.result()
        pool.shutdown()
    assert [name for name, _ in seen] == ["candidate"]


def test_long_chains_of_tasks_have_short_lineages() -> None:
    """A chain of ten thousand tasks keeps its lineage short."""

    async def chain(left: int) -> str:
        if not left:
            return see()[1]
        return await asyncio.create_task(chain(left - 1))  # noqa: TID251 - what agents do

    async def long() -> str:
        return await chain(300)

    with run("candidate"):
        assert len(asyncio.run(long())) < 220  # noqa: TID251 - what agents do


def test_a_thread_that_failed_to_start_can_start_later() -> None:
    """Starting twice is an error as before, and leaves nothing on the thread."""
    with run("candidate"):
        thread = threading.Thread(target=see)
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="threads can only be started once"):
            thread.start()
        assert "run" not in vars(thread)


async def test_tasks_of_a_given_context_run_in_it() -> None:
    """`create_task(context=...)` runs in that context, as before."""
    with run("candidate"):
        context = copy_context()
        context.run(value.set, "given")
        assert (await asyncio.create_task(_see(), context=context))[0] == "given"  # noqa: TID251 - what agents do
        empty = partial(asyncio.create_task, _see(), context=type(context)())  # noqa: TID251 - what agents do
        assert (await empty())[0] == "stored"


async def _see() -> tuple[str, str]:
    return see()


def test_futures_keep_their_errors() -> None:
    """A wrapped function raises its own exception."""
    with run("candidate"), ThreadPoolExecutor(1) as pool:
        future = pool.submit(int, "no number")
        assert concurrent.futures.wait([future]).done == {future}
        with pytest.raises(ValueError, match="no number"):
            future.result()
