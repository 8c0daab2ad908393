"""The local executor under its old import path; it is defined in `aggregator.executors.local`."""

from __future__ import annotations

from aggregator.executors.local import LocalExecutor as AsyncExecutor

__all__ = ["AsyncExecutor"]
