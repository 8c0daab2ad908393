"""The parts of a custom provider (see `examples/extending/provider.py`), and token sources of two clouds."""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.llm.calls": ("ChatCall", "Codec", "Limits", "Provider", "RateHeaders", "StreamReader", "Target"),
    "aggregator.llm.codecs.openai": ("OpenAIChat",),
    "aggregator.llm.codecs.base": ("Event", "EventReader", "JSONCodec", "words"),
    "aggregator.llm.names": ("EntraToken", "GoogleToken"),
}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
