"""The project's rules as tests: layering, cycles, size, public names, light import."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import aggregator
from aggregator import errors

PACKAGE = Path(aggregator.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
STUBS = sorted(PACKAGE.rglob("*.pyi"))  # in addition to the modules that only re-export

LAYERS = [  # from the top; a room may import the rows below its own, and its own row without cycles
    {"cli"},
    {"demo", "suites", "testing"},
    {"reports", "hosts", "simulation"},
    {"training"},
    {"adapters", "executors", "guides", "observing"},
    {"llm"},
    {"cassettes"},
    {"agents"},
    {"sandbox"},
    {"protocols"},
    {"records"},
    {"views"},
    {"errors", "text", "files", "checks", "patching"},
]
ROOMS = {name for names in LAYERS for name in names}
FACES = {
    "gates",
    "optimizers",
    "providers",
    "rules",
    "schedules",
    "searches",
    "stops",
}  # root files that only re-export, each name on its first use
ANYWHERE = {"portal", "errors", "text", "files", "checks", "patching"}
BY_TEXT = {"import_module", "__import__", "find_spec", "resolve_name", "spec_from_file_location", "run_module"}
COMPUTED = {"sandbox/worker.py": "the modules that an operation's author imported, in another process"}
ONLY_IN = {
    "aiohttp": {"llm/transport.py", "cassettes/patches/aiohttp.py", "simulation/", "testing/"},
    "vcr": {"testing/"},
    "opto": set(),
}
NOT_IN_PRODUCTION = {
    *("asyncio", "concurrent.futures", "threading", "multiprocessing", "subprocess", "selectors"),
    *("ssl", "socket", "http", "http.client", "urllib.request", "email", "hashlib", "secrets"),
    *("importlib.metadata", "importlib.resources", "logging", "pathlib", "tempfile", "shutil", "json", "html"),
}
"""Modules that an agent which only loads its parameters must not import.

(`inspect` comes with msgspec's typing_extensions.)
"""
MAX_LINES = 600
MAX_FUNCTION_LINES = 60
MIN_LINES = 80
SMALL = {  # files below MIN_LINES that are neither a face nor Protocols only, each with its reason; no new ones
    "cli/demo.py": "one command",
}
SHORT_HELPERS = 0.046
"""The share of functions that are private, below 5 lines and used once: a ceiling that only goes down."""
MOST_CALLS, MOST_MOVES = 616, 288
"""Calls of the package's functions, and changes of file between them, in a training of one step: ceilings as above."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "aggregator" and len(parts) > 1 else ""


def imports_of(path: Path) -> set[str]:
    """Yield every module that a file imports, at any depth, also by string."""
    return imports_in(path.read_text(encoding="utf-8"))


def imports_in(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and name_called(node) in BY_TEXT:
            found.add(text_of(node.args[0]) if node.args else "?")
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module.startswith("aggregator"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name_called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def text_of(node: ast.expr) -> str:
    """Return the text that an expression certainly begins with, or "?" if it is unknown before a run."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
        return str(node.values[0].value) + "*"
    return "?"


def layer(name: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if name in names), -1)


def may_import(own: str) -> set[str]:
    """Return the rooms that a room may import: the rows below its own, its own row, and what all may use."""
    if own in ANYWHERE:
        return {"errors", "records", own, "patching"}  # records: for types only
    if own == "views":
        return {"text", "records", own}  # as above
    return {name for names in LAYERS[layer(own) :] for name in names} | ANYWHERE


def test_imports_point_down() -> None:
    """A room imports the rooms below it, never above; each file of the package belongs to a room."""
    rooms = {room(module_name(path)) for path in FILES} - {"", *FACES}
    strangers = sorted(own for own in rooms - ANYWHERE if layer(own) < 0)
    assert strangers == [], "no rooms of the house; add them to LAYERS and to docs/design.md"
    upward = []
    for path in FILES:
        own = room(module_name(path))
        if own in FACES:
            continue
        found = {m for m in imports_of(path) if own and m.startswith("aggregator.") and room(m) not in may_import(own)}
        found -= {"aggregator.__version__", "aggregator._face"}
        upward += [f"{path.relative_to(PACKAGE)} imports {module}" for module in sorted(found)]
    assert upward == []


def test_imports_by_string_can_be_read() -> None:
    """A module imported under a name that is only known in a run would escape the rule above."""
    computed = {str(path.relative_to(PACKAGE)) for path in FILES if "?" in imports_of(path)}
    assert computed - {"__init__.py", *COMPUTED} == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('import_module("aggregator.observing.observer")', "aggregator.observing.observer"),
        ('importlib.import_module("aggregator.cli")', "aggregator.cli"),
        ('__import__("aggregator.training.loop")', "aggregator.training.loop"),
        ('import_module(f"aggregator.cli.{name}")', "aggregator.cli.*"),
        ("import_module(WHERE)", "?"),
        ("def late():\n    from aggregator.training import loop", "aggregator.training.loop"),
    ],
)
def test_an_import_by_string_is_found(source: str, found: str) -> None:
    """The rule finds the names in import statements and in calls."""
    assert found in imports_in(source)


def test_no_import_cycles() -> None:
    """No module reaches itself through module-level imports."""
    modules = {module_name(path): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [
            node
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aggregator.")
        ]
        targets = {node.module or "" for node in top} | {f"{node.module}.{a.name}" for node in top for a in node.names}
        graph[name] = {target for target in targets if target in modules}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_files_and_functions_are_short() -> None:
    """A file can be read in one sitting, a function fits on one screen."""
    long = []
    for path in FILES:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE)
        if text.count("\n") > MAX_LINES:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    assert long == []


def is_face(path: Path) -> bool:
    """Return True for an `__init__`, and for a file of imports and Protocols only."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return path.name == "__init__.py" or all(
        isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.Assign | ast.AnnAssign)
        or getattr(node, "name", "") == "__getattr__"
        or (isinstance(node, ast.ClassDef) and "Protocol" in {getattr(base, "id", "") for base in node.bases})
        for node in body
    )


def test_no_file_is_a_fragment() -> None:
    """A file below 80 lines is a face, Protocols, or on the list with a reason."""
    small = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if path.read_text(encoding="utf-8").count("\n") < MIN_LINES and not is_face(path)
    }
    assert small == set(SMALL)


def test_short_functions_with_one_caller_become_fewer() -> None:
    """A private function of a few lines that is used once should be inlined."""
    functions, helpers = 0, []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        uses = Counter(node.id for node in nodes if isinstance(node, ast.Name))
        uses += Counter(node.attr for node in nodes if isinstance(node, ast.Attribute))
        made = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        functions += len(made)
        helpers += [
            f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"
            for node in made
            if node.name.startswith("_")
            and not node.name.startswith("__")
            and not node.decorator_list
            and uses[node.name] == 1
            and (node.body[-1].end_lineno or 0) - node.body[bool(ast.get_docstring(node))].lineno < 4
        ]
    assert len(helpers) / functions <= SHORT_HELPERS, "\n".join(helpers)


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_guarded_packages_stay_in_their_room(package: str) -> None:
    """aiohttp, vcr and opto are imported in one room each."""
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name == package or name.startswith(package + ".") for name in imports_of(path))
    }
    allowed = ONLY_IN[package]
    assert {
        user for user in users if not any(user == a or (a.endswith("/") and user.startswith(a)) for a in allowed)
    } == set()


@pytest.mark.parametrize("name", [module_name(path) for path in STUBS])
def test_public_names(name: str) -> None:
    """`__all__` equals the face's table, every name loads from its home, and no other one does."""
    face = importlib.import_module(name)
    homes = {name: home for home, names in vars(face)["_HOMES"].items() for name in names}
    assert set(vars(face)["__all__"]) - {"__version__"} == set(homes)
    for public, home in homes.items():
        assert getattr(face, public) is getattr(importlib.import_module(home), public), public
    assert set(homes) <= set(dir(face))
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        face.nothing  # noqa: B018


@pytest.mark.parametrize("path", STUBS, ids=module_name)
def test_type_checkers_see_the_public_names(path: Path) -> None:
    """The stub imports every name of the table from the same home, and no other."""
    shown = {
        (node.module, alias.name)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name  # a stub exports only names imported with `as`
    }
    homes = vars(importlib.import_module(module_name(path)))["_HOMES"]
    assert shown == {(home, name) for home, names in homes.items() for name in names}


def test_every_error_is_public() -> None:
    """`aggregator.errors` lists its own classes."""
    made = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == "aggregator.errors"
    }
    assert set(errors.__all__) == {name for name in made if not name.startswith("_")}


def test_names_of_faces_are_found_from_the_root() -> None:
    """They load from the root, but are not listed there, to keep the table short."""
    listed = set(vars(aggregator)["__all__"])
    assert len(listed) <= 65
    for name, face in {
        "chain": "rules",
        "always": "gates",
        "CassetteWarning": "errors",
        "ExactMatch": "guides",
    }.items():
        assert name not in listed
        assert getattr(aggregator, name) is getattr(importlib.import_module(f"aggregator.{face}"), name)
    assert loaded_by("import aggregator; aggregator.rules.chain") >= {"aggregator.rules", "aggregator.training.merge"}
    assert "aggregator.simulation" in loaded_by("import aggregator; aggregator.simulation.SimulatedModel")


def loaded_by(statement: str) -> set[str]:
    """Return every module that a statement loads in a fresh interpreter."""
    script = f"import sys; before = set(sys.modules)\n{statement}\nprint(*sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_production_imports_are_light() -> None:
    """An agent with parameters loads no event loop, no network and no room that it does not use."""
    loaded = loaded_by(
        "from aggregator import Module, ParameterNode\n"
        "class Agent(Module):\n"
        "    def __init__(self):\n"
        "        self.k = ParameterNode(3)\n"
        "assert Agent().parameters()[0].data == 3"
    )
    assert {name for name in loaded if name.startswith("aggregator")} == {
        "aggregator",
        *(f"aggregator.{name}" for name in ("agents", "errors", "files", "text")),
        *(f"aggregator.agents.{name}" for name in ("modules", "parameters")),
    }
    third_party = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"aggregator"}
    assert third_party <= {"msgspec", "typing_extensions"}
    assert not loaded & NOT_IN_PRODUCTION


@pytest.mark.requirement("Trace's defect 34: importing it took seconds and needed test tools")
def test_import_is_light() -> None:
    """`import aggregator` loads no third-party module and none of our rooms; a face loads only itself."""
    for modules in [{"aggregator"}, *({"aggregator", f"aggregator.{face}"} for face in FACES)]:
        loaded = loaded_by(f"import {max(modules)}")
        assert {name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names} == modules


STEP = """
import asyncio, os, sys
import aggregator
from aggregator import AggregatedUpdate, LLMOptimizer, Module, ParameterNode, exact_match
from aggregator.records import Choice, Completion, Message

class Model:
    def __init__(self, text):
        self.answer = Completion(choices=(Choice(message=Message(content=text)),))
    async def complete(self, messages, **options):
        return self.answer

class Agent(Module):
    def __init__(self):
        self.instruction = ParameterNode("Name the team", description="the task")
        self.examples = ParameterNode(3)
    async def forward(self, x):
        return (await model.complete([])).text

async def main():
    await trainer.atrain(exact_match, [(0, "x")])
    files = []
    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            files.append(frame.f_code.co_filename)
    sys.setprofile(count)
    await trainer.atrain(exact_match, [(0, "x")])
    sys.setprofile(None)
    print(len(files), sum(a != b for a, b in zip(files, files[1:])))

package, model = os.path.dirname(aggregator.__file__), Model('{"suggestion": {"examples": 4}}')
trainer = AggregatedUpdate(Agent(), LLMOptimizer(llm=model), llm=model, observers=[])
asyncio.run(main())
"""


def test_a_training_step_is_a_short_journey() -> None:
    """Who follows one step through the code passes no more functions and files than this."""
    out = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    calls, moves = map(int, out.stdout.split())
    assert (calls <= MOST_CALLS, moves <= MOST_MOVES) == (True, True), (calls, moves)


def test_no_test_measures_time() -> None:
    """A test asserts events, because seconds depend on the machine's load. Benchmarks measure."""
    clocks = {"perf_counter", "process_time", "thread_time", "perf_counter_ns", "process_time_ns"}
    tests = Path(__file__).parent
    found = [
        f"{path.relative_to(tests)}:{node.lineno} {name_called(node)}"
        for path in sorted(tests.rglob("*.py"))
        if "peers" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and name_called(node) in clocks
    ]
    assert found == []
    asserted = [
        f"{path.relative_to(tests)}:{node.lineno}"
        for path in sorted(tests.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
        and any(isinstance(part, ast.Call) and name_called(part) == "monotonic" for part in ast.walk(node))
    ]
    assert asserted == []
