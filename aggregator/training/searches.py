"""Trace's other searches, as compositions of the priority search: who is explored, who stays, who comes into force."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from aggregator.llm.budget import Budget
from aggregator.observing.observer import Watching
from aggregator.protocols import Gate, Logger, UpdateRule
from aggregator.records import Candidate, Decision
from aggregator.training.batches import Dataset
from aggregator.training.candidates import drawn, mean_score, won
from aggregator.training.context import current_step
from aggregator.training.search import PrioritySearch


class BeamSearch(PrioritySearch):
    """Explores all that it remembers: the `num_candidates` best, the beam, of the last beam and what was made of it."""

    def __init__(
        self,
        agent: Any,
        optimizer: Any,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        *,
        num_candidates: int = 4,
        num_proposals: int = 2,
        validate_dataset: Dataset | None = None,
        validate_guide: Any = None,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        budget: Budget | None = None,
        max_concurrency: int = 64,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        super().__init__(
            agent,
            optimizer,
            use_asyncio,
            logger,
            num_candidates=num_candidates,
            num_proposals=num_proposals,
            memory_size=num_candidates,
            validate_dataset=validate_dataset,
            validate_guide=validate_guide,
            rule=rule,
            gate=gate,
            budget=budget,
            max_concurrency=max_concurrency,
            seed=seed,
            observers=observers,
        )


class SequentialSearch(PrioritySearch):
    """Has one candidate, which gives way to the best of its `num_proposals` successors where that one is better."""

    def __init__(
        self,
        agent: Any,
        optimizer: Any,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        *,
        num_proposals: int = 1,
        validate_dataset: Dataset | None = None,
        validate_guide: Any = None,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        budget: Budget | None = None,
        max_concurrency: int = 64,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        super().__init__(
            agent,
            optimizer,
            use_asyncio,
            logger,
            num_candidates=1,
            num_proposals=num_proposals,
            memory_size=1,
            validate_dataset=validate_dataset,
            validate_guide=validate_guide,
            rule=rule,
            gate=gate,
            budget=budget,
            max_concurrency=max_concurrency,
            seed=seed,
            observers=observers,
        )


class SequentialUpdate(SequentialSearch):
    """Has one candidate, which always gives way to its successor, the best of them where there are several."""

    def due(self, explored: Sequence[Candidate], made: Sequence[Candidate]) -> list[Candidate]:
        """Return the new candidates, where there is a choice between several."""
        return list(made) if len(made) > 1 else []

    def exploit(
        self, in_force: Candidate, explored: Sequence[Candidate], made: Sequence[Candidate]
    ) -> tuple[Candidate | None, Decision]:
        """Return the best new candidate, which is accepted."""
        if not made:
            return super().exploit(in_force, explored, made)
        return max(made, key=mean_score), Decision(accepted=True, reason="the successor is always accepted")


class ParetoSearch(PrioritySearch):
    """Keeps the candidates that are best on at least one instance, and explores those that are best on many.

    So a specialist survives that a mean would drop, and what it found can be built upon. Candidates are drawn, beside
    the one in force, with the number of instances that they are best on as their weight. The idea is GEPA's (Agrawal
    et al., 2025, "GEPA: Reflective Prompt Evolution Can Outperform Reinforcement Learning"). It needs scores of many
    candidates on the same instances: give a `validate_dataset`.
    """

    def explore(self, in_force: Candidate, others: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidate in force, and others drawn by how often they are best."""
        step = current_step()
        wins = won([in_force, *others])
        random = Random(f"{step.seed}/{step.step}/explore")  # noqa: S311 - a choice, not a secret
        weights = [len(wins[candidate.id]) for candidate in others]
        return [in_force, *drawn(others, weights, self.num_candidates - 1, random)]

    def keep(self, in_force: Candidate, others: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidate in force and those that are best somewhere, at most `memory_size`."""
        wins = won([in_force, *others])
        best = [candidate for candidate in self.ranked(others) if wins[candidate.id]]
        best.sort(key=lambda candidate: -len(wins[candidate.id]))
        return [in_force, *best[: self.memory_size - 1]]
