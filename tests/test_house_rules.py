"""The house's rules, held by a test: layering, cycles, size, public names, light import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import aggregator

PACKAGE = Path(aggregator.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

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
    {"errors", "text", "files", "checks"},
]
ROOMS = {name for names in LAYERS for name in names}
ANYWHERE = {"portal", "errors", "text", "files", "checks"}
ONLY_IN = {
    "aiohttp": {"llm/transport.py", "simulation/", "testing/"},
    "vcr": {"cassettes/vcr.py", "testing/"},
    "opto": set(),
}
MAX_LINES = 600
MAX_FUNCTION_LINES = 60


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "aggregator" and len(parts) > 1 else ""


def imports_of(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module.startswith("aggregator"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(name: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if name in names), -1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    """A room imports the rooms below it, never above; each file of the package belongs to a room."""
    own = room(module_name(path))
    if not own:
        return
    if own in ANYWHERE:
        allowed = {"errors", "records", own}  # records: for types only
    else:
        assert layer(own) >= 0, f"{own} is no room of the house; add it to LAYERS and to docs/design.md"
        allowed = {name for names in LAYERS[layer(own) :] for name in names} | ANYWHERE
    known = {"aggregator.training.context", "aggregator.training.context.current_step"}  # until a step is an argument
    above = {m for m in imports_of(path) if m.startswith("aggregator.") and room(m) not in allowed} - {
        "aggregator.__version__",
        *(known if own == "adapters" else ()),
    }
    assert above == set()


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_fit(path: Path) -> None:
    """A file fits in one sitting, a function on one screen."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_guarded_packages_stay_in_their_room(package: str) -> None:
    """aiohttp, vcr and opto are imported in their one place only."""
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name == package or name.startswith(package + ".") for name in imports_of(path))
    }
    allowed = ONLY_IN[package]
    assert {
        user for user in users if not any(user == a or (a.endswith("/") and user.startswith(a)) for a in allowed)
    } == set()


def test_public_names() -> None:
    """`__all__` is the PEP 562 table, every name loads from its home, and type checkers see the same names."""
    assert aggregator.__all__[0] == "__version__"
    for name in aggregator.__all__[1:]:
        assert getattr(aggregator, name).__module__.startswith("aggregator"), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        aggregator.nothing  # type: ignore[attr-defined] # noqa: B018


def test_type_checkers_see_the_public_names() -> None:
    """Every name of the table stands in the TYPE_CHECKING block too, from the same home."""
    block = next(
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    shown = {
        (node.module, alias.asname)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "aggregator.errors"
        for alias in node.names
    }
    table = {(home, name) for home, names in aggregator._HOMES.items() for name in names}
    assert shown == {(home, name) for home, name in table if home != "aggregator.errors"}


def test_import_is_light() -> None:
    """`import aggregator` loads no third-party module and none of our rooms."""
    script = "import sys; before = set(sys.modules); import aggregator; print(*sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split())
    assert {name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names} == {"aggregator"}
