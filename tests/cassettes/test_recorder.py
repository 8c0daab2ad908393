"""`cassette(path)`: modes, files, and what leaving it raises."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import aggregator
from aggregator.cassettes import recorder
from aggregator.cassettes.lineage import adopted, current_tape, tape_here
from aggregator.cassettes.recorder import Mode, default_mode
from aggregator.cassettes.rules import Faults, TapeRules
from aggregator.errors import CassetteLockedError, CassetteMissError, CassetteWarning, ConfigError
from aggregator.files import FileLock
from aggregator.records import HTTPReply, HTTPRequest


def asking(text: str) -> HTTPRequest:
    return HTTPRequest(url="https://api.example.com/v1", body=f'{{"q":"{text}"}}'.encode(), headers={})


def say(text: str, reply: str) -> str:
    """Do what a client does: issue, then play, or go live and record."""
    tape = current_tape()
    assert tape is not None
    slot = tape.issue(asking(text))
    answer = tape.play(slot)
    if answer is None:
        answer = HTTPReply(status=200, body=reply.encode(), headers={})
        tape.record(slot, answer)
    return answer.body.decode()


def test_once_records_then_plays(tmp_path: Path) -> None:
    """ "once" records a missing cassette and plays it from then on."""
    path = tmp_path / "deep" / "a.yaml"
    for live in ("first", "second"):
        with aggregator.cassette(path, "once"):
            assert say("hi", live) == "first"
    assert current_tape() is None
    assert [file.name for file in path.parent.iterdir()] == ["a.yaml"]


def test_none_never_records(tmp_path: Path) -> None:
    """ "none" misses without a cassette, and creates none."""
    path = tmp_path / "a.yaml"
    with pytest.raises(CassetteMissError, match="a.yaml"), aggregator.cassette(path, "none"):
        say("hi", "live")
    assert list(tmp_path.iterdir()) == []


def test_new_episodes_adds(tmp_path: Path) -> None:
    """ "new_episodes" plays what is recorded and adds the rest."""
    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, "once"):
        say("a", "1")
    with aggregator.cassette(path, "new_episodes"):
        assert (say("a", "x"), say("b", "2")) == ("1", "2")
    with aggregator.cassette(path, "none"):
        assert (say("a", "x"), say("b", "x")) == ("1", "2")


def test_all_rerecords(tmp_path: Path) -> None:
    """ "all" plays nothing and replaces the cassette."""
    path = tmp_path / "a.yaml"
    for live in ("old", "new"):
        with aggregator.cassette(path, "all"):
            assert say("a", live) == live
    with aggregator.cassette(path, "none"):
        assert say("a", "x") == "new"


def careless(path: Path, then: Exception | None = None) -> None:
    """Replay a miss in agent code that catches every exception, and optionally raises afterwards."""
    with aggregator.cassette(path, "none"):
        with suppress(Exception):
            say("a", "x")
        if then is not None:
            raise then


def test_a_swallowed_miss_fails_the_block(tmp_path: Path) -> None:
    """Agent code that catches every exception cannot hide a miss."""
    with pytest.raises(CassetteMissError):
        careless(tmp_path / "a.yaml")


def test_a_miss_replaces_the_error_that_it_caused(tmp_path: Path) -> None:
    """An error that follows from a hidden miss is replaced by the miss."""
    with pytest.raises(CassetteMissError):
        careless(tmp_path / "a.yaml", AssertionError("nothing came"))


def test_default_mode() -> None:
    """If CI is set and not empty, the mode is "none"."""
    assert (default_mode({"CI": "1"}), default_mode({"CI": ""}), default_mode({})) == ("none", "once", "once")


def test_an_unknown_mode(tmp_path: Path) -> None:
    """It is a ConfigError that lists the modes."""
    with pytest.raises(ConfigError, match="none, once, new_episodes, all, got 'always'"):
        aggregator.cassette(tmp_path / "a.yaml", "always").__enter__()  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["none", "once", "new_episodes", "all"])
def test_a_folder_was_recorded_to_until_it_had_to_be_replaced(tmp_path: Path, mode: Mode) -> None:
    """A path that is a folder is refused before a request is sent, and no file is written."""
    folder = tmp_path / "cassettes"
    folder.mkdir()
    with pytest.raises(ConfigError, match="Expected the file of a cassette, got the folder"):
        aggregator.cassette(folder, mode).__enter__()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_symbolic_link_was_replaced(tmp_path: Path) -> None:
    """A cassette is the file that the link points to: one lock, one file, the link unchanged."""
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    with aggregator.cassette(real, "all"):
        say("a", "1")
    link.symlink_to(real)
    with aggregator.cassette(link, "new_episodes"):
        assert (say("a", "-"), say("b", "2")) == ("1", "2")
        with pytest.raises(CassetteLockedError):
            aggregator.cassette(real, "new_episodes").__enter__()
    assert link.is_symlink()
    with aggregator.cassette(real, "none"):
        assert (say("a", "-"), say("b", "-")) == ("1", "2")


def test_one_path_to_ignore_was_split_into_letters(tmp_path: Path) -> None:
    """A string is also a sequence of strings, which no type checker refuses."""
    with pytest.raises(ConfigError, match=r"list of JSON paths, got 'user'; give \['user'\]"):
        aggregator.cassette(tmp_path / "a.yaml", ignore="user").__enter__()


@pytest.mark.parametrize("mode", ["once", "new_episodes", "all"])
def test_two_recordings_of_one_file(tmp_path: Path, mode: Mode) -> None:
    """The error for a second recorder names the first."""
    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, mode), pytest.raises(CassetteLockedError, match=r"held by process \d+"):
        aggregator.cassette(path, mode).__enter__()


async def test_two_tasks_are_separate(tmp_path: Path) -> None:
    """Two cassettes open in two tasks get their own calls only."""
    ready = asyncio.Barrier(2)

    async def record(name: str) -> int:
        async with aggregator.cassette(tmp_path / f"{name}.yaml", "all") as tape:
            await ready.wait()
            for index in range(3):
                say(f"{name}{index}", name)
                await asyncio.sleep(0)
        return tape.recorded

    async with asyncio.TaskGroup() as group:
        tapes = [group.create_task(record(name)) for name in ("left", "right")]
    assert [tape.result() for tape in tapes] == [3, 3]
    for name, other in (("left", "right"), ("right", "left")):
        text = (tmp_path / f"{name}.yaml").read_text()
        assert f"{name}0" in text
        assert f"{other}0" not in text


def test_two_threads_are_separate(tmp_path: Path) -> None:
    """Two cassettes open in two threads get their own calls only."""
    ready = threading.Barrier(2)

    def record(name: str) -> None:
        with aggregator.cassette(tmp_path / f"{name}.yaml", "all"):
            ready.wait()
            for index in range(3):
                say(f"{name} {index}", name)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(record, ("left", "right"))) == [None, None]
    for name, other in (("left", "right"), ("right", "left")):
        text = (tmp_path / f"{name}.yaml").read_text()
        assert text.count(f'{{"q":"{name}') == 3
        assert other not in text


async def test_exiting_in_another_context(tmp_path: Path) -> None:
    """A cassette that a fixture opens in one context and closes in another is closed."""
    opened = aggregator.cassette(tmp_path / "a.yaml", "once")
    await asyncio.get_running_loop().create_task(opened.__aenter__(), context=copy_context())
    await opened.__aexit__(None, None, None)
    assert current_tape() is None


def test_nested_cassettes(tmp_path: Path) -> None:
    """The inner of two cassettes gets the calls; after it the outer one is current again."""
    with aggregator.cassette(tmp_path / "a.yaml", "all") as outer:
        with aggregator.cassette(tmp_path / "b.yaml", "all") as inner:
            say("in", "1")
        say("out", "2")
    assert (outer.recorded, inner.recorded) == (1, 1)


def test_an_interrupt_is_not_replaced(tmp_path: Path) -> None:
    """Ctrl-C is raised, whatever was missed before; the file is finished."""

    def interrupted() -> None:
        with aggregator.cassette(tmp_path / "a.yaml", "none"):
            with suppress(Exception):
                say("a", "x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


@pytest.mark.filterwarnings("ignore::aggregator.errors.CassetteWarning")
@pytest.mark.parametrize("mode", ["once", "new_episodes"])
def test_an_interrupted_recording_is_continued(tmp_path: Path, mode: Mode) -> None:
    """After Ctrl-C the same command plays what was paid for and records the rest."""
    path = tmp_path / "a.yaml"
    if mode == "new_episodes":
        with aggregator.cassette(path, "once"):
            say("z", "old")

    def interrupted() -> None:
        with aggregator.cassette(path, mode):
            say("a", "paid")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with aggregator.cassette(path, mode):
        assert (say("a", "x"), say("b", "new")) == ("paid", "new")
    with aggregator.cassette(path, "none") as tape:
        assert (say("a", "x"), say("b", "x")) == ("paid", "new")
    assert not any("not closed" in finding for finding in tape.report)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_block_keeps_what_was_paid_for(tmp_path: Path) -> None:
    """An error inside the block leaves a finished cassette of what was recorded until then."""

    def failing() -> None:
        with aggregator.cassette(tmp_path / "a.yaml", "once"):
            say("a", "paid")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    with aggregator.cassette(tmp_path / "a.yaml", "none"):
        assert say("a", "x") == "paid"


def test_unplayed_exchanges_give_a_warning(tmp_path: Path) -> None:
    """It is given when the block ends."""
    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, "once"):
        say("a", "1")
    with pytest.warns(CassetteWarning, match="1 of 1"), aggregator.cassette(path, "none"):
        pass


def test_another_thread_was_live_while_the_cassette_was_replayed(tmp_path: Path) -> None:
    """A plain thread has no context: its calls belong to the only open cassette, synchronous or not."""
    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, "once"):
        say("hi", "recorded")

    def there() -> str:
        tape = tape_here()
        assert tape is not None
        with adopted():
            assert current_tape() is tape
        answer = tape.play(tape.issue(asking("hi")))
        assert answer is not None
        return answer.body.decode()

    with aggregator.cassette(path, "none"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(there).result() == "recorded"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(tape_here).result() is None


def test_threads_do_not_choose_between_two_cassettes(tmp_path: Path) -> None:
    """With two open, a thread without a context belongs to neither; a tape can also exclude other threads."""
    with aggregator.cassette(tmp_path / "a.yaml", "all") as tape, ThreadPoolExecutor(1) as pool:
        with aggregator.cassette(tmp_path / "b.yaml", "all"):
            assert pool.submit(Context().run, tape_here).result() is None
        assert pool.submit(Context().run, tape_here).result() is tape
    alone = aggregator.cassette(tmp_path / "c.yaml", "all", rules=TapeRules(adopts="nothing"))
    with alone, ThreadPoolExecutor(1) as pool:
        assert pool.submit(Context().run, tape_here).result() is None


def test_a_thread_with_two_cassettes_was_live_while_they_were_replayed(tmp_path: Path) -> None:
    """A call that may belong to either cassette is refused if one of them only plays, and fails its block."""
    for name in ("a.yaml", "b.yaml"):
        with aggregator.cassette(tmp_path / name, "once"):
            say("hi", "recorded")
    outer, inner = (aggregator.cassette(tmp_path / name, "none", warn=False) for name in ("a.yaml", "b.yaml"))
    outer.__enter__()
    with inner as tape, ThreadPoolExecutor(1) as pool:
        with pytest.raises(CassetteMissError, match="start the thread inside of its cassette"):
            pool.submit(Context().run, tape_here).result()
        assert pool.submit(Context().run, partial(tape_here, for_client=True)).result() is None  # neither records any
        tape.misses.clear()
    with pytest.raises(CassetteMissError, match=r"got 2 \(.*a.yaml, .*b.yaml\)"):
        outer.__exit__(None, None, None)


def test_threads_started_inside_belong_to_the_innermost_cassette(tmp_path: Path) -> None:
    """A pool's items carry their submitter's context, also with two open cassettes."""
    rules = TapeRules(adopts="nothing")
    with aggregator.cassette(tmp_path / "a.yaml", "all", rules=rules) as outer, ThreadPoolExecutor(1) as pool:
        with aggregator.cassette(tmp_path / "b.yaml", "all") as inner:
            assert pool.submit(tape_here).result() is inner
        assert pool.submit(tape_here).result() is outer
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(tape_here).result() is None


async def test_a_tape_for_all_contexts_includes_those_made_before_it(tmp_path: Path) -> None:
    """In a pytest process a test's cassette records what unittest and anyio run in their own contexts."""
    before = copy_context()
    with aggregator.cassette(tmp_path / "a.yaml", "all"):
        assert before.run(tape_here) is None
    with aggregator.cassette(tmp_path / "a.yaml", "all", rules=TapeRules(adopts="everything")) as tape:
        assert before.run(tape_here) is tape
    assert before.run(tape_here) is None


@pytest.mark.filterwarnings("ignore::aggregator.errors.CassetteWarning")
def test_an_unfinished_recording_came_back_after_a_complete_rerecording(tmp_path: Path) -> None:
    """Mode "all" replaces everything, including unfinished new episodes."""
    path = tmp_path / "a.yaml"
    with aggregator.cassette(path, "once"):
        say("a", "1")

    def interrupted() -> None:
        with aggregator.cassette(path, "new_episodes"):
            say("b", "old")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with aggregator.cassette(path, "all"):
        assert (say("a", "2"), say("b", "new")) == ("2", "new")
    assert list(tmp_path.iterdir()) == [path]
    with aggregator.cassette(path, "new_episodes") as tape:
        assert (say("a", "-"), say("b", "-")) == ("2", "new")
    assert (tape.recorded, tape.report) == (0, [])


def test_a_second_recorder_that_waited_for_the_first_overwrote_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read again once the lock is held: "once" then plays what another process has finished."""
    path = tmp_path / "a.yaml"
    first = aggregator.cassette(path, "once")
    first.__enter__()
    say("a", "1")

    def lock_after_the_first(where: Path, **options: Any) -> FileLock:
        monkeypatch.undo()
        first.__exit__(None, None, None)
        return FileLock(where, **options)

    monkeypatch.setattr(recorder, "FileLock", lock_after_the_first)
    with aggregator.cassette(path, "once") as tape:
        assert (tape.records, say("a", "live")) == (False, "1")
    assert not path.with_name("a.yaml.lock").exists()


def test_faults_used_up_other_clients_answers(tmp_path: Path) -> None:
    """Faults apply to our own client; with other clients they are refused."""
    with pytest.raises(ConfigError, match=r"Expected faults without clients, got both \(clients=\['httpx'\]\)"):
        aggregator.cassette(tmp_path / "a.yaml", "none", clients=["httpx"], faults=Faults(cut=0.1))


@pytest.mark.parametrize("name", ["a" * 300, "a\0b.yaml", f"{'s' * 200}/" * 30])
@pytest.mark.parametrize("mode", ["once", "none"])
def test_an_impossible_path_raised_a_bare_exception(name: str, mode: Mode, tmp_path: Path) -> None:
    """Too long, or with a null character: refused by name, before anything is opened."""
    with (
        pytest.raises(ConfigError, match="Expected the path of a cassette"),
        aggregator.cassette(tmp_path / name, mode),
    ):
        pass


def test_a_loop_of_links_raised_a_bare_exception(tmp_path: Path) -> None:
    """A link to itself names no file."""
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    with pytest.raises(ConfigError, match="Expected the path of a cassette"), aggregator.cassette(loop, "once"):
        pass


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="it has no such device")
def test_a_device_was_read_without_end() -> None:
    """Reading /dev/zero or a named pipe as a cassette never ends."""
    with pytest.raises(ConfigError, match="Expected the file of a cassette, got the device or pipe '/dev/zero'"):
        aggregator.cassette("/dev/zero", "none").__enter__()
