"""Train LLM agents with aggregated updates.

For each minibatch an optimizer proposes new parameter values for every instance independently and
concurrently; an LLM aggregates the proposals, weighing them by confidence; the typed result is
checked and applied to the agent. Every LLM exchange can be recorded in a cassette and replayed offline.

Importing this package imports no third-party module: each public name is loaded on its first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.agents.bundles": ("bundle",),
    "aggregator.agents.modules": ("Module",),
    "aggregator.agents.parameters": ("ParameterNode", "node"),
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
        "SecretLeakError",
        "ServerError",
        "SuggestionError",
        "TrainingError",
        "TrainingWarning",
        "TruncatedError",
    ),
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
}
_ORIGIN = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_ORIGIN)]  # noqa: PLE0604 - built from the one table above

if TYPE_CHECKING:
    from aggregator.agents.bundles import bundle as bundle
    from aggregator.agents.modules import Module as Module
    from aggregator.agents.parameters import ParameterNode as ParameterNode
    from aggregator.agents.parameters import node as node
    from aggregator.agents.transcripts import transcript as transcript
    from aggregator.cassettes.lineage import lineage as lineage
    from aggregator.cassettes.recorder import cassette as cassette
    from aggregator.errors import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Load a public name on its first use."""
    if name not in _ORIGIN:
        raise AttributeError(f"module 'aggregator' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_ORIGIN[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
