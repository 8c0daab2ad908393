"""Install the real peers once, outside the repository: aimock from npm, llama-server from a PyPI sdist, a tiny model.

Run again it does nothing. Everything is under `$XDG_CACHE_HOME/aggregated-update` (default `~/.cache`), keyed by
version; `python tests/peers/install_peers.py` needs npm, a C++ compiler and about five minutes the first time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

AIMOCK_VERSION = "1.43.0"
LLAMA_VERSION = "0.3.36"  # of llama-cpp-python: its sdist has the whole source of llama.cpp
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aggregated-update"

TOOLS = CACHE / f"peer-tools-{sys.version_info.major}.{sys.version_info.minor}"
AIMOCK = CACHE / f"aimock-{AIMOCK_VERSION}" / "node_modules" / ".bin" / "llmock"
LLAMA_SERVER = CACHE / f"llama-server-{LLAMA_VERSION}" / "llama-server"
TINY_MODEL = CACHE / "tiny-1.gguf"

CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "OFF",  # the binary is cached, and may be run on another machine
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "BUILD_SHARED_LIBS": "OFF",
}


def run(*command: str | Path) -> None:
    """Run a command, showing it first; raises CalledProcessError."""
    print("+", *command, flush=True)  # noqa: T201 - a build of minutes says what it does
    if not shutil.which(command[0]):
        sys.exit(f"{command[0]} is needed to install the peers, and was not found")
    subprocess.run([str(part) for part in command], check=True)


def tools() -> Path:
    """Return a Python of our own with gguf, numpy and, if the machine has none, cmake."""
    python = TOOLS / "bin" / "python"
    stamp = TOOLS / ".installed"
    if not stamp.exists():
        venv.create(TOOLS, with_pip=True, clear=True)
        missing = [] if shutil.which("cmake") else ["cmake"]
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "gguf", "numpy", *missing)
        stamp.touch()
    return python


def install_aimock() -> None:
    """Install the mock server from npm."""
    if AIMOCK.exists():
        return
    folder = AIMOCK.parents[2]
    folder.mkdir(parents=True, exist_ok=True)
    package = f"@copilotkit/aimock@{AIMOCK_VERSION}"
    run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, package)


def install_llama_server() -> None:
    """Build llama-server; the finished binary is moved into place, so that a killed build leaves nothing."""
    if LLAMA_SERVER.exists():
        return
    python = tools()
    cmake = shutil.which("cmake") or str(TOOLS / "bin" / "cmake")
    LLAMA_SERVER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=LLAMA_SERVER.parent) as scratch:
        run(python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--no-binary", "llama-cpp-python", "-d", scratch, f"llama-cpp-python=={LLAMA_VERSION}")  # fmt: skip
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        source = next(Path(scratch).glob("llama_cpp_python-*")) / "vendor" / "llama.cpp"
        build = Path(scratch) / "build"
        run(cmake, "-S", source, "-B", build, *(f"-D{name}={value}" for name, value in CMAKE_OPTIONS.items()))
        jobs = os.environ.get("PEERS_JOBS") or str(os.cpu_count() or 1)
        run(cmake, "--build", build, "--target", "llama-server", f"-j{jobs}")
        (build / "bin" / "llama-server").replace(LLAMA_SERVER)


def make_tiny_model() -> None:
    """Write the tiny random model."""
    if not TINY_MODEL.exists():
        run(tools(), Path(__file__).with_name("make_tiny_gguf.py"), TINY_MODEL)


if __name__ == "__main__":
    CACHE.mkdir(parents=True, exist_ok=True)
    install_aimock()
    install_llama_server()
    make_tiny_model()
