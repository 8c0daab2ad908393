"""The simulated model under its old import path; it is defined in `aggregator.simulation.model`."""

from __future__ import annotations

from aggregator.simulation.model import SimulatedModel, complete

__all__ = ["SimulatedModel", "complete"]
