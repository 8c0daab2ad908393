"""Make the environments of tests that need packages of their own, side by side, cached outside the repository.

    python tests/environments.py trace vcrpy-oldest     makes both, and prints the Python of each
    python tests/environments.py --run trace -- -m pytest -q tests/adapters

An environment is kept under `$XDG_CACHE_HOME/aggregated-update` (default `~/.cache`), named after a digest of what it
holds, so a changed requirement makes a new one and an unchanged one installs nothing. It holds the requirements of the
project but not the project, which is imported from the working tree, its pytest plugin included.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aggregated-update"
MOST_AT_ONCE = 3
TEST_TOOLS = ("pytest", "pytest-asyncio", "hypothesis")


SDKS = (
    *("openai", "anthropic", "google-genai", "mistralai", "cohere", "boto3", "ollama", "huggingface_hub"),
    *("requests", "urllib3", "httplib2", "tornado", "httpx-aiohttp", "aiobotocore", "trio"),
)


VCRPY_TESTS = (
    *("aiohttp", "boto3", "cryptography", "httpbin>=0.10.3", "httplib2", "httpx", "httpx-curl-cffi", "httpx2"),
    *("pyreqwest", "pysocks", "pytest-aiohttp", "pytest-httpbin", "requests", "tornado", "urllib3", "setuptools"),
)


class Environment(NamedTuple):
    """The packages of an environment in addition to the requirements of the project.

    `unpinned` names packages whose version constraints.txt does not decide. `constrained=False` leaves all versions to
    pip: for frameworks that need other versions than ours.
    """

    requirements: tuple[str, ...]
    unpinned: tuple[str, ...] = ()
    constrained: bool = True


ENVIRONMENTS = {
    "vcrpy-oldest": Environment(
        (*TEST_TOOLS, "vcrpy==9.0.*", "httpx", "requests", "pytest-recording", "brotli", "zstandard"),
        unpinned=("vcrpy",),
    ),
    "vcrpy-newest": Environment(
        (*TEST_TOOLS, "vcrpy", "httpx", "requests", "pytest-recording", "brotli", "zstandard"), unpinned=("vcrpy",)
    ),
    "trace": Environment((*TEST_TOOLS, "trace-opt>=0.1.3"), constrained=False),
    "data": Environment((*TEST_TOOLS, "pandas", "datasets"), constrained=False),
    "sdks": Environment((*TEST_TOOLS, *SDKS), constrained=False),
    "litellm": Environment((*TEST_TOOLS, "litellm"), constrained=False),
    "agents": Environment((*TEST_TOOLS, "langchain-openai", "openai-agents"), constrained=False),
    "pydantic-ai": Environment((*TEST_TOOLS, "pydantic-ai-slim[openai]==2.68.0"), constrained=False),
    "pydantic-evals": Environment(
        (*TEST_TOOLS, "pydantic-ai-slim[openai]==2.62.0", "pydantic-evals==2.62.0"), constrained=False
    ),
    "openai-agents": Environment((*TEST_TOOLS, "openai-agents==0.24.0"), constrained=False),
    "dspy": Environment((*TEST_TOOLS, "dspy==3.4.1"), constrained=False),
    "gepa": Environment((*TEST_TOOLS, "gepa==0.1.4", "litellm", "cloudpickle"), constrained=False),
    "langchain": Environment(
        (*TEST_TOOLS, "langchain==1.5.2", "langchain-core==1.8.3", "langgraph==1.2.24", "langchain-openai==1.7.4"),
        constrained=False,
    ),
    "mlflow": Environment((*TEST_TOOLS, "mlflow==3.17.2"), constrained=False),
    "crewai": Environment((*TEST_TOOLS, "crewai==1.15.30"), constrained=False),
    "opik": Environment((*TEST_TOOLS, "opik-optimizer==3.2.0"), constrained=False),
    "adk": Environment((*TEST_TOOLS, "google-adk==2.13.0", "litellm"), constrained=False),
    "llama-index": Environment(
        (*TEST_TOOLS, "llama-index-core==0.14.25", "llama-index-llms-openai"), constrained=False
    ),
    "peer-suites": Environment(
        (*TEST_TOOLS, *VCRPY_TESTS, "vcrpy==9.4.2", "pytest-recording==0.14.1", "pytest-mock", "brotli"),
        constrained=False,
    ),
    "clients-oldest": Environment(
        (*TEST_TOOLS, "aiohttp==3.10.*", "urllib3<2", "httpx==0.27.*", "requests", "httplib2", "tornado==6.4.*"),
        constrained=False,
    ),
}


OLDEST = {
    "pydantic-ai": ("pydantic-ai-slim[openai]==2.40.0",),
    "pydantic-evals": ("pydantic-ai-slim[openai]==2.40.0", "pydantic-evals==2.40.0"),
    "openai-agents": ("openai-agents==0.20.0",),
    "dspy": ("dspy==3.4.0",),
    "langchain": ("langchain==1.3.0", "langchain-core==1.4.0", "langgraph==1.2.0", "langchain-openai"),
    "mlflow": ("mlflow==3.12.0",),
    "crewai": ("crewai==1.10.1",),
    "opik": ("opik-optimizer==3.1.0",),
    "adk": ("google-adk==2.0.0", "litellm"),
    "llama-index": ("llama-index-core==0.14.15", "llama-index-llms-openai"),
}
"""The oldest versions of frameworks that their adapters accept, by environment."""

ENVIRONMENTS |= {
    f"{name}-oldest": Environment((*TEST_TOOLS, *pins), constrained=False) for name, pins in OLDEST.items()
}


def constraints(environment: Environment) -> str:
    """Return the environment's version constraints, one a line."""
    if not environment.constrained:
        return ""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    free = tuple(f"{name}==" for name in environment.unpinned)
    return "\n".join(line for line in lines if not line.startswith("#") and not line.startswith(free))


def requirements(environment: Environment) -> list[str]:
    """Return the requirements of the project and of the environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {part.partition("=")[0].partition("[")[0] for part in environment.requirements}
    own = [part for part in project["dependencies"] if part.partition(">")[0] not in named]
    return sorted([*own, *environment.requirements])


def folder(name: str) -> Path:
    """Return where an environment is kept."""
    environment = ENVIRONMENTS[name]
    held = "\n".join([sys.version, *requirements(environment), constraints(environment)])
    return CACHE / f"env-{name}-{sha256(held.encode()).hexdigest()[:12]}"


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Prevent other processes from making the same environment."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(name: str) -> Path:
    """Make an environment if it is missing and return its Python; raises CalledProcessError with pip's output."""
    place = folder(name)
    python, ready = place / "bin" / "python", place / ".ready"
    with locked(place):
        if ready.exists():
            return python
        run([sys.executable, "-m", "venv", "--clear", str(place)])
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
            pins.write(constraints(ENVIRONMENTS[name]))
            pins.flush()
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", pins.name]
            run([*install, *requirements(ENVIRONMENTS[name])])
        ready.touch()
    return python


def run(command: Sequence[str]) -> None:
    """Run a command quietly; its output is shown if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"{' '.join(command[:4])} ... ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )


def main(arguments: Sequence[str]) -> int:
    """Make the named environments, and optionally run Python in one of them."""
    if arguments[:1] == ["--run"] and arguments[2:3] == ["--"]:
        python = make(arguments[1])
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"PYTHONPATH": paths, "PYTEST_PLUGINS": "aggregator.testing.pytest_plugin"}
        return subprocess.run([python, *arguments[3:]], env=os.environ | own, cwd=ROOT, check=False).returncode
    unknown = sorted(set(arguments) - set(ENVIRONMENTS))
    if unknown or not arguments:
        sys.exit(f"Expected names of {', '.join(ENVIRONMENTS)}, got {', '.join(unknown) or 'none'}")
    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        for name, python in zip(arguments, pool.map(make, arguments), strict=True):
            print(f"{name}: {python}")  # noqa: T201 - a script
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
