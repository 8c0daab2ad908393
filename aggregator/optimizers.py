"""Optimizers, which propose new values, and variations of their candidates.

`examples/extending/optimizer.py` shows a custom one.
"""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.training.learning": ("LearnedUpdate", "apropose_from", "propose_from", "read_records"),
    "aggregator.training.prompts": ("Layout",),
    "aggregator.training.proposers": (
        "LLMOptimizer",
        "OPROOptimizer",
        "TextGradOptimizer",
        "Variation",
        "alternatives",
        "experts",
        "refine",
        "seeds",
        "temperatures",
    ),
    "aggregator.training.step": ("Optimizer",),
    "aggregator.training.asking": ("Answer", "ask"),
}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
