"""`aggregator <command>`: each command is a file in this folder.

Such a file has `add_parser(subparsers)`, which adds its parser and sets the function to call with
`parser.set_defaults(run=...)`: from the parsed arguments to the exit code. It imports its dependencies inside that
function, so that `aggregator --help` stays quick.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from pkgutil import iter_modules

from aggregator import __version__, cli
from aggregator.errors import AggregatorError

FAILED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C.

    An error of the library ends the command with one message on standard error; `--debug` shows where it was raised.
    """
    _open_streams()
    return guarded(parser().parse_args(argv))


def guarded(options: argparse.Namespace) -> int:
    """Run the chosen command (`options.run`) and turn its exceptions into an exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            code: int = options.run(options)
        sys.stdout.flush()
    except AggregatorError as error:
        if options.debug:
            raise
        from aggregator.text import printable  # not at the top: `--help` loads no third-party module

        sys.stderr.write(f"aggregator {options.command}: {printable(str(error))}\n")
        return FAILED
    except KeyboardInterrupt:
        if options.debug:
            raise
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, for example `| head`
        _drop_output()
        return FAILED
    except OSError as error:  # a full disk, a folder of another user
        if options.debug:
            raise
        sys.stderr.write(f"aggregator {options.command}: {error}\n")
        _drop_output()
        return FAILED
    return code


def _open_streams() -> None:
    """Redirect closed streams to os.devnull and escape what the encoding cannot print."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - for the whole process
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Discard the buffer, because the interpreter would otherwise try to write it again and complain."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:  # standard output is not a file, for example in a test
        return


def _show(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one message, like an error."""
    sys.stderr.write(f"aggregator: warning: {message}\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    top = argparse.ArgumentParser(prog="aggregator", description="Train LLM agents with aggregated updates.")
    top.add_argument("--version", action="version", version=f"aggregator {__version__}")
    top.add_argument("--debug", action="store_true", help="show where an error was raised")
    subparsers = top.add_subparsers(dest="command", metavar="<command>", required=True)
    for name in commands():
        import_module(f"aggregator.cli.{name}").add_parser(subparsers)
    return top


def commands() -> list[str]:
    """Return the names of the commands: the files in this folder."""
    names = (module.name for module in iter_modules(cli.__path__))
    return sorted(name for name in names if name != "main" and not name.startswith("_"))


if __name__ == "__main__":
    sys.exit(main())
