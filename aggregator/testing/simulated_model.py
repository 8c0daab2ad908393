"""The simulated model under the name that programs know it by; it lives in `aggregator.simulation.model`."""

from __future__ import annotations

from aggregator.simulation.model import SimulatedModel, complete

__all__ = ["SimulatedModel", "complete"]
