"""Agents that are commands: how they get values, what their exit means, and folders of texts as parameters."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from aggregator import as_agent, cassette
from aggregator.adapters.command import CommandAgent, folder_parameters
from aggregator.errors import CassetteMissError, ConfigError
from aggregator.executors.work import AgentWork
from aggregator.records import Rollout, RolloutTask, Sample

READ = "import json, os, sys; given = json.load(sys.stdin); "
ANSWER = "print(json.dumps({'output': %s}))"


def python(code: str, *arguments: str, values: Any = None, **options: Any) -> CommandAgent:
    given = {"prompt": "hi"} if values is None else values
    return CommandAgent([sys.executable, "-c", code, *arguments], given, **options)


async def rollout(agent: Any, x: Any = "you", **values: Any) -> Rollout:
    task = RolloutTask(sample=Sample(0, x), values=values, lineage=("test",), role="agent", capture=True)
    return await AgentWork(as_agent(agent), None)(task)


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "request": (READ + ANSWER % "given['values']['prompt'] + given['input']", {}),
    "environment": (READ + ANSWER % "os.environ['prompt'] + given['input']", {"values_in": "environment"}),
    "file": (
        READ + ANSWER % "json.load(open(os.environ['AGGREGATOR_VALUES']))['values']['prompt'] + given['input']",
        {"values_in": "file"},
    ),
}


@pytest.mark.parametrize(("code", "options"), WAYS.values(), ids=WAYS)
async def test_values_reach_the_command(code: str, options: Any) -> None:
    """They are in the request, the environment or a file; each run has its candidate's values."""
    agent = python(code, **options)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(rollout(agent, prompt=f"p{i} ")) for i in range(4)]
    assert [task.result().output for task in tasks] == [f"p{i} you" for i in range(4)]
    assert await agent("Ada") == "hiAda"


async def test_arguments_are_filled_without_a_shell() -> None:
    """Any input is one argument, and a value is not expanded again."""
    code = "import sys; print(sys.argv[1:], sys.stdin.read())"
    agent = python(code, "--prompt={prompt}", "{input}", reply="text")
    found = await rollout(agent, x="$(rm -rf x); {prompt} 'a b'", prompt="{input}")
    assert found.output == "['--prompt={input}', \"$(rm -rf x); {prompt} 'a b'\"] "


async def test_an_exit_code_is_the_agents_failure_with_the_end_of_stderr() -> None:
    code = "import sys; print('a' * 90000, file=sys.stderr); sys.exit('KeyError: lamp')"
    found = await rollout(python(code))
    assert found.failure is not None
    assert found.failure.message.startswith("Expected exit code 0, got exit code 1: ...aaa")
    assert found.failure.message.endswith("KeyError: lamp")
    assert not found.failure.infrastructure


async def test_a_signal_is_named() -> None:
    """A command that crashes reports SIGSEGV, not only a negative exit code."""
    found = await rollout(python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))
    assert found.failure is not None
    assert "got signal SIGSEGV: (it wrote nothing)" in found.failure.message


async def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    """Its children hold its output open."""
    code = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    found = await rollout(python(code, timeout=1.5))
    assert found.failure is not None
    assert found.failure.message == "Expected a reply within 1.5 s, got none; raise timeout="
    assert await is_gone(int((tmp_path / "pid").read_text()))


async def test_a_child_left_behind_does_not_delay_the_reply(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print('{\"output\": %d}' % child.pid)"
    )
    found = await rollout(python(code, timeout=30))
    assert await is_gone(found.output)


async def is_gone(pid: int) -> bool:
    """Wait until a process has ended."""
    for _ in range(500):
        if not runs(pid):
            return True
        await asyncio.sleep(0.02)
    return False


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_cancellation_ends_the_command(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    agent = python(f"import os, time; print(os.getpid(), file=open({str(pid)!r}, 'w'), flush=True); time.sleep(3600)")
    async with asyncio.TaskGroup() as group:
        task = group.create_task(rollout(agent))
        for _ in range(1500):
            if pid.exists() and pid.read_text():
                break
            await asyncio.sleep(0.02)
        task.cancel()
    assert task.cancelled()
    assert await is_gone(int(pid.read_text()))


async def test_an_endless_reply_is_cut_off() -> None:
    """The command is killed once it has written more than a reply may have."""
    found = await rollout(python("while True: print('a' * 100000)", timeout=60))
    assert found.failure is not None
    assert "Expected at most 16" in found.failure.message


async def test_a_command_need_not_read_its_input() -> None:
    """A program that exits without reading 1 MB of input causes no broken pipe."""
    found = await rollout(python("print('{\"output\": 1}')"), x="x" * 1_000_000)
    assert found.output == 1


async def test_a_value_too_long_for_a_variable_names_the_remedy() -> None:
    """Linux limits one environment variable to 128 KB; a file or the request has no such limit."""
    found = await rollout(python("print(1)", values_in="environment"), prompt="a" * 200_000)
    assert found.failure is not None
    assert "use values_in='file' or 'request'" in found.failure.message


async def test_a_null_byte_is_the_agents_failure() -> None:
    found = await rollout(python("print(1)", "{input}"), x="a\0b")
    assert found.failure is not None
    assert "Expected to start" in found.failure.message


async def test_log_lines_around_the_reply_are_malformed() -> None:
    """A reply is the whole standard output; the error names `reply='text'` for programs that print other lines."""
    found = await rollout(python('print("starting"); print(\'{"output": 1}\')'))
    assert found.failure is not None
    assert "Expected a reply as JSON" in found.failure.message
    assert "reply='text'" in found.failure.message


@pytest.fixture
def skills(tmp_path: Path) -> Path:
    root = tmp_path / "agent"
    (root / "skills").mkdir(parents=True)
    (root / "skills" / "search.md").write_text("Search well.")
    (root / "skills" / "write.md").write_text("Write well.")
    (root / "run.py").write_text(
        "import json, pathlib\n"
        "texts = [path.read_text() for path in sorted(pathlib.Path('skills').glob('*.md'))]\n"
        "pathlib.Path('skills/search.md').write_text('changed by the agent')\n"
        "print(json.dumps({'output': texts}))\n"
    )
    return root


async def test_files_are_parameters_and_each_run_has_a_copy_of_the_folder(skills: Path) -> None:
    """Runs change their own copy only; an accepted value is written to the folder."""
    agent = CommandAgent([sys.executable, "run.py"], files=folder_parameters(skills, "skills/*.md"))
    assert [parameter.name for parameter in agent.parameters()] == ["skills/search.md", "skills/write.md"]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(rollout(agent, **{"skills/search.md": f"s{i}"})) for i in range(4)]
    assert [task.result().output for task in tasks] == [[f"s{i}", "Write well."] for i in range(4)]
    assert (skills / "skills" / "search.md").read_text() == "Search well."
    agent.apply({"skills/search.md": "Search better."})
    assert (skills / "skills" / "search.md").read_text() == "Search better."


def test_links_and_files_outside_are_not_parameters(skills: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.md").write_text("key")
    (skills / "skills" / "link.md").symlink_to(tmp_path / "secret.md")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "other.md").write_text("private")
    (skills / "skills" / "linked").symlink_to(tmp_path / "elsewhere")
    assert folder_parameters(skills, "skills/*.md").files == ("skills/search.md", "skills/write.md")
    assert folder_parameters(skills, "skills/*.md", "skills/*/*.md").files == ("skills/search.md", "skills/write.md")


async def test_ignored_names_are_not_copied(skills: Path) -> None:
    (skills / "node_modules").mkdir()
    (skills / "node_modules" / "large.bin").write_bytes(b"\xff" * 100)
    code = "import json, os; print(json.dumps({'output': sorted(os.listdir('.'))}))"
    files = folder_parameters(skills, "skills/*.md", ignore=["node_modules"])
    agent = CommandAgent([sys.executable, "-c", code], files=files)
    assert (await rollout(agent)).output == ["run.py", "skills"]


def test_invalid_folders_are_refused(skills: Path) -> None:
    (skills / "skills" / "image.png").write_bytes(b"\x89PNG\xff")
    for path, pattern, message in [
        (skills / "missing", "*.md", "Expected a folder, got"),
        (skills, "*.txt", r"Expected files that match '\*.txt' in 'agent', got none"),
        (skills, "skills/*", r"Expected texts in UTF-8, got 'skills/image.png'"),
        (skills, "../*.md", r"Expected patterns of files in 'agent', got '../\*.md', which leaves the folder"),
    ]:
        with pytest.raises(ConfigError, match=message):
            folder_parameters(path, pattern)


def test_invalid_commands_are_refused_at_construction(skills: Path) -> None:
    files = folder_parameters(skills, "skills/*.md")
    for arguments, message in [
        ({"command": "python x.py"}, "Expected a command as a list"),
        ({"command": []}, "Expected a command as a list"),
        ({"command": ["no-such-command-here"]}, "which is not found"),
        ({"command": [sys.executable, "{promt}"]}, "got promt; values are prompt"),
        ({"values": {}}, "Expected values to train, got none"),
        ({"values_in": "stdin"}, "Expected values_in"),
        ({"files": files, "folder": skills}, "got both"),
    ]:
        options: dict[str, Any] = {"command": [sys.executable], "values": {"prompt": "hi"}, **arguments}  # type: ignore[dict-item]
        with pytest.raises(ConfigError, match=message):
            CommandAgent(**options)


async def test_a_recorded_run_replays_without_the_command(tmp_path: Path) -> None:
    """Its reply and its failure are replayed without a process; another value is a miss."""
    code = (
        f"import json, sys; open({str(tmp_path / 'runs')!r}, 'a').write('x'); given = json.load(sys.stdin); "
        "given['input'] == 'bad' and sys.exit('refused'); print(json.dumps({'output': given['values']['prompt']}))"
    )
    with cassette(tmp_path / "tape.yaml", "all"):
        recorded = [await rollout(python(code), x) for x in ("good", "bad")]
    with cassette(tmp_path / "tape.yaml", "none"):
        replayed = [await rollout(python(code), x) for x in ("good", "bad")]
    with pytest.raises(CassetteMissError), cassette(tmp_path / "tape.yaml", "none"):
        await rollout(python(code), "good", prompt="other")
    assert [(one.output, one.failure) for one in replayed] == [(one.output, one.failure) for one in recorded]
    assert (tmp_path / "runs").read_text() == "xx"
