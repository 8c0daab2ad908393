"""The trainers: aggregated updates as in the seed API, and Trace's two simpler ones, composed of the same parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from aggregator.cassettes.lineage import lineage
from aggregator.checks import check_positive
from aggregator.errors import ConfigError
from aggregator.observing.observer import Watching
from aggregator.protocols import Gate, Logger, UpdateRule
from aggregator.records import Proposal, Rollout, Sample, Values
from aggregator.text import shorten
from aggregator.training.batches import Dataset, samples
from aggregator.training.context import current_step
from aggregator.training.evaluation import mean
from aggregator.training.merge import LLMMerge, best_scored
from aggregator.training.minibatch import Minibatch
from aggregator.training.parts import check_gate, check_optimizer, check_rule
from aggregator.training.prompts import AGGREGATOR_SYSTEM_PROMPT
from aggregator.training.suggestions import construct_update_dict, extract_llm_suggestion
from aggregator.training.updates import Update, apply, as_proposal, score_of

_PROPOSING = ("forward", "aforward", "propose")
"""Whoever overrides one of these may do without an optimizer."""


class AggregatedUpdate(Minibatch):
    """Asks the optimizer for a proposal per instance, independently, and a model to aggregate them.

    `llm` is the aggregating model, its name, or None for the default model. Set `aggregator_system_prompt` on a
    subclass or an instance to change its instructions. `rule` replaces the aggregation by another rule.
    """

    aggregator_system_prompt = AGGREGATOR_SYSTEM_PROMPT

    def __init__(
        self,
        agent: Any,
        optimizer: Any,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        llm: Any = None,
        max_tokens: int = 4096,
        *,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        budget: Any = None,
        max_concurrency: int = 64,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        super().__init__(
            agent,
            optimizer,
            use_asyncio,
            logger,
            gate=gate,
            budget=budget,
            max_concurrency=max_concurrency,
            seed=seed,
            observers=observers,
        )
        if gate is not None:
            check_gate(gate)
        if all(getattr(type(self), name) is getattr(Minibatch, name) for name in _PROPOSING):
            check_optimizer(self.optimizer)
        self.max_tokens = max_tokens
        if rule is None:
            rule = LLMMerge(llm, max_tokens=max_tokens, system_prompt=self.aggregator_system_prompt)
            self.llm = rule.llm
        else:
            check_rule(rule)
        self.rule = rule

    def to_param_dict(self, update_dict: Mapping[Any, Any]) -> dict[str, Any]:
        """Convert {ParameterNode: value} to {name: value}."""
        return {parameter.py_name: value for parameter, value in update_dict.items()}

    def construct_update_dict(
        self, parameters: list[Any], suggestion: dict[str, Any], ignore_extraction_error: bool = True
    ) -> dict[Any, Any]:
        """Convert a suggestion into each parameter's own type."""
        return construct_update_dict(parameters, suggestion, ignore_extraction_error)

    def extract_llm_suggestion(self, response: str, ignore_extraction_error: bool = True) -> dict[str, Any]:
        """Extract the suggestion from a reply."""
        return extract_llm_suggestion(response, ignore_extraction_error)


class MinibatchAlgorithm(Minibatch):
    """Puts a whole minibatch to the optimizer at once: outputs and feedback concatenated, one proposal."""

    async def aforward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Rollout:
        """Run the agent on one instance and judge the output; the proposal comes from `update`, for all together."""
        return await self.observe(agent, x, guide, info, verbose)

    async def aupdate(self, outputs: Sequence[Any], verbose: bool | str = False) -> Update:
        """Ask for one proposal from all that the minibatch saw, and apply it."""
        step = current_step()
        proposals = await self.candidates(outputs)
        update = await apply(proposals, self.rule, step.gate or self.gate, step.parameters or self.parameters())
        lost = [record for proposal in proposals for record in proposal.failures]
        more = [record for record in update.failures if record not in lost]  # a rule may pass them on, or drop them
        return replace(update, score=mean([score_of(output) for output in outputs]), failures=(*lost, *more))

    async def candidates(self, outputs: Sequence[Rollout]) -> list[Proposal]:
        """Return what the minibatch as a whole asks for."""
        seen = judged(outputs)
        return [await self.propose(batchify(seen))] if seen else []


class BasicSearchAlgorithm(MinibatchAlgorithm):
    """Asks for several proposals from the whole minibatch and keeps the best, the current values included.

    `validate_dataset` and `validate_guide` judge the candidates; by default the minibatch and the guide of `train`.
    """

    def __init__(
        self,
        agent: Any,
        optimizer: Any,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        *,
        num_proposals: int = 4,
        validate_dataset: Dataset | None = None,
        validate_guide: Any = None,
        gate: Gate | None = None,
        budget: Any = None,
        max_concurrency: int = 64,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        check_positive("num_proposals", num_proposals)
        super().__init__(
            agent,
            optimizer,
            use_asyncio,
            logger,
            rule=self.best,
            gate=gate,
            budget=budget,
            max_concurrency=max_concurrency,
            seed=seed,
            observers=observers,
        )
        self.num_proposals = num_proposals
        self.validation: tuple[Sample, ...] = ()
        if validate_dataset is not None:
            self.validation = samples(validate_dataset, name="validate_dataset")
        self.validate_guide = validate_guide

    async def candidates(self, outputs: Sequence[Rollout]) -> list[Proposal]:
        """Return `num_proposals` answers to the same question."""
        found: list[Proposal] = []
        for i in range(self.num_proposals):
            with lineage(f"candidate={i}"):
                found += await super().candidates(outputs)
        return found

    async def best(self, current: Values, proposals: Sequence[Proposal], *, stepsize: float) -> Sequence[Proposal]:
        """Return the candidate that scores best on the validation set, none where the current values do."""
        return await best_scored(current, proposals, self.validation or current_step().samples, self.validate_guide)


def judged(outputs: Sequence[Any]) -> list[Rollout]:
    """Return the rollouts that say something of the agent.

    Raises ConfigError for proposals, as an overridden `forward` may return them: no rule would merge these.
    """
    asking = [output for output in outputs if not isinstance(output, Rollout) and as_proposal(output).values]
    if asking:
        raise ConfigError(
            "expected forward to return a Rollout where the whole minibatch is put to the optimizer, "
            f"got {shorten(asking[0])}; use AggregatedUpdate, or a search with rule=, to merge proposals"
        )
    return [output for output in outputs if isinstance(output, Rollout) and (output.feedback or not output.failure)]


def batchify(rollouts: Sequence[Rollout]) -> Rollout:
    r"""Concatenate what several instances did into one rollout, each under its number.

    >>> batchify([Rollout(sample_id=3, output="a", feedback="right"), Rollout(sample_id=5, output="b")]).output
    'ID [3]: a\nID [5]: b'
    """

    def listed(texts: Sequence[Any]) -> str:
        pairs = zip(rollouts, texts, strict=True)
        return "\n".join(f"ID [{rollout.sample_id}]: {text}" for rollout, text in pairs if text != "")

    return Rollout(
        sample_id=rollouts[0].sample_id if rollouts else 0,
        output=listed([rollout.output for rollout in rollouts]),
        score=mean([rollout.score for rollout in rollouts]),
        feedback=listed([rollout.feedback for rollout in rollouts]),
        transcript=listed([rollout.transcript for rollout in rollouts]),
    )
