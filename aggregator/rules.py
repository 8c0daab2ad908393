"""Rules, which merge the proposals of a minibatch. `examples/extending/rule.py` shows a custom one."""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.training.merge": (
        "LLMChoice",
        "LLMMerge",
        "best_of",
        "best_tried",
        "chain",
        "dedupe",
        "identity",
        "last_of",
        "majority",
        "mean",
        "top_k",
        "tree_merge",
        "without_failed",
    ),
    "aggregator.training.step": ("UpdateRule",),
    "aggregator.training.asking": ("Answer", "ask"),
}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
