"""The one place where synchronous callers meet the event loop.

`call` runs a coroutine function on one background loop and waits for it: it works in scripts, under a running loop
(notebooks, servers) and from worker threads. It copies the context variables; Ctrl-C cancels the work and waits.

While a run or a cassette is open (`carrying`), threads and pools get the context too; otherwise `refuse_strays` raises.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from copy import copy
from functools import partial, wraps
from hashlib import sha256
from itertools import count
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar
from weakref import ref

from aggregator.errors import ConfigError
from aggregator.patching import Patch, Patches

Result = TypeVar("Result")
Owner = TypeVar("Owner")
Args = ParamSpec("Args")

PATIENCE = 10.0
"""Seconds that an interrupted caller waits for its work, which may swallow its cancellation."""
_DEEPEST = 40  # tasks may start one another without end, and each branch refers to its parent
_LONGEST_PATH = 200  # characters of a branch; a longer one becomes a digest


class _Portal:
    """One daemon thread with one event loop, created on first use and again after a fork."""

    def __init__(self) -> None:
        self.pid, self.stopping = os.getpid(), False
        self.closers: list[Callable[[], Awaitable[None]]] = []
        self.loop = _loop_factory()
        self.thread = threading.Thread(target=self._serve, name="aggregator-portal", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        while not self.stopping:
            try:
                self.loop.run_forever()
            except (KeyboardInterrupt, SystemExit):
                continue  # asyncio raises these here too, besides passing them to the task's awaiter
        self.loop.run_until_complete(_finish(self.closers))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    def close(self) -> None:
        if self.thread.is_alive() and self.pid == os.getpid():
            self.stopping = True
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(timeout=5)


async def _finish(closers: list[Callable[[], Awaitable[None]]]) -> None:
    """Cancel the remaining work and close the registered objects."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=4)
    for closer in closers:
        await closer()


_loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
_lock = threading.Lock()
_portal: _Portal | None = None


def _current() -> _Portal:
    global _portal  # noqa: PLW0603 - one background loop per process is the point
    with _lock:
        if _portal is None or _portal.pid != os.getpid():
            _portal = _Portal()
            atexit.register(_portal.close)
        return _portal


class Scope:
    """The calls that a thread makes for one piece of work: cancelling it cancels them and refuses later ones.

    A thread cannot be stopped, but its further calls to models can be refused.
    """

    def __init__(self) -> None:
        self.is_cancelled = False
        self.tasks: set[asyncio.Task[Any]] = set()  # used on the library's loop only

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function whose calls belong to this scope."""
        token = _scope.set(self)
        try:
            return function(*args)
        finally:
            _scope.reset(token)

    def cancel(self) -> None:
        """Cancel calls in flight, from any thread."""
        self.is_cancelled = True
        if _portal is not None:
            _portal.loop.call_soon_threadsafe(lambda: [task.cancel() for task in self.tasks])

    def hold(self) -> None:
        """Assign all calls of this context, and of what it starts, to this scope."""
        _scope.set(self)


_scope: ContextVar[Scope | None] = ContextVar("aggregator_scope", default=None)


def call(function: Callable[..., Coroutine[Any, Any, Result]], /, *args: Any, **kwargs: Any) -> Result:
    """Run `function(*args, **kwargs)` on the library's loop and return its result.

    Raises ConfigError when called on that loop itself, where waiting would never end.
    """
    portal = _current()
    if threading.current_thread() is portal.thread:
        raise ConfigError(
            f"Expected `await` inside an async function, got a synchronous call of {function.__qualname__} on the "
            "library's own event loop, where it would wait for itself; use the awaitable form, "
            "as in `await llm.complete(...)` or `await trainer.atrain(...)`"
        )
    outcome: Future[Result] = Future()
    scope = _scope.get() or Scope()
    branch = current_branch() or (_STRAY if _is_foreign() else None)

    def start() -> None:
        if scope.is_cancelled:
            outcome.set_exception(CancelledError())
            return
        context = copy_context()
        context.run(_branch.set, branch)
        _branch.set(None)  # of this callback's context: the work continues the caller's branch
        try:
            task = portal.loop.create_task(function(*args, **kwargs), context=context)
        except BaseException as error:  # noqa: BLE001 - passed to the waiting caller
            outcome.set_exception(error)
            return
        scope.tasks.add(task)
        task.add_done_callback(scope.tasks.discard)
        task.add_done_callback(lambda finished: _transfer(finished, outcome))

    try:  # from here on: an interrupt may come before the wait has begun
        portal.loop.call_soon_threadsafe(start)
        return outcome.result()
    except (KeyboardInterrupt, SystemExit) as interrupt:
        if not outcome.done():  # otherwise it came from the work itself
            scope.cancel()
            wait([outcome], timeout=PATIENCE)
            vars(interrupt).update(vars(outcome.exception()) if outcome.done() and outcome.exception() else {})
        raise


def _transfer(task: asyncio.Task[Result], outcome: Future[Result]) -> None:
    """Pass a finished task's result to the waiting thread."""
    if task.cancelled():
        ended = CancelledError()
        try:
            task.result()
        except asyncio.CancelledError as cancelled:
            vars(ended).update(vars(cancelled))  # such as the partial result of a run
        outcome.set_exception(ended)
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


def sync(
    method: Callable[Concatenate[Owner, Args], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Owner, Args], Result]:
    """Return the synchronous version of an async method, with the same signature: `train` for `atrain`.

    It looks the async method up by name, so an override is found. `__face_of__` holds the name: a method without this
    marker is an override.
    """
    name = method.__name__

    @wraps(method)
    def face(self: Owner, /, *args: Args.args, **kwargs: Args.kwargs) -> Result:
        bound: Callable[Args, Coroutine[Any, Any, Result]] = getattr(self, name)
        return call(bound, *args, **kwargs)

    _name_face(face, name)
    return face


def sync_function(function: Callable[Args, Coroutine[Any, Any, Result]]) -> Callable[Args, Result]:
    """Return the synchronous version of an async function, with the same signature."""

    @wraps(function)
    def face(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        return call(function, *args, **kwargs)

    _name_face(face, function.__name__)
    return face


def _name_face(face: Any, awaitable: str) -> None:
    """Name a synchronous version after its async one, without the leading `a`."""
    face.__face_of__ = awaitable
    face.__name__ = awaitable.removeprefix("a")
    face.__qualname__ = face.__qualname__.removesuffix(awaitable) + face.__name__


def is_here() -> bool:
    """Return True in the background loop's own thread."""
    return _portal is not None and threading.current_thread() is _portal.thread


def on_close(closer: Callable[[], Awaitable[None]]) -> None:
    """Register a coroutine function that the library's loop awaits before the interpreter exits."""
    _current().closers.append(closer)


def use_uvloop() -> None:
    """Run the library's loop on uvloop (the extra `uvloop`); raises ConfigError if the loop exists already."""
    from uvloop import new_event_loop

    global _loop_factory  # noqa: PLW0603 - of the one background loop
    with _lock:
        if _portal is not None and _portal.pid == os.getpid():
            raise ConfigError("Expected use_uvloop() before the first synchronous call, got it after one")
        _loop_factory = new_event_loop


class Branch:
    """The origin of concurrent work: the numbers of the tasks, threads and pool items that lead to it, such as `0.3.1`.

    Numbers count what one context starts, in order. Two runs of one program therefore give the same path to the same
    work, in any order of completion. `inner` is the path since the innermost lineage block, and `outer` the path at
    which that block was entered.
    """

    process: ClassVar[int] = os.getpid()  # this one, also after a fork; asking the system for each branch is slow
    outside: ClassVar[int] = 0  # calls of models from threads without a context, while a run or cassette was open
    depth = 0
    parent: Branch | None = None
    _alive = 0  # threads and pool items
    _latest: ref[asyncio.Task[Any]] | None = None
    _crowded = quiet = has_started = has_ended = False  # has started other work; is a thread or pool item that ended
    has_items = False  # work that was submitted here runs in a thread that knows its own branch
    calls = calls_before = 0  # recorded calls of this work, and of its starter before it
    base: Branch | None = None  # for a lineage block, where the task, thread or pool item that entered it began
    task: ref[asyncio.Task[Any]] | None = None

    def __init__(
        self, path: str = "", inner: str = "", outer: Branch | None = None, parent: Branch | None = None
    ) -> None:
        self.path, self.inner, self.outer, self.pid, self._numbers = path, inner, outer, self.process, count()
        if (above := parent or outer) is not None:
            self.parent, self.depth = parent, above.depth + 1
            self.base = above.base or above if parent is None else None

    def child(self) -> Branch:
        """Return the branch of the next work that is started here."""
        if self.quiet:
            return self
        number = next(self._numbers)
        if not self._crowded:
            latest = None if self._latest is None else self._latest()
            self._crowded = self._alive > 0 or (latest is not None and not latest.done())
        above = (self.outer, self) if self.depth < _DEEPEST else ()
        longer = [f"{before}.{number}" if before else str(number) for before in (self.path, self.inner)]
        path, inner = [one if len(one) < _LONGEST_PATH else sha256(one.encode()).hexdigest()[:16] for one in longer]
        made, here = Branch(path, inner, *above), self.base or self
        here.has_started, made.calls_before = True, here.calls
        return made

    def watch(self, task: asyncio.Task[Any], child: Branch) -> None:
        """Note a task that was started here: work started before it is done is concurrent with it."""
        child.task = ref(task)
        self._latest = self._latest if self._crowded else child.task

    def add(self, change: int) -> None:
        """Count a thread or pool item started here as running (1) or as ended (-1)."""
        self._alive += change

    def is_concurrent(self, *, whole: bool = False) -> bool:
        """Return True if this is one of several that are or were running at once, since the last block or the run."""
        branch: Branch | None = self
        while branch is not None:
            if (parent := branch.parent) is not None and parent._crowded:  # noqa: SLF001 - of its own class
                return True
            branch = parent or (branch.outer if whole else None)
        return False

    def uncounted(self) -> Branch:
        """Return the same place; work started there gets no number."""
        same = copy(self)
        same.quiet, same.base = True, None
        return same


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: setattr(Branch, "process", os.getpid()))

_branch: ContextVar[Branch | None] = ContextVar("aggregator_branch", default=None)

set_branch = _branch.set
"""Make a branch this context's current one."""


class _Work(threading.local):
    """The pool item that this thread runs: the branch that submitted it, and its own."""

    handed_in: Branch | None = None
    own: Branch | None = None


_work = _Work()


def current_branch() -> Branch | None:
    """Return the branch within the concurrent work of a run or cassette; None outside.

    Frameworks run a pool's items in copies of their submitter's context, which are identical; the thread's item
    distinguishes them.
    """
    branch = _branch.get()
    return _work.own if branch is not None and branch.has_items and branch is _work.handed_in else branch


def begin_block() -> Branch | None:
    """Let `inner` start here, and return the branch to restore at the block's end; None outside a run or cassette."""
    branch = current_branch()
    if branch is not None:
        _branch.set(Branch(branch.path, outer=branch if branch.depth < _DEEPEST else None))
    return branch


@contextmanager
def carrying() -> Iterator[None]:
    """Give threads, pools and tasks that are started inside this context, as asyncio does for tasks.

    Each run and each open cassette holds it. A started thread, and work submitted to a pool, gets a copy of the
    context; a pool's own threads keep none. `refuse_strays` raises in work for another process.
    """
    here = current_branch()
    branch = Branch() if here is None or here.pid != Branch.process else here
    token = _branch.set(branch)
    _hooks.hold()
    try:
        yield
    finally:
        _hooks.release()
        try:
            _branch.reset(token)
        except ValueError:  # exited in another context than entered, as by a pytest fixture of asyncio
            if _branch.get() is branch:
                _branch.set(None)


@contextmanager
def on_branch(branch: Branch | None) -> Iterator[None]:
    """Let work that is started inside count from this branch; None: let it start without a context, as before."""
    token = _branch.set(branch)
    try:
        yield
    finally:
        _branch.reset(token)


def refuse_strays(what: str) -> None:
    """Raise ConfigError for a call that belongs to a run or cassette and cannot reach it.

    In another process the budget, the journal and the candidate's values are copies; a thread started by C code has
    none of them. Raises CancelledError for abandoned work. Any other thread without a context is only counted.
    """
    scope = _scope.get()
    if scope is not None and scope.is_cancelled:
        raise asyncio.CancelledError("given up")
    branch = _branch.get()
    if branch is not None and branch.pid == Branch.process:
        return
    if branch is None and not _is_foreign():
        if _hooks.holders:
            Branch.outside += 1
        return
    if branch is None or branch is _STRAY:
        where = "a thread that was not started by threading, and has no context while a run or cassette is open"
        remedy = "start it with threading.Thread or a ThreadPoolExecutor"
    else:
        where = f"process {os.getpid()}, which cannot reach the run or cassette that is open in process {branch.pid}"
        remedy = "use threads, return what the call needs, or open a cassette in that process"
    raise ConfigError(f"Expected {what} in the process and context of its run, got one in {where}; {remedy}")


_STRAY = Branch()  # of a synchronous call from a thread started by C code
_STRAY.pid = -1


def _is_foreign() -> bool:
    """Return True in a thread started by C code, while a run or cassette is open."""
    return bool(_hooks.holders) and isinstance(threading.current_thread(), _FOREIGN)


class _Elsewhere:
    """A function for another process: its calls there are refused, because they belong to this process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.pid = function, os.getpid()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        branch = Branch()
        branch.pid = self.pid
        with on_branch(branch):
            return self.function(*args, **kwargs)


def _carried(branch: Branch, copied: Context | None = None) -> Callable[..., Any]:
    """Return a function that calls another one in a copy of this context, as the next work that it starts."""
    context = copy_context() if copied is None else copied
    handed_in, child = context.get(_branch), branch.child()  # in a pool item, copies of the context hold another branch
    branch.add(1)
    context.run(_branch.set, child)
    if handed_in is not None:
        handed_in.has_items = True

    def run(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        before = _work.handed_in, _work.own
        _work.handed_in, _work.own = handed_in, child
        try:
            return context.run(function, *args, **kwargs)
        finally:
            branch.add(-1)
            child.has_ended = True
            _work.handed_in, _work.own = before

    return run


_FOREIGN: Any = threading._DummyThread  # noqa: SLF001 - what current_thread() makes for a thread that C code has started
_PROCESS_POOLS = ("concurrent.futures.process", "joblib.externals.loky.process_executor", "loky.process_executor")
_MAPS = ("_map_async", "imap", "imap_unordered")
_POOLS = frozenset({"concurrent.futures.thread", "concurrent.futures.process", "multiprocessing.pool"})


def _is_of_a_pool(worker: Any) -> bool:
    """Return True if a thread or process is a pool's own, which runs the work of many contexts."""
    target = getattr(worker, "_target", None)
    return getattr(target, "__module__", None) in _POOLS or type(worker).__module__ in _POOLS


def _start_thread(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def start(self: threading.Thread) -> Any:
        branch = current_branch()
        if branch is None or getattr(self, "_context", None) is not None:  # given by the caller: Python 3.14
            return original(self)
        if _is_of_a_pool(self):
            return Context().run(original, self)
        run, carry = self.run, _carried(branch)

        def run_carried() -> None:
            vars(self).pop("run", None)  # otherwise the thread would reference itself
            carry(run)

        self.run = run_carried  # type: ignore[method-assign]
        try:
            original(self)
        except BaseException:  # not started: the caller may retry
            vars(self).pop("run", None)
            raise

    return start


def _start_process(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def start(self: Any) -> Any:
        if current_branch() is None:
            return original(self)
        if _is_of_a_pool(self):  # its work is marked item by item
            return Context().run(original, self)
        if getattr(self, "_target", None) is not None:
            self._target = _Elsewhere(self._target)
        return original(self)

    return start


def _submit_to_threads(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def submit(self: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if (branch := current_branch()) is None:
            return original(self, function, *args, **kwargs)
        # in an empty context: the thread that this may start must not keep ours
        return Context().run(original, self, _carried(branch), function, *args, **kwargs)

    return submit


def _add_done_callback(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def add_done_callback(self: Any, fn: Callable[..., Any]) -> Any:
        branch, package = current_branch(), (getattr(fn, "__module__", "") or "").partition(".")[0]
        if branch is None or package in ("asyncio", "concurrent", "uvloop"):
            return original(self, fn)
        context = copy_context()
        context.run(_branch.set, branch.uncounted())
        return original(self, partial(context.run, fn))

    return add_done_callback


def _submit_to_processes(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def submit(self: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if current_branch() is None:
            return original(self, function, *args, **kwargs)
        return Context().run(original, self, _Elsewhere(function), *args, **kwargs)

    return submit


def _has_threads(pool: Any) -> bool:
    return any(kind.__name__ == "ThreadPool" for kind in type(pool).__mro__)


def _apply_in_pool(original: Callable[..., Any]) -> Callable[..., Any]:
    """Guard `multiprocessing.Pool.apply_async`."""

    @wraps(original)
    def apply_async(self: Any, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (branch := current_branch()) is not None:
            func = partial(_carried(branch), func) if _has_threads(self) else _Elsewhere(func)
        return original(self, func, *args, **kwargs)

    return apply_async


def _map_in_pool(original: Callable[..., Any]) -> Callable[..., Any]:
    """Guard `multiprocessing.Pool`'s methods that call one function on many items."""

    @wraps(original)
    def map_items(self: Any, func: Callable[..., Any], iterable: Any, *args: Any, **kwargs: Any) -> Any:
        if (branch := current_branch()) is None:
            return original(self, func, iterable, *args, **kwargs)
        if not _has_threads(self):
            return original(self, _Elsewhere(func), iterable, *args, **kwargs)
        here = copy_context()
        is_star = bool(args) and getattr(args[0], "__name__", "") == "starmapstar"

        def call(*given: Any) -> Any:
            carry, *rest = given if is_star else given[0]
            return carry(func, *rest)

        items = ((_carried(branch, here.copy()), *(item if is_star else (item,))) for item in iterable)
        return original(self, call, list(items) if hasattr(iterable, "__len__") else items, *args, **kwargs)

    return map_items


def _create_task(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_task(self: Any, coro: Any, **kwargs: Any) -> Any:
        if (branch := current_branch()) is None:
            return original(self, coro, **kwargs)
        given, child = kwargs.get("context"), branch.child()
        context = copy_context() if given is None else given
        with suppress(RuntimeError):  # a context of the caller's own that is in use: its tasks get no numbers
            context.run(_branch.set, child)
            kwargs["context"] = context
        task = original(self, coro, **kwargs)
        branch.watch(task, child)
        return task

    return create_task


_hooks = Patches(
    (
        Patch("threading", "Thread.start", _start_thread),
        Patch("concurrent.futures.thread", "ThreadPoolExecutor.submit", _submit_to_threads),
        Patch("concurrent.futures._base", "Future.add_done_callback", _add_done_callback),
        *[Patch(home, "ProcessPoolExecutor.submit", _submit_to_processes) for home in _PROCESS_POOLS],
        Patch("multiprocessing.pool", "Pool.apply_async", _apply_in_pool),
        *[Patch("multiprocessing.pool", f"Pool.{name}", _map_in_pool) for name in _MAPS],
        Patch("multiprocessing.process", "BaseProcess.start", _start_process),
        Patch("asyncio.base_events", "BaseEventLoop.create_task", _create_task),
        Patch("uvloop", "Loop.create_task", _create_task),
    )
)
