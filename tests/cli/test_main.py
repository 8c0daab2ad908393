"""The command line: quick help, one message for an error, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import pytest

from aggregator import cli
from aggregator.cli.main import commands, guarded, main
from aggregator.errors import CassetteWarning, ConfigError


def chosen(error: BaseException, *, debug: bool = False) -> Namespace:
    """A command that fails."""

    def run(options: Namespace) -> int:
        raise error

    return Namespace(command="demo", debug=debug, run=run)


def test_each_file_is_a_command() -> None:
    """Each file next to main.py is a command."""
    assert "demo" in commands()
    assert "main" not in commands()
    assert cli.__doc__


def test_help_is_quick() -> None:
    """`--help` lists the commands and imports no third-party module."""
    script = (
        "import sys; from aggregator.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: print('exit', end.code)\n"
        "heavy = {'aiohttp', 'msgspec', 'structlog', 'tqdm', 'vcr'}\n"
        "print('loaded', *sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["exit 0", "loaded"]


def test_an_error_of_ours_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    """It is printed to standard error without a traceback, and the exit code is 1."""
    assert guarded(chosen(ConfigError("Expected x, got y"))) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "aggregator demo: Expected x, got y\n")


def test_a_warning_is_one_message(capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    """It names no file and line of the library, and does not end the command."""

    def run(options: Namespace) -> int:
        warnings.simplefilter("always")
        warnings.warn("something was repaired", CassetteWarning, stacklevel=1)
        return 0

    assert guarded(Namespace(command="demo", debug=False, run=run)) == 0
    assert capsys.readouterr().err == "aggregator: warning: something was repaired\n"
    assert not recwarn


def test_an_error_of_the_system_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk is reported like our own errors."""
    assert guarded(chosen(OSError(28, "No space left on device"))) == 1
    assert capsys.readouterr().err == "aggregator demo: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("redirection", "environment", "code"),
    [
        (">&-", {}, 0),
        (">&- 2>&-", {}, 0),
        ("| head -c 1 >/dev/null", {}, 0),
        ("2>&1", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}, 0),
        pytest.param(">/dev/full", {}, 1, marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")),
    ],
)
def test_unwritable_output_gives_no_traceback(
    tmp_path: Path, redirection: str, environment: dict[str, str], code: int
) -> None:
    """A closed or full output, a reader that has ended and a terminal without UTF-8 are handled."""
    command = f"'{sys.executable}' -m aggregator.cli demo {redirection}"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        check=False,
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    """With --debug the exception is raised."""
    with pytest.raises(ConfigError):
        guarded(chosen(ConfigError("x"), debug=True))


def test_ctrl_c_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C exits with 130 without further output."""
    assert guarded(chosen(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [[], ["paint"], ["demo", "--concurrency", "0"], ["demo", "--seed", "x"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It exits with 2 and prints the usage."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: aggregator" in capsys.readouterr().err
