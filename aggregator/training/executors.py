"""The local executor under the name that programs know it by; it lives in `aggregator.executors.local`."""

from __future__ import annotations

from aggregator.executors.local import LocalExecutor as AsyncExecutor

__all__ = ["AsyncExecutor"]
