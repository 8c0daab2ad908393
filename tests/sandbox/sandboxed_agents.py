"""Trainable operations whose module imports no package."""

from __future__ import annotations

from typing import Any

from aggregator import Module, bundle
from aggregator.sandbox.limits import Limits


class Lazy(Module):
    """Imports numpy when it is called."""

    @bundle(trainable=True, sandbox=Limits(seconds=30.0))
    def mean(self, xs: list[float]) -> Any:
        """Return the mean."""
        import numpy as np

        return float(np.mean(xs))


def plain_agent(limits: Limits) -> Any:
    """Return an agent with a trainable operation that imports nothing."""

    class Plain(Module):
        @bundle(trainable=True, sandbox=limits)
        def work(self, x: Any) -> Any:
            """Work."""
            return x

    return Plain()


def shout(x: str) -> str:
    """Return a text in capitals."""
    return x.upper()
