"""Train LLM agents with aggregated updates.

For each minibatch an optimizer proposes new parameter values for every instance independently and
concurrently; an LLM aggregates the proposals, weighing them by confidence; the typed result is
checked and applied to the agent. Every LLM exchange can be recorded in a cassette and replayed offline.

Importing this package imports no third-party module: each public name is loaded on its first use (PEP 562). Editors
and type checkers read `__init__.pyi`.
"""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` would be one more import
if TYPE_CHECKING:
    from collections.abc import Callable

__version__ = "0.1.0"

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.adapters.agents": ("as_agent",),
    "aggregator.agents.bundles": ("bundle",),
    "aggregator.agents.modules": (
        "Module",
        "model",
    ),
    "aggregator.agents.parameters": (
        "ParameterNode",
        "node",
    ),
    "aggregator.agents.transcripts": ("transcript",),
    "aggregator.cassettes.lineage": ("lineage",),
    "aggregator.cassettes.recorder": ("cassette",),
    "aggregator.errors": (
        "APIConnectionError",
        "APIStatusError",
        "APITimeoutError",
        "AggregatorError",
        "AuthenticationError",
        "BadRequestError",
        "BudgetExceededError",
        "CassetteDamagedError",
        "CassetteError",
        "CassetteLockedError",
        "CassetteMissError",
        "CassetteRefusedError",
        "CassetteWarning",
        "ConfigError",
        "ContentFilterError",
        "ContextLengthError",
        "DecodeError",
        "EmptyResponseError",
        "GuideError",
        "LLMError",
        "NotFoundError",
        "ParameterError",
        "PermissionDeniedError",
        "QuotaError",
        "RateLimitError",
        "ResponseError",
        "SandboxError",
        "SecretLeakError",
        "ServerError",
        "SuggestionError",
        "TrainingError",
        "TrainingWarning",
        "TruncatedError",
    ),
    "aggregator.executors.local": ("LocalExecutor",),
    "aggregator.executors.process": ("ProcessExecutor",),
    "aggregator.guides.exact": (
        "ExactMatch",
        "exact_match",
    ),
    "aggregator.guides.judge": (
        "LLMJudge",
        "Verdict",
    ),
    "aggregator.guides.numeric": ("NumericMatch",),
    "aggregator.guides.pattern": (
        "KeywordHints",
        "RegexMatch",
    ),
    "aggregator.llm.budget": ("Budget",),
    "aggregator.llm.client": ("LLM",),
    "aggregator.llm.estimates": (
        "Estimate",
        "estimate",
    ),
    "aggregator.llm.ledger": ("Price",),
    "aggregator.llm.messages": ("Image",),
    "aggregator.llm.models": ("as_model",),
    "aggregator.observing.configuring": ("configure_logging",),
    "aggregator.observing.console": ("ConsoleLogger",),
    "aggregator.observing.observer": ("Observer", "as_observer", "from_logger"),
    "aggregator.observing.progress": ("ProgressBar",),
    "aggregator.observing.trackers": (
        "TensorBoardLogger",
        "WandbLogger",
    ),
    "aggregator.records": (
        "Candidate",
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
    ),
    "aggregator.training.gates": (
        "always",
        "improves_on_batch",
        "improves_on_validation",
    ),
    "aggregator.training.merge": (
        "LLMChoice",
        "LLMMerge",
        "best_tried",
        "last_of",
        "tree_merge",
    ),
    "aggregator.training.proposers": (
        "LLMOptimizer",
        "OPROOptimizer",
        "TextGradOptimizer",
    ),
    "aggregator.training.rules": (
        "best_of",
        "chain",
        "dedupe",
        "identity",
        "majority",
        "mean",
        "top_k",
        "without_failed",
    ),
    "aggregator.training.searches": (
        "beam",
        "greedy",
        "pareto",
        "priority",
        "sequential",
    ),
    "aggregator.training.step": ("Step",),
    "aggregator.training.suggestions": (
        "construct_update_dict",
        "extract_llm_suggestion",
    ),
    "aggregator.training.trainer": ("Trainer",),
}


def _face(module: str, homes: dict[str, tuple[str, ...]]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a module that loads each name from its home, on its first use."""
    origin = {name: home for home, names in homes.items() for name in names}

    def load(name: str) -> object:
        if name not in origin:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        import sys
        from importlib import import_module

        value = getattr(import_module(origin[name]), name)
        setattr(sys.modules[module], name, value)
        return value

    def names() -> list[str]:
        import sys

        return sorted({*vars(sys.modules[module]), *origin})

    return load, names


__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = ["__version__", *sorted(name for names in _HOMES.values() for name in names)]  # noqa: PLE0604 - the table's
