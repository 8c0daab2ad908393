"""What imports cost: milliseconds from a fresh interpreter to each point, and the peers' imports."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.harness import Case, Measured, Options, background, measure
from benchmarks.report import Report, Target

# Only sys and time are loaded before the clock starts: both are built in, so nothing measured comes warmed up.
SCRIPT = """
import sys, time
before, start, cpu = set(sys.modules), time.perf_counter(), time.process_time()
{statements}
stop, cpu_stop, loaded = time.perf_counter(), time.process_time(), set(sys.modules) - before
third = {{name.split(".")[0] for name in loaded}} - set(sys.stdlib_module_names) - {{"aggregator"}}
print('{{"ms": %f, "cpu_ms": %f, "modules": %d, "third_party": %d}}' % (
    (stop - start) * 1e3, (cpu_stop - cpu) * 1e3, len(loaded), len(third)))
"""

AGENT = """
from aggregator import Module, ParameterNode
class Router(Module):
    def __init__(self):
        self.instruction = ParameterNode("Say the team.", description="what the model is told")
        self.examples = ParameterNode(3, description="how many examples to show")
        self.teams = ParameterNode(["billing"], description="the teams there are")
    def forward(self, x):
        return x
agent = Router()
"""

LOAD = AGENT + "agent.load({path!r})\nassert agent.examples.data == 5"

CALL = """
from aggregator import LLM
llm = LLM("openai/benchmark", base_url={url!r}, api_key="none")
assert llm(messages=[{{"role": "user", "content": "ready?"}}]).text == "ready"
"""

OPENAI_CALL = """
from openai import OpenAI
client = OpenAI(base_url={url!r}, api_key="none")
reply = client.chat.completions.create(model="benchmark", messages=[{{"role": "user", "content": "ready?"}}])
assert reply.choices[0].message.content == "ready"
"""


AGENTS = "from aggregator import Module, ParameterNode"
WITH_CLIENT = "from aggregator import Module, ParameterNode, LLM"


def case(name: str, statements: str, *needs: str) -> Case:
    return Case(name, ["-c", SCRIPT.format(statements=statements)], needs)


def save_trained(path: Path) -> None:
    """Write a trained agent's artefact the way a user does, with values that differ from the defaults."""
    space: dict[str, object] = {}
    exec(AGENT, space)  # the very source that the measured process runs
    agent = space["agent"]
    agent.examples.data = 5  # type: ignore[attr-defined]
    agent.instruction.data = "Name the team that owns the product in the ticket.\n" * 20  # type: ignore[attr-defined]
    agent.save(path)  # type: ignore[attr-defined]


def run(options: Options) -> Report:
    with tempfile.TemporaryDirectory() as folder, background(["-m", "benchmarks.server"]) as url:
        artefact = Path(folder) / "router.json"
        save_trained(artefact)
        measured = measure(
            [
                case("bare Python", "pass"),
                case("import aggregator", "import aggregator"),
                case(AGENTS, AGENTS),
                case(WITH_CLIENT, WITH_CLIENT),
                case("load a trained agent's parameters", LOAD.format(path=str(artefact))),
                case("first LLM call", CALL.format(url=url)),
                *(case(f"import {peer}", f"import {peer}", peer) for peer in ("gepa", "dspy", "litellm", "openai")),
                case("first call of openai's client", OPENAI_CALL.format(url=url), "openai"),
            ],
            options,
            repetitions=11,
            warm_up=True,
        )
    return Report(
        rows=measured.rows(),
        targets=targets(measured),
        missing=measured.missing,
        versions=measured.versions,
        notes=[
            "each process is fresh; the clock starts in the running interpreter, so its own start is in no row",
            "third_party counts top-level packages; aggregator is not counted",
        ],
    )


def targets(measured: Measured) -> list[Target]:
    light, load = "import aggregator", "load a trained agent's parameters"
    return [
        Target("import aggregator", measured.median(light, "ms"), 5.0, "ms"),
        Target("third-party modules at import aggregator", measured.median(light, "third_party"), 0),
        Target("Module and ParameterNode, of import gepa", measured.ratio(AGENTS, "import gepa", "ms"), 0.5, "x"),
        Target("the same with LLM, of import gepa", measured.ratio(WITH_CLIENT, "import gepa", "ms"), 1.0, "x"),
        Target("loading parameters, of import gepa", measured.ratio(load, "import gepa", "ms"), 0.5, "x"),
    ]
