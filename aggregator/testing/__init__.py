"""For tests: the pytest plugin, and fakes of a transport and of a model.

May import every room below the command line. Nothing is loaded before its first use, as pytest loads the plugin in
every project.
"""

from __future__ import annotations

__all__ = ["FakeTransport", "ScriptedModel", "error_reply", "stream_reply", "suggestion", "text_reply"]


def __getattr__(name: str) -> object:
    """Load a fake on its first use."""
    if name not in __all__:
        raise AttributeError(f"module 'aggregator.testing' has no attribute {name!r}")
    from aggregator.testing import fakes

    return getattr(fakes, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
