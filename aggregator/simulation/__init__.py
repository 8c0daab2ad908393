"""The simulated model: an OpenAI-compatible server on 127.0.0.1 that works from the prompts alone.

May import: training and the rooms below it.
"""

from __future__ import annotations

from aggregator.simulation.model import SimulatedModel

__all__ = ["SimulatedModel"]
