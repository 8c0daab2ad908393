"""Train LLM agents with aggregated updates.

For each minibatch an optimizer proposes new parameter values for every instance independently and
concurrently; an LLM aggregates the proposals, weighing them by confidence; the typed result is
checked and applied to the agent. Every LLM exchange can be recorded in a cassette and replayed offline.

Importing this package imports no third-party module: each public name is loaded on its first use (PEP 562).
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for true; importing typing for it would cost more than all the rest

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
    "aggregator.training.minibatch": ("Minibatch",),
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
    "aggregator.training.search": ("PrioritySearch",),
    "aggregator.training.searches": (
        "BeamSearch",
        "ParetoSearch",
        "SequentialSearch",
        "SequentialUpdate",
    ),
    "aggregator.training.suggestions": (
        "construct_update_dict",
        "extract_llm_suggestion",
    ),
    "aggregator.training.trainer": (
        "AggregatedUpdate",
        "BasicSearchAlgorithm",
        "MinibatchAlgorithm",
    ),
}
_ORIGIN = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_ORIGIN)]  # noqa: PLE0604 - built from the one table above

if TYPE_CHECKING:
    from aggregator.adapters.agents import as_agent as as_agent
    from aggregator.agents.bundles import bundle as bundle
    from aggregator.agents.modules import Module as Module
    from aggregator.agents.modules import model as model
    from aggregator.agents.parameters import ParameterNode as ParameterNode
    from aggregator.agents.parameters import node as node
    from aggregator.agents.transcripts import transcript as transcript
    from aggregator.cassettes.lineage import lineage as lineage
    from aggregator.cassettes.recorder import cassette as cassette
    from aggregator.errors import *  # noqa: F403
    from aggregator.guides.exact import ExactMatch as ExactMatch
    from aggregator.guides.exact import exact_match as exact_match
    from aggregator.guides.judge import LLMJudge as LLMJudge
    from aggregator.guides.judge import Verdict as Verdict
    from aggregator.guides.numeric import NumericMatch as NumericMatch
    from aggregator.guides.pattern import KeywordHints as KeywordHints
    from aggregator.guides.pattern import RegexMatch as RegexMatch
    from aggregator.llm.budget import Budget as Budget
    from aggregator.llm.client import LLM as LLM
    from aggregator.llm.estimates import Estimate as Estimate
    from aggregator.llm.estimates import estimate as estimate
    from aggregator.llm.ledger import Price as Price
    from aggregator.llm.messages import Image as Image
    from aggregator.llm.models import as_model as as_model
    from aggregator.observing.configuring import configure_logging as configure_logging
    from aggregator.observing.console import ConsoleLogger as ConsoleLogger
    from aggregator.observing.observer import Observer as Observer
    from aggregator.observing.observer import as_observer as as_observer
    from aggregator.observing.observer import from_logger as from_logger
    from aggregator.observing.progress import ProgressBar as ProgressBar
    from aggregator.observing.trackers import TensorBoardLogger as TensorBoardLogger
    from aggregator.observing.trackers import WandbLogger as WandbLogger
    from aggregator.records import Candidate as Candidate
    from aggregator.records import Completion as Completion
    from aggregator.records import Decision as Decision
    from aggregator.records import Failure as Failure
    from aggregator.records import Proposal as Proposal
    from aggregator.records import Rollout as Rollout
    from aggregator.records import Sample as Sample
    from aggregator.records import StepReport as StepReport
    from aggregator.records import TrainingResult as TrainingResult
    from aggregator.records import Usage as Usage
    from aggregator.training.batches import DataLoader as DataLoader
    from aggregator.training.checkpoints import load_result as load_result
    from aggregator.training.checkpoints import save_result as save_result
    from aggregator.training.evaluation import aevaluate as aevaluate
    from aggregator.training.evaluation import evaluate as evaluate
    from aggregator.training.gates import always as always
    from aggregator.training.gates import improves_on_batch as improves_on_batch
    from aggregator.training.gates import improves_on_validation as improves_on_validation
    from aggregator.training.merge import LLMChoice as LLMChoice
    from aggregator.training.merge import LLMMerge as LLMMerge
    from aggregator.training.merge import best_tried as best_tried
    from aggregator.training.merge import last_of as last_of
    from aggregator.training.merge import tree_merge as tree_merge
    from aggregator.training.minibatch import Minibatch as Minibatch
    from aggregator.training.proposers import LLMOptimizer as LLMOptimizer
    from aggregator.training.proposers import OPROOptimizer as OPROOptimizer
    from aggregator.training.proposers import TextGradOptimizer as TextGradOptimizer
    from aggregator.training.rules import best_of as best_of
    from aggregator.training.rules import chain as chain
    from aggregator.training.rules import dedupe as dedupe
    from aggregator.training.rules import identity as identity
    from aggregator.training.rules import majority as majority
    from aggregator.training.rules import mean as mean
    from aggregator.training.rules import top_k as top_k
    from aggregator.training.rules import without_failed as without_failed
    from aggregator.training.search import PrioritySearch as PrioritySearch
    from aggregator.training.searches import BeamSearch as BeamSearch
    from aggregator.training.searches import ParetoSearch as ParetoSearch
    from aggregator.training.searches import SequentialSearch as SequentialSearch
    from aggregator.training.searches import SequentialUpdate as SequentialUpdate
    from aggregator.training.suggestions import construct_update_dict as construct_update_dict
    from aggregator.training.suggestions import extract_llm_suggestion as extract_llm_suggestion
    from aggregator.training.trainer import AggregatedUpdate as AggregatedUpdate
    from aggregator.training.trainer import BasicSearchAlgorithm as BasicSearchAlgorithm
    from aggregator.training.trainer import MinibatchAlgorithm as MinibatchAlgorithm

if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of ours

    def __getattr__(name: str) -> object:
        """Load a public name on its first use."""
        if name not in _ORIGIN:
            raise AttributeError(f"module 'aggregator' has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_ORIGIN[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
