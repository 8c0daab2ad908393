"""Train LLM agents with aggregated updates.

For each minibatch an optimizer proposes new parameter values for every instance independently and concurrently; an LLM
aggregates the proposals, weighing them by confidence; the typed result is checked and applied to the agent. Every LLM
exchange can be recorded in a cassette and replayed offline.

The names that most programs need are here. The others are in faces: `aggregator.errors`, `executors`, `gates`,
`guides`, `llm`, `observing`, `optimizers`, `providers`, `rules`, `schedules`, `searches`, `simulation`, `stops` and
`testing`.

Importing this package imports no third-party module: each public name is loaded on its first use (PEP 562). Editors and
type checkers read `__init__.pyi`.
"""

from __future__ import annotations

import sys as _sys

TYPE_CHECKING = False  # `typing` would be one more import
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__version__ = "0.1.0"

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.adapters.agents": ("as_agent", "trainable"),
    "aggregator.agents.bundles": ("bundle",),
    "aggregator.agents.modules": (
        "Module",
        "model",
    ),
    "aggregator.agents.parameters": (
        "ParameterNode",
        "node",
    ),
    "aggregator.agents.playbook": ("Playbook",),
    "aggregator.agents.transcripts": ("transcript",),
    "aggregator.cassettes.lineage": ("lineage",),
    "aggregator.cassettes.recorder": ("cassette",),
    "aggregator.errors": (
        "AggregatorError",
        "BudgetExceededError",
        "CassetteMissError",
        "ConfigError",
        "LLMError",
        "TrainingError",
    ),
    "aggregator.guides.judge": ("LLMJudge",),
    "aggregator.guides.matching": ("exact_match",),
    "aggregator.llm.bridge": ("transport",),
    "aggregator.llm.budget": ("Budget",),
    "aggregator.llm.client": ("LLM",),
    "aggregator.llm.ledger": ("Price",),
    "aggregator.llm.messages": ("Image",),
    "aggregator.llm.models": ("as_model",),
    "aggregator.observing.configuring": ("configure_logging",),
    "aggregator.observing.observer": ("Observer",),
    "aggregator.records": (
        "Completion",
        "Decision",
        "Failure",
        "Proposal",
        "Rollout",
        "Sample",
        "StepReport",
        "TrainingResult",
        "Usage",
    ),
    "aggregator.training.algorithms": (
        "AggregatedUpdate",
        "BasicSearchAlgorithm",
        "BeamSearch",
        "Minibatch",
        "MinibatchAlgorithm",
        "ParetoSearch",
        "PrioritySearch",
        "SequentialSearch",
        "SequentialUpdate",
    ),
    "aggregator.training.batches": ("DataLoader",),
    "aggregator.training.checkpoints": (
        "load_result",
        "save_result",
    ),
    "aggregator.training.evaluation": (
        "aevaluate",
        "evaluate",
        "headroom",
    ),
    "aggregator.training.gates": (
        "improves_on_batch",
        "improves_on_validation",
    ),
    "aggregator.training.merge": ("LLMMerge",),
    "aggregator.training.optimize": ("aoptimize", "optimize"),
    "aggregator.training.proposers": (
        "LLMOptimizer",
        "OPROOptimizer",
    ),
    "aggregator.training.step": ("Step",),
    "aggregator.training.asking": (
        "construct_update_dict",
        "extract_llm_suggestion",
    ),
    "aggregator.training.trainer": ("Trainer",),
}


def _face(module: str, homes: dict[str, tuple[str, ...]]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a module that loads each name from its home on first use."""
    origin = {name: home for home, names in homes.items() for name in names}

    def load(name: str) -> object:
        if name not in origin:
            text = f"module {module!r} has no attribute {name!r}"
            raise AttributeError(text, name=name, obj=_sys.modules[module])  # Python suggests the nearest name
        from importlib import import_module

        value = getattr(import_module(origin[name]), name)
        setattr(_sys.modules[module], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(_sys.modules[module]), *origin})

    return load, names


_FACES = (
    "errors",
    "rules",
    "gates",
    "guides",
    "optimizers",
    "searches",
    "schedules",
    "stops",
    "executors",
    "observing",
    "llm",
)
_ROOMS = (*_FACES, "providers", "records", "simulation", "testing")
_load, __dir__ = _face(__name__, _HOMES)


def __getattr__(name: str) -> object:
    """Load a public name or a face on first use. Names of the faces are found here too, but not listed."""
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f"aggregator.{name}")
    try:
        return _load(name)
    except AttributeError:
        for face in _FACES if not name.startswith("_") else ():
            if name in (module := import_module(f"aggregator.{face}")).__all__:
                return getattr(module, name)
        raise


_MOVED = {
    "aggregator.adapters.folders": "aggregator.adapters.command",
    "aggregator.agents.artefacts": "aggregator.agents.modules",
    "aggregator.agents.values": "aggregator.agents.parameters",
    "aggregator.cassettes.keys": "aggregator.cassettes.matching",
    "aggregator.cassettes.locking": "aggregator.files",
    "aggregator.cassettes.opening": "aggregator.cassettes.recorder",
    "aggregator.cassettes.reading": "aggregator.cassettes.storage",
    "aggregator.cassettes.saving": "aggregator.cassettes.storage",
    "aggregator.cassettes.timing": "aggregator.cassettes.rules",
    "aggregator.demo.agent": "aggregator.demo.run",
    "aggregator.guides.exact": "aggregator.guides.matching",
    "aggregator.guides.numeric": "aggregator.guides.matching",
    "aggregator.guides.pattern": "aggregator.guides.matching",
    "aggregator.hosts.evaluations": "aggregator.adapters.template",
    "aggregator.llm.prices": "aggregator.llm.ledger",
    "aggregator.llm.structured": "aggregator.llm.schemas",
    "aggregator.observing.console": "aggregator.observing.observer",
    "aggregator.observing.progress": "aggregator.observing.observer",
    "aggregator.observing.trackers": "aggregator.observing.observer",
    "aggregator.testing.simulated_model": "aggregator.simulation.model",
    "aggregator.training.executors": "aggregator.executors.local",
    "aggregator.training.minibatch": "aggregator.training.algorithms",
    "aggregator.training.rules": "aggregator.training.merge",
    "aggregator.training.schemas": "aggregator.training.asking",
    "aggregator.training.search": "aggregator.training.algorithms",
    "aggregator.training.selections": "aggregator.training.merge",
    "aggregator.training.suggestions": "aggregator.training.asking",
    "aggregator.training.textgrad": "aggregator.training.proposers",
    "aggregator.training.variations": "aggregator.training.proposers",
}
"""Modules that programs import under an older path: the path is another name of the module that has their content."""


class _Moved:
    """The finder of the modules in `_MOVED`; it is asked only for modules that have no file."""

    @staticmethod
    def find_spec(name: str, *_: object) -> ModuleSpec | None:
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, _Moved()) if name in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Let the import system make an empty module, which `exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        from importlib import import_module

        _sys.modules[module.__name__] = import_module(_MOVED[module.__name__])


_sys.meta_path.append(_Moved)

__all__ = ["__version__", *sorted(name for names in _HOMES.values() for name in names)]  # noqa: PLE0604 - the table's
