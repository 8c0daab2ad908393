"""The simulated model: an OpenAI-compatible server on 127.0.0.1 that reads only the prompts.

May import: training and the rooms below it.
"""

from __future__ import annotations

from aggregator.simulation.model import SimulatedModel

__all__ = ["SimulatedModel"]
