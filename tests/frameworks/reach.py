"""Measure what training reaches in each framework, run its tests, and print the table of `docs/frameworks.md`.

    python tests/frameworks/reach.py                    every framework; `--write` puts the table into the document
    python tests/frameworks/reach.py --smoke            those that `.ci/run` tries
    python tests/frameworks/reach.py pydantic-ai        the named ones
    python tests/frameworks/reach.py --oldest           with the oldest version of each framework that is accepted

Each case is an example of `examples/frameworks/`, run as it is in the environment of its framework, against the
simulated model on loopback: `OPENAI_BASE_URL` leads there. An example leaves `agent`, `tickets` and `result` behind.
The tests are `tests/adapters/test_<file>.py` and `tests/hosts/test_<file>_host.py`.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "frameworks"
DOCUMENT = ROOT / "docs" / "frameworks.md"
MARKS = ("<!-- frameworks -->", "<!-- end of frameworks -->")
COLUMNS = (
    *("framework", "version", "trained in the example", "isolation", "calls counted", "replay", "score"),
    *("lines of glue", "concepts"),
)
CANDIDATES = 8
MOST_LINES = 15
MOST_CONCEPTS = 6
SECONDS = 300
ROW = "| "


class Case(NamedTuple):
    """One framework.

    `file` names the example `examples/frameworks/train_<file>.py` and the tests, `probe` the parameter whose text the
    model follows, `distribution` the package whose version is shown ("" for none), `environment` one of
    `tests/environments.py` ("" for this one).
    """

    name: str
    file: str
    probe: str
    distribution: str = ""
    environment: str = ""
    is_smoke: bool = False

    @property
    def example(self) -> Path:
        """The example; not named like its framework, which a script of that name would hide."""
        return EXAMPLES / f"train_{self.file}.py"


CASES = (
    Case("plain function", "plain_function", "instruction", is_smoke=True),
    Case("command", "command", "instruction"),
    Case("HTTP", "http", "instruction"),
    Case("pydantic-ai", "pydantic_ai", "instructions", "pydantic-ai-slim", "pydantic-ai", is_smoke=True),
    Case("pydantic-evals", "pydantic_evals", "instructions", "pydantic-evals", "pydantic-evals"),
    Case("OpenAI Agents SDK", "openai_agents", "triage.instructions", "openai-agents", "openai-agents", is_smoke=True),
    Case("DSPy", "dspy", "instructions", "dspy", "dspy", is_smoke=True),
    Case("GEPA adapter", "gepa", "system_prompt", "gepa", "gepa", is_smoke=True),
    Case("LangChain", "langchain", "system_prompt", "langchain", "langchain"),
    Case("LangGraph", "langgraph", "prompt.system", "langgraph", "langchain"),
    Case("Google ADK", "adk", "router.instruction", "google-adk", "adk"),
    Case("Trace", "trace", "instruction", "trace-opt", "trace"),
    Case("LlamaIndex", "llama_index", "system_prompt", "llama-index-core", "llama-index"),
    Case("CrewAI", "crewai", "router.goal", "crewai", "crewai"),
    Case("MLflow", "mlflow", "route", "mlflow", "mlflow"),
)

HOSTS = (Case("Opik", "opik", "", "opik-optimizer", "opik"),)
"""Libraries that our algorithm runs inside only: they have tests, and no row."""


class Glue(NamedTuple):
    """What an example needs of this library: statements by lines, and names imported."""

    lines: int
    concepts: int


def glue_of(source: str) -> Glue:
    """Count the lines of an example that are there because of this library, and the names it imports from it.

    A line counts if its statement names what comes from the library, or what such a statement assigned. Of a function
    that is decorated, or that holds such a line, those lines count.

    >>> glue_of("import dspy\\nfrom aggregator import trainable\\nx = dspy.Predict('a -> b')\\nagent = trainable(x)\\n")
    Glue(lines=2, concepts=1)
    """
    known: set[str] = set()
    lines: set[int] = set()
    imported: set[str] = set()

    def visit(statements: Sequence[ast.stmt]) -> None:
        for node in statements:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "aggregator":
                imported.update(alias.name for alias in node.names)
                known.update(alias.asname or alias.name for alias in node.names)
                lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.With | ast.AsyncWith):
                heads = [*getattr(node, "decorator_list", ()), *getattr(node, "items", ())]
                for head in heads:
                    if names_in(head) & known:
                        lines.update(line for part in ast.walk(head) for line in lines_of(part))
                visit(node.body)
            elif names_in(node) & known:
                lines.update(lines_of(node))
                targets = node.targets if isinstance(node, ast.Assign) else ()
                known.update(name for target in targets for name in names_in(target))

    visit(ast.parse(source).body)
    return Glue(len(lines), len(imported))


def names_in(node: ast.AST) -> set[str]:
    """Return the variables that a piece of code names."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def lines_of(node: ast.AST) -> range:
    """Return the lines on which a piece of code is."""
    first = getattr(node, "lineno", 0)
    return range(first, (getattr(node, "end_lineno", None) or first) + 1) if first else range(0)


@contextmanager
def surroundings(url: str) -> Iterator[None]:
    """Run in an empty folder, with keys and addresses that lead every client to the simulated model."""
    before, home = dict(os.environ), Path.cwd()
    given = {
        "OPENAI_BASE_URL": url,
        "OPENAI_API_BASE": url,
        "OPENAI_API_KEY": "sk-simulated",
        "OTEL_SDK_DISABLED": "true",
    }
    given |= {
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
    }
    given |= {"CREWAI_TRACING_ENABLED": "false", "NO_PROXY": "127.0.0.1"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(given)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(home)
            os.environ.clear()
            os.environ.update(before)


def measure(case: Case) -> list[str]:
    """Return the cells of a case's row. Raises the example's exception."""
    from simulated_server import SimulatedServer

    import aggregator
    from aggregator import portal
    from aggregator.errors import AggregatorError

    path = case.example
    with SimulatedServer() as server, surroundings(server.url):
        tape = Path.cwd() / "tape.yaml"
        with aggregator.cassette(tape, "all", clients="all"):
            recorded = runpy.run_path(str(path))
        asked = server.calls["agent"]
        isolation = portal.call(isolate, recorded["agent"], recorded["tickets"], case.probe)
        calls = sum(server.calls.values())
        Path("runs").rename("runs-recorded")
        try:
            with aggregator.cassette(tape, "none", clients="all"):
                replayed = runpy.run_path(str(path))
            is_exact = told(replayed["result"]) == told(recorded["result"]) and sum(server.calls.values()) == calls
            replay = "exact" if is_exact else "**differs**"
        except AggregatorError as error:
            replay = f"**{type(error).__name__}**"
    result, agent = recorded["result"], recorded["agent"]
    counted = result.usage["agent"].calls if "agent" in result.usage else 0
    glue = glue_of(path.read_text(encoding="utf-8"))
    return [
        case.name,
        metadata.version(case.distribution) if case.distribution else "-",
        ", ".join(f"`{parameter.name}`" for parameter in agent.parameters() if parameter.trainable),
        isolation,
        "all" if counted == asked else f"**{counted} of {asked}**",
        replay,
        f"{result.validations[0].score:.2f} to {max(one.score for one in result.validations):.2f}",
        str(glue.lines) if glue.lines <= MOST_LINES else f"**{glue.lines}**",
        str(glue.concepts) if glue.concepts <= MOST_CONCEPTS else f"**{glue.concepts}**",
    ]


async def isolate(agent: Any, data: Sequence[Any], probe: str) -> str:
    """Run several candidates at once, each with a text that names its own answer, and count the correct answers."""
    from aggregator.text import as_text
    from aggregator.training.step import Step

    step = Step.of(agent, guide=lambda _x, _output, _info: 0.0, samples=data)
    async with asyncio.TaskGroup() as group:
        made = [
            group.create_task(step.evaluate({probe: f"If no rule applies, answer candidate{i}."}, step.samples))
            for i in range(CANDIDATES)
        ]
    right = [
        sum(f"candidate{i}" in as_text(rollout.output) for rollout in task.result()) for i, task in enumerate(made)
    ]
    total = CANDIDATES * len(step.samples)
    isolation = getattr(agent, "isolation", "overlay")
    return (
        f"{isolation}, {sum(right)} of {total}" if sum(right) == total else f"{isolation}, **{sum(right)} of {total}**"
    )


def told(result: Any) -> bytes:
    """Return everything that a result holds, as bytes."""
    import msgspec

    return msgspec.json.encode(result, enc_hook=repr, order="deterministic")


def run(case: Case) -> tuple[str, str]:
    """Return the row of a case, measured in its environment, and its errors, or ""."""
    if case.environment:
        maker = [sys.executable, str(ROOT / "tests" / "environments.py"), case.environment]
        made = subprocess.run(maker, capture_output=True, text=True, check=False)
        if made.returncode:
            wrong = (made.stdout + made.stderr).strip()
            return skipped(case, f"cannot be installed: {wrong[-100:]}"), f"{case.name}: {wrong[-3000:]}"
    try:
        done = run_in(case, [str(Path(__file__)), "--here", case.name])
    except subprocess.TimeoutExpired:
        return skipped(case, f"not finished after {SECONDS} seconds"), f"{case.name}: not finished"
    if row := re.search(r"^\| .*", done.stdout, re.MULTILINE):
        return row[0], f"{case.name}: a bold cell is not as it should be" if "**" in row[0] else ""
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    return skipped(case, last), f"{case.name}: {(done.stdout + done.stderr)[-3000:]}"


def run_in(case: Case, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run Python in a case's environment. Raises TimeoutExpired."""
    script = [str(ROOT / "tests" / "environments.py"), "--run", case.environment, "--"] if case.environment else []
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *script, *arguments],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def run_tests(case: Case) -> str:
    """Run the tests of a framework's adapter and hosts, and the examples in docstrings, in its environment.

    Return the failures, or "".
    """
    patterns = (f"adapters/test_{case.file}.py", f"hosts/test_{case.file}*_host.py")
    tests = [path for pattern in patterns for path in sorted((ROOT / "tests").glob(pattern))]
    if not (tests and case.environment):
        return ""
    found = [str(path) for path in (*tests, ROOT / "tests" / "test_docstrings.py")]
    try:
        done = run_in(case, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", *found])
    except subprocess.TimeoutExpired:
        return f"{case.name}: its tests did not finish in {SECONDS} seconds"
    print(f"{case.name}: {done.stdout.rstrip().rpartition(chr(10))[2]}", flush=True)  # noqa: T201 - a script
    return f"{case.name}: {(done.stdout + done.stderr)[-3000:]}" if done.returncode else ""


def skipped(case: Case, reason: str) -> str:
    """Return the row of a case that could not be measured."""
    shown = " ".join(reason.replace("|", "/").split())[:150]
    return " | ".join([f"{ROW}{case.name}", "-", f"skipped: {shown}", *([""] * (len(COLUMNS) - 3))]) + " |"


def rows_of(document: str) -> dict[str, str]:
    """Return the rows of a document's table by the framework's name."""
    table = document.partition(MARKS[0])[2].partition(MARKS[1])[0]
    return {line.split(" | ")[0].removeprefix(ROW): line for line in table.strip().splitlines()[2:]}


def main(arguments: Sequence[str]) -> int:
    """Measure the chosen cases, print their rows, and write the table on request."""
    reader = argparse.ArgumentParser()
    reader.add_argument("names", nargs="*")
    for flag in ("--smoke", "--write", "--oldest", "--here"):
        reader.add_argument(flag, action="store_true")
    given = reader.parse_args(arguments)
    chosen = [case for case in CASES if case.name in given.names or (not given.names and case.is_smoke >= given.smoke)]
    if unknown := sorted(set(given.names) - {case.name for case in CASES}):
        sys.exit(f"Expected names of {', '.join(case.name for case in CASES)}, got {', '.join(unknown)}")
    if given.here:
        print(f"{ROW}{' | '.join(measure(chosen[0]))} |")  # noqa: T201 - a script
        return 0
    hosts: Sequence[Case] = () if given.names or given.smoke else HOSTS
    if given.oldest and given.write:
        sys.exit("Expected --oldest without --write: the table shows the newest versions")
    if given.oldest:
        chosen, hosts = with_oldest(chosen), with_oldest(hosts)
    found = {}
    wrong = []
    for case in chosen:
        found[case.name], problem = run(case)
        print(found[case.name], flush=True)  # noqa: T201 - a script
        wrong += [problem for problem in (problem, run_tests(case)) if problem]
    for case in hosts:
        wrong += filter(None, [run_tests(case)])
    if given.write:
        write(found)
    print("\n".join(wrong))  # noqa: T201 - a script
    failed = len({problem.partition(":")[0] for problem in wrong})
    print(f"{len(chosen) - failed} passed, {failed} failed")  # noqa: T201 - a script
    return 1 if wrong else 0


def with_oldest(cases: Sequence[Case]) -> list[Case]:
    """Return the cases in environments with the oldest accepted versions; those without one are left out."""
    oldest = runpy.run_path(str(ROOT / "tests" / "environments.py"))["OLDEST"]
    return [case._replace(environment=f"{case.environment}-oldest") for case in cases if case.environment in oldest]


def write(found: Mapping[str, str]) -> None:
    """Write rows to the document's table; rows of frameworks that were not measured are kept."""
    document = DOCUMENT.read_text(encoding="utf-8")
    rows = {**rows_of(document), **found}
    table = [f"{ROW}{' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    table += [rows[case.name] for case in CASES if case.name in rows]
    before, _, rest = document.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    text = "\n".join(table)
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
