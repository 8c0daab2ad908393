"""The words for a sandbox under the name that programs know them by; they live in `aggregator.sandbox.limits`."""

from __future__ import annotations

from aggregator.sandbox.limits import Limits, Sandbox, sandboxed

__all__ = ["Limits", "Sandbox", "sandboxed"]
