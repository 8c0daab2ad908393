"""Agents that are commands: a program in any language, or a coding agent with its folder of skills.

The command is started for each run, without a shell. It reads the request of `external.py` on standard input and writes
the reply to standard output. Texts of files are parameters too: each run then has a copy of the folder with the
candidate's values, and the command runs there and may change any file.

    skills = folder_parameters("my-agent", "skills/**/*.md")
    agent = CommandAgent(["node", "agent.js"], files=skills)
    agent = CommandAgent(["coder", "--print", "{input}"], files=skills, reply="text")
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from msgspec import Struct

from aggregator.adapters.external import (
    MAX_REPLY,
    ExternalAgent,
    ExternalError,
    ReplyForm,
    Turn,
    as_parameters,
    check_size,
    encode_request,
    end_of,
)
from aggregator.adapters.frameworks import HostParameter
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError
from aggregator.files import write_atomically
from aggregator.guides.calling import Call
from aggregator.records import HTTPReply, HTTPRequest
from aggregator.text import as_text, show_size

# ---- a folder with files that are parameters

MAX_FOLDER = 256 << 20
"""The maximum size in bytes of a folder that is copied for each run."""


class Folder(Struct, frozen=True):
    """A folder with files that are parameters: `files` are paths in it."""

    path: Path
    files: tuple[str, ...]
    ignored: tuple[str, ...] = ()


def folder_parameters(path: str | os.PathLike[str], *patterns: str, ignore: Sequence[str] = ()) -> Folder:
    """Return a folder in which the files that match a pattern are parameters, named by their path: `skills/search.md`.

    Patterns are those of `Path.glob`; links, and files behind links, are left out. Names that match one of `ignore`,
    such as `node_modules` or `*.log`, are not copied for a run. Accepted values are written to the folder's own files.
    Raises ConfigError for a folder that is missing, without a matching file, or too large to be copied for each run,
    and for a pattern that leaves the folder.
    """
    root = Path(path).resolve()
    if not root.is_dir():
        raise ConfigError(f"Expected a folder, got {os.fspath(path)!r}")
    if outside := [pattern for pattern in patterns if ".." in Path(pattern).parts]:
        raise ConfigError(f"Expected patterns of files in {root.name!r}, got {outside[0]!r}, which leaves the folder")
    found = {one for pattern in patterns or ("*",) for one in root.glob(pattern)}
    files = sorted(one.relative_to(root).as_posix() for one in found if one.is_file() and one.resolve() == one)
    if not files:
        raise ConfigError(f"Expected files that match {', '.join(map(repr, patterns))} in {root.name!r}, got none")
    for name in files:
        try:
            (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"Expected texts in UTF-8, got {name!r}; choose files by other patterns") from None
    leave = shutil.ignore_patterns(*ignore)
    size = sum(Path(at, name).lstat().st_size for at, names in _walk(root, leave) for name in names)
    if size > MAX_FOLDER:
        raise ConfigError(
            f"Expected a folder of at most {show_size(MAX_FOLDER)}, which is copied for each run, got "
            f"{show_size(size)} in {root.name!r}; leave parts out with ignore="
        )
    return Folder(root, tuple(files), tuple(ignore))


def _walk(root: Path, leave: Any) -> Iterator[tuple[str, list[str]]]:
    for at, folders, names in os.walk(root):
        left_out = leave(at, [*folders, *names])
        folders[:] = [name for name in folders if name not in left_out]
        yield at, [name for name in names if name not in left_out]


def copy_with(folder: Folder, texts: Mapping[str, str], target: Path) -> None:
    """Copy a folder, with these texts in its files."""
    shutil.copytree(folder.path, target, symlinks=True, ignore=shutil.ignore_patterns(*folder.ignored))
    for name, text in texts.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")


def text_of(path: Path, name: str) -> ParameterNode[Any]:
    """Return a file as a parameter: its text is the stored value."""
    write = partial(_write_text, path)
    return HostParameter(partial(path.read_text, encoding="utf-8"), write, name=name, description=f"the file {name}")


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, text.encode(errors="backslashreplace"), private=False)


# ---- a command

ValuesIn = Literal["request", "environment", "file"]
"""How a command gets its values: in the request, as environment variables of their names, or in a JSON file."""

VALUES_FILE = "AGGREGATOR_VALUES"
"""The environment variable that names the file of values."""
ADDRESS = "http://command.invalid/"
"""The prefix of the lineage of a command's runs; its name follows."""
_FAILED = 500
_MAX_VARIABLE = 128 << 10  # of one argument or variable, on Linux
_PLACE = re.compile(r"\{(\w[\w.]*)\}")
_PATIENCE = 5.0


class CommandAgent(ExternalAgent):
    """A command as an agent: started for each run, without a shell, and killed after `timeout` seconds.

    `{input}` and `{name of a value}` in an argument are replaced; a command with `{input}` gets no standard input.
    `values_in` is how it gets values. `environment` is added to this process's. `folder` is its working folder, by
    default the current one, or the run's copy of `files`. A non-zero exit code is the agent's failure, with the end of
    standard error; so are an unreadable reply, one of more than 16 MiB, and a timeout. Processes that the command
    started end with it.

    Raises ConfigError for a command that is not found or not a list, and without a trainable value.
    """

    def __init__(
        self,
        command: Sequence[str],
        values: Mapping[str, Any] = MappingProxyType({}),
        *,
        files: Folder | None = None,
        values_in: ValuesIn = "request",
        environment: Mapping[str, str] = MappingProxyType({}),
        folder: str | os.PathLike[str] | None = None,
        reply: ReplyForm = "json",
        timeout: float = 120.0,
    ) -> None:
        if isinstance(command, str) or not command or not all(isinstance(one, str) for one in command):
            raise ConfigError(f"Expected a command as a list, as in ['node', 'agent.js'], got {command!r}")
        if shutil.which(command[0]) is None and not (files is not None and (files.path / command[0]).is_file()):
            raise ConfigError(f"Expected a command that can be started, got {command[0]!r}, which is not found")
        if values_in not in get_args(ValuesIn):
            raise ConfigError(f"Expected values_in 'request', 'environment' or 'file', got {values_in!r}")
        if files is not None and folder is not None:
            raise ConfigError("Expected folder= or files=, got both; a command with files= runs in a copy of them")
        self.files = files
        self.values_in: ValuesIn = values_in
        self.environment = dict(environment)
        self.folder = folder
        self._values = as_parameters(values)
        self._texts = [] if files is None else [text_of(files.path / name, name) for name in files.files]
        remedy = "give values= or files=, as in CommandAgent(['node', 'agent.js'], {'prompt': 'Answer briefly.'})"
        parameters = [*self._values, *self._texts]
        super().__init__(list(command), parameters, reply=reply, timeout=timeout, remedy=remedy)
        places = {name for part in command for name in _PLACE.findall(part)}
        if unknown := sorted(places - {"input"} - {one.name for one in self._values}):
            raise ConfigError(
                f"Expected {{input}} or the name of a value in the command, got {', '.join(unknown)}; values are "
                f"{', '.join(one.name for one in self._values) or '(none)'}"
            )

    async def ask(self, request: Mapping[str, Any], call: Call) -> bytes:
        """Run the command once, in its own folder if files are trained."""
        values = {one.name: one.data for one in self._values}
        texts = {one.name: one.data for one in self._texts}
        asked = {"command": self.program, "input": request["input"], "values": values, "files": texts}
        headers = {"content-type": "application/json"}
        turn = Turn(
            HTTPRequest(url=f"{ADDRESS}{Path(self.program[0]).name}", body=encode_request(asked), headers=headers)
        )

        async def run() -> HTTPReply:
            with tempfile.TemporaryDirectory(prefix="aggregator-", ignore_cleanup_errors=True) as temporary:
                try:
                    written = await self._run(request["input"], values, texts, Path(temporary), call)
                except ExternalError as error:
                    return HTTPReply(status=_FAILED, body=str(error).encode(errors="replace"), headers={})
            return HTTPReply(status=200, body=written, headers={})

        reply = await turn.reply_to(run)
        if reply.status == _FAILED:
            raise ExternalError(reply.body.decode())
        return reply.body

    async def _run(
        self, x: Any, values: Mapping[str, Any], texts: Mapping[str, str], temporary: Path, call: Call
    ) -> bytes:
        here = self.folder
        if self.files is not None:
            here = temporary / "folder"
            await call(copy_with, self.files, texts, here)
        body = encode_request({"input": x} | ({"values": values} if self.values_in == "request" else {}))
        is_fed = not any("{input}" in part for part in self.program)
        given = {**values, "input": x}  # each place is filled once: what a value holds is not read again
        try:
            process = await asyncio.create_subprocess_exec(
                *[_PLACE.sub(lambda found: as_text(given[found[1]]), part) for part in self.program],
                stdin=asyncio.subprocess.PIPE if is_fed else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=here,
                env={**os.environ, **self.environment, **self._environment(values, temporary)},
                start_new_session=True,  # so that all its processes can be killed together
            )
        except (OSError, ValueError) as error:  # a null byte, arguments that are too long, no permission
            raise ExternalError(f"Expected to start {self.program[0]!r}, got {error}") from None
        return await self._finish(process, body if is_fed else b"")

    def _environment(self, values: Mapping[str, Any], temporary: Path) -> dict[str, str]:
        if self.values_in == "file":
            path = temporary / "values.json"
            path.write_bytes(encode_request({"input": None, "values": values}))
            return {VALUES_FILE: str(path)}
        return {} if self.values_in == "request" else {name: _variable(name, value) for name, value in values.items()}

    async def _finish(self, process: asyncio.subprocess.Process, body: bytes) -> bytes:
        """Return the output of the process."""
        try:
            async with asyncio.timeout(self.timeout), asyncio.TaskGroup() as group:
                group.create_task(_feed(process, body))
                output = group.create_task(_read(process, process.stdout, MAX_REPLY))
                errors = group.create_task(_read(process, process.stderr, MAX_REPLY))
                code = await process.wait()
                _kill(process)  # processes left behind may hold its output open
        except TimeoutError:
            raise ExternalError(f"Expected a reply within {self.timeout:g} s, got none; raise timeout=") from None
        finally:
            await _end(process)
        for written in (output.result(), errors.result()):
            check_size(written)
        if code != 0:
            ended = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
            shown = end_of(errors.result()) or end_of(output.result()) or "(it wrote nothing)"
            raise ExternalError(f"Expected exit code 0, got {ended}: {shown}")
        return output.result()


async def _feed(process: asyncio.subprocess.Process, body: bytes) -> None:
    if process.stdin is not None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it need not read its input
            process.stdin.write(body)
            await process.stdin.drain()
        process.stdin.close()


async def _read(process: asyncio.subprocess.Process, stream: asyncio.StreamReader | None, limit: int) -> bytes:
    """Read to the end; a process that writes more than the limit is killed, and its output so far returned."""
    found = bytearray()
    while stream is not None and (piece := await stream.read(1 << 16)):
        found += piece
        if len(found) > limit:
            _kill(process)
            break
    return bytes(found)


def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill a process and all its children, and wait until it is gone."""
    _kill(process)
    with suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            await process.wait()
    pipes: Any = process
    pipes._transport.close()  # noqa: SLF001 - else those that were not read to their end stay open
    await asyncio.sleep(0)


def _variable(name: str, value: Any) -> str:
    text = as_text(value)
    if len(text.encode(errors="backslashreplace")) >= _MAX_VARIABLE:
        raise ExternalError(
            f"Expected at most {show_size(_MAX_VARIABLE)} in an environment variable, got more for {name!r}; use "
            "values_in='file' or 'request'"
        )
    return text
