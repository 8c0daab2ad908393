"""The names of the seed and of Trace: short faces of `Trainer`, each with its original signature."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec.structs import replace

from aggregator.errors import ConfigError, SuggestionError
from aggregator.executors.local import MAX_CONCURRENCY
from aggregator.llm.budget import Budget
from aggregator.llm.ledger import Prices
from aggregator.llm.models import as_model
from aggregator.llm.observed import Clients
from aggregator.observing.observer import Watching
from aggregator.protocols import AnyGuide, ChatModel, Executor, Logger
from aggregator.records import Proposal, Values
from aggregator.text import shorten
from aggregator.training.asking import (
    Answer,
    Parameters,
    ask_or_fail,
    construct_update_dict,
    convert_suggestion,
    extract_llm_suggestion,
    read_reply,
)
from aggregator.training.batches import Dataset
from aggregator.training.merge import LLMMerge, identity, names_beyond
from aggregator.training.prompts import AGGREGATOR_SYSTEM_PROMPT
from aggregator.training.replies import parse_reply
from aggregator.training.searches import Beam, BestOf, Pareto, Priority, ScoreFunction, Sequential, Succeeding
from aggregator.training.step import AnyOptimizer, Check, Gate, Step, UpdateRule
from aggregator.training.trainer import Trainer

# ---- the seed's trainers


class Minibatch(Trainer):
    """A proposal per instance, merged by `rule`; by default a minibatch may propose one value for each parameter."""

    def __init__(
        self,
        agent: Any,
        optimizer: AnyOptimizer | None,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        *,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        checks: Sequence[Check] | None = None,
        skip_samples: Sequence[int] = (),
        skip_perfect: bool = False,
        max_score: float | None = None,
        executor: Executor | None = None,
        budget: Budget | None = None,
        clients: Clients = None,
        prices: Prices | None = None,
        max_concurrency: int = MAX_CONCURRENCY,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        Trainer.__init__(
            self,
            agent,
            optimizer,
            rule=identity if rule is None else rule,
            gate=gate,
            checks=checks,
            skip_samples=skip_samples,
            skip_perfect=skip_perfect,
            max_score=max_score,
            executor=executor,
            observers=observers,
            logger=logger,
            budget=budget,
            clients=clients,
            prices=prices,
            use_asyncio=use_asyncio,
            max_concurrency=max_concurrency,
            seed=seed,
        )


class AggregatedUpdate(Minibatch):
    """Asks the optimizer for a proposal per instance, independently, and a model to aggregate them.

    `llm` is the aggregating model, its name, or None for the default model. Set `aggregator_system_prompt` on a
    subclass or an instance to change its instructions. A subclass may override `to_param_dict`, which names the values
    in the prompt, and `extract_llm_suggestion` and `construct_update_dict`, which read the reply; with an overridden
    `extract_llm_suggestion` no `response_format` is sent and no reply is asked for again. All of these, and `llm` and
    `max_tokens`, are read at each step. `rule` replaces the aggregation by another rule, which does not use them: the
    combination is a ConfigError.

    >>> from aggregator import LLMOptimizer
    >>> from aggregator.testing import ScriptedModel, suggestion
    >>> optimizer = LLMOptimizer(llm=ScriptedModel(suggestion(amount=4), suggestion(amount=6)))
    >>> aggregator = ScriptedModel(suggestion(amount=5))
    >>> def add(x, *, amount=1):
    ...     return x + amount
    >>> trainer = AggregatedUpdate(add, optimizer, llm=aggregator, observers=[])
    >>> trainer.train(lambda x, output, info: float(output == info), [(0, 5), (1, 6)], batch_size=2).parameters
    {'amount': 5}
    """

    aggregator_system_prompt = AGGREGATOR_SYSTEM_PROMPT

    def __init__(
        self,
        agent: Any,
        optimizer: AnyOptimizer | None,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        llm: Any = None,
        max_tokens: int = 4096,
        *,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        checks: Sequence[Check] | None = None,
        skip_samples: Sequence[int] = (),
        skip_perfect: bool = False,
        max_score: float | None = None,
        executor: Executor | None = None,
        budget: Budget | None = None,
        clients: Clients = None,
        prices: Prices | None = None,
        max_concurrency: int = MAX_CONCURRENCY,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        self.llm: ChatModel | None = as_model(llm) if rule is None or llm is not None else None
        self.max_tokens = max_tokens
        Trainer.__init__(
            self,
            agent,
            optimizer,
            rule=rule,
            gate=gate,
            checks=checks,
            skip_samples=skip_samples,
            skip_perfect=skip_perfect,
            max_score=max_score,
            executor=executor,
            observers=observers,
            logger=logger,
            budget=budget,
            clients=clients,
            prices=prices,
            use_asyncio=use_asyncio,
            max_concurrency=max_concurrency,
            seed=seed,
        )

    def merging_rule(self) -> UpdateRule:
        """Return `rule`, or the aggregation by `llm` with the overridden hooks."""
        own, kind = vars(self), type(self)
        hooks = [name for name in _HOOKS if name in own or getattr(kind, name) is not getattr(AggregatedUpdate, name)]
        if self.rule is None:
            if hooks:
                return _HookedMerge(self, hooks)
            return LLMMerge(self.llm, max_tokens=self.max_tokens, system_prompt=self.aggregator_system_prompt)
        if hooks:
            raise ConfigError(
                f"Expected no {', '.join(hooks)} with rule=, got both; they belong to the default merge. "
                "Leave rule= out, or change the rule"
            )
        return self.rule

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


_HOOKS = ("to_param_dict", "construct_update_dict", "extract_llm_suggestion", "aggregator_system_prompt")


class _HookedMerge(LLMMerge):
    """The aggregation with those of the seed's hooks that a subclass or an instance overrides."""

    def __init__(self, trainer: AggregatedUpdate, hooks: Sequence[str]) -> None:
        super().__init__(trainer.llm, max_tokens=trainer.max_tokens, system_prompt=trainer.aggregator_system_prompt)
        self.trainer = trainer
        self.hooks = hooks

    def messages(self, proposals: Sequence[Proposal], step: Step) -> list[dict[str, str]]:
        """Return the prompt, with the values as `to_param_dict` names them."""
        if "to_param_dict" in self.hooks:
            step = replace(step, values=self._name_values(step.values, step))
            proposals = [replace(one, values=self._name_values(one.values, step)) for one in proposals]
        return super().messages(proposals, step)

    def _name_values(self, values: Values, step: Step) -> dict[str, Any]:
        nodes = {parameter: values[parameter.name] for parameter in step.parameters if parameter.name in values}
        named: Any = self.trainer.to_param_dict(nodes)
        if not isinstance(named, Mapping):
            raise ConfigError(f"Expected a dict {{name: value}} from to_param_dict, got {shorten(named)}")
        return dict(named)

    async def ask(self, messages: list[dict[str, str]], step: Step, about: Step) -> Answer | Exception:
        """Return the answer, read by the hooks."""
        structured = "extract_llm_suggestion" not in self.hooks
        read = partial(self.read, step=step, ignored=names_beyond(step, about))
        return await ask_or_fail(
            self.llm, messages, about.parameters, max_tokens=self.max_tokens, read=read, structured=structured
        )

    def read(self, text: str, parameters: Parameters, *, step: Step, ignored: Collection[str]) -> Answer:
        """Read a reply by the overridden hooks, and by our own functions for the rest."""
        if not {"extract_llm_suggestion", "construct_update_dict"} & set(self.hooks):
            return read_reply(text, parameters, ignored=ignored)
        reasoning = ""
        try:
            if "extract_llm_suggestion" in self.hooks:
                suggestion: Any = self.trainer.extract_llm_suggestion(text)
            else:
                reply = parse_reply(text)
                suggestion, reasoning = reply.suggestion or {}, reply.reasoning
        except SuggestionError as error:
            return Answer(error=str(error))
        if not isinstance(suggestion, Mapping):
            raise ConfigError(f"Expected a dict from extract_llm_suggestion, got {shorten(suggestion)}")
        if "construct_update_dict" in self.hooks:
            update: Any = self.trainer.construct_update_dict(list(step.parameters), dict(suggestion))
            if not isinstance(update, Mapping):
                raise ConfigError(f"Expected a dict from construct_update_dict, got {shorten(update)}")
            suggestion = {str(getattr(key, "name", key)): value for key, value in update.items()}
        suggestion = {key: value for key, value in suggestion.items() if key not in ignored}
        values, refused = convert_suggestion(suggestion, parameters)
        return Answer(values=values, reasoning=reasoning, error="; ".join(refused.values()) or None)


# ---- Trace's trainers


class MinibatchAlgorithm(Minibatch):
    """Puts a whole minibatch to the optimizer at once: outputs and feedback concatenated, one proposal."""

    def __init__(
        self,
        agent: Any,
        optimizer: AnyOptimizer | None,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        *,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        checks: Sequence[Check] | None = None,
        skip_samples: Sequence[int] = (),
        skip_perfect: bool = False,
        max_score: float | None = None,
        executor: Executor | None = None,
        budget: Budget | None = None,
        clients: Clients = None,
        prices: Prices | None = None,
        max_concurrency: int = MAX_CONCURRENCY,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        Trainer.__init__(
            self,
            agent,
            optimizer,
            propose_per="batch",
            rule=rule,
            gate=gate,
            checks=checks,
            skip_samples=skip_samples,
            skip_perfect=skip_perfect,
            max_score=max_score,
            executor=executor,
            observers=observers,
            logger=logger,
            budget=budget,
            clients=clients,
            prices=prices,
            use_asyncio=use_asyncio,
            max_concurrency=max_concurrency,
            seed=seed,
        )


# ---- searches


class BasicSearchAlgorithm(MinibatchAlgorithm):
    """Asks for several proposals from the whole minibatch and keeps the best, or the current values.

    `validate_dataset` and `validate_guide` judge the candidates; by default the minibatch and the guide of `train`.
    """

    def __init__(
        self,
        agent: Any,
        optimizer: AnyOptimizer | None,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        *,
        num_proposals: int = 4,
        validate_dataset: Dataset | None = None,
        validate_guide: AnyGuide | None = None,
        gate: Gate | None = None,
        checks: Sequence[Check] | None = None,
        skip_samples: Sequence[int] = (),
        skip_perfect: bool = False,
        max_score: float | None = None,
        executor: Executor | None = None,
        budget: Budget | None = None,
        clients: Clients = None,
        prices: Prices | None = None,
        max_concurrency: int = MAX_CONCURRENCY,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        Trainer.__init__(
            self,
            agent,
            optimizer,
            propose_per="batch",
            search=BestOf(num_proposals, validate_dataset, validate_guide),
            gate=gate,
            checks=checks,
            skip_samples=skip_samples,
            skip_perfect=skip_perfect,
            max_score=max_score,
            executor=executor,
            observers=observers,
            logger=logger,
            budget=budget,
            clients=clients,
            prices=prices,
            use_asyncio=use_asyncio,
            max_concurrency=max_concurrency,
            seed=seed,
        )


class PrioritySearch(Minibatch):
    """`Trainer(search=priority(...))`: keeps a pool of candidates and explores the most promising ones.

    Without `rule` the optimizer sees the whole minibatch of a candidate at once. With one, each instance proposes for
    itself, as in AggregatedUpdate, and the rule merges the proposals in `num_proposals` groups, each a new candidate.
    """

    def __init__(
        self,
        agent: Any,
        optimizer: AnyOptimizer | None,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        *,
        num_candidates: int = 4,
        num_proposals: int = 1,
        memory_size: int = 16,
        score_function: ScoreFunction = "mean",
        ucb_exploration_constant: float = 1.0,
        validate_dataset: Dataset | None = None,
        validate_guide: AnyGuide | None = None,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        checks: Sequence[Check] | None = None,
        skip_samples: Sequence[int] = (),
        skip_perfect: bool = False,
        max_score: float | None = None,
        executor: Executor | None = None,
        budget: Budget | None = None,
        clients: Clients = None,
        prices: Prices | None = None,
        max_concurrency: int = MAX_CONCURRENCY,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        Trainer.__init__(
            self,
            agent,
            optimizer,
            propose_per="batch" if rule is None else "instance",
            rule=rule,
            search=self.search_kind(
                memory_size,
                num_candidates=num_candidates,
                num_proposals=num_proposals,
                score_function=score_function,
                ucb_exploration_constant=ucb_exploration_constant,
                validate_dataset=validate_dataset,
                validate_guide=validate_guide,
            ),
            gate=gate,
            checks=checks,
            skip_samples=skip_samples,
            skip_perfect=skip_perfect,
            max_score=max_score,
            executor=executor,
            observers=observers,
            logger=logger,
            budget=budget,
            clients=clients,
            prices=prices,
            use_asyncio=use_asyncio,
            max_concurrency=max_concurrency,
            seed=seed,
        )

    search_kind: type[Priority] = Priority


class ParetoSearch(PrioritySearch):
    """`Trainer(search=pareto(...))`: keeps the candidates that are best on at least one instance."""

    search_kind = Pareto


class BeamSearch(PrioritySearch):
    """`Trainer(search=beam(...))`: explores every candidate that it remembers."""

    def __init__(
        self,
        agent: Any,
        optimizer: AnyOptimizer | None,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        *,
        num_candidates: int = 4,
        num_proposals: int = 2,
        validate_dataset: Dataset | None = None,
        validate_guide: AnyGuide | None = None,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        checks: Sequence[Check] | None = None,
        skip_samples: Sequence[int] = (),
        skip_perfect: bool = False,
        max_score: float | None = None,
        executor: Executor | None = None,
        budget: Budget | None = None,
        clients: Clients = None,
        prices: Prices | None = None,
        max_concurrency: int = MAX_CONCURRENCY,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        Trainer.__init__(
            self,
            agent,
            optimizer,
            propose_per="batch" if rule is None else "instance",
            rule=rule,
            search=Beam(
                num_candidates,
                num_proposals=num_proposals,
                validate_dataset=validate_dataset,
                validate_guide=validate_guide,
            ),
            gate=gate,
            checks=checks,
            skip_samples=skip_samples,
            skip_perfect=skip_perfect,
            max_score=max_score,
            executor=executor,
            observers=observers,
            logger=logger,
            budget=budget,
            clients=clients,
            prices=prices,
            use_asyncio=use_asyncio,
            max_concurrency=max_concurrency,
            seed=seed,
        )


class SequentialSearch(PrioritySearch):
    """`Trainer(search=sequential(...))`: one candidate, which is replaced by its best successor if that is better."""

    sequential_kind: type[Sequential] = Sequential

    def __init__(
        self,
        agent: Any,
        optimizer: AnyOptimizer | None,
        use_asyncio: bool = True,
        logger: Logger | None = None,
        *,
        num_proposals: int = 1,
        validate_dataset: Dataset | None = None,
        validate_guide: AnyGuide | None = None,
        rule: UpdateRule | None = None,
        gate: Gate | None = None,
        checks: Sequence[Check] | None = None,
        skip_samples: Sequence[int] = (),
        skip_perfect: bool = False,
        max_score: float | None = None,
        executor: Executor | None = None,
        budget: Budget | None = None,
        clients: Clients = None,
        prices: Prices | None = None,
        max_concurrency: int = MAX_CONCURRENCY,
        seed: int = 0,
        observers: Sequence[Watching] | None = None,
    ) -> None:
        Trainer.__init__(
            self,
            agent,
            optimizer,
            propose_per="batch" if rule is None else "instance",
            rule=rule,
            search=self.sequential_kind(
                num_proposals, validate_dataset=validate_dataset, validate_guide=validate_guide
            ),
            gate=gate,
            checks=checks,
            skip_samples=skip_samples,
            skip_perfect=skip_perfect,
            max_score=max_score,
            executor=executor,
            observers=observers,
            logger=logger,
            budget=budget,
            clients=clients,
            prices=prices,
            use_asyncio=use_asyncio,
            max_concurrency=max_concurrency,
            seed=seed,
        )


class SequentialUpdate(SequentialSearch):
    """One candidate, which is always replaced by its successor, or by the best one of several."""

    sequential_kind = Succeeding
