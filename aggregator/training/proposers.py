"""The native optimizers: a call to a model proposes new values for one instance, independent of all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

from msgspec.structs import replace

from aggregator.agents.parameters import ParameterNode, read
from aggregator.cassettes.lineage import lineage
from aggregator.checks import check_count, check_positive
from aggregator.executors.local import AsyncExecutor
from aggregator.llm.models import as_model
from aggregator.protocols import ChatModel, UpdateRule
from aggregator.records import Proposal, Rollout, StepReport
from aggregator.text import as_text, cut
from aggregator.training.asking import Answer, ask
from aggregator.training.context import current_step
from aggregator.training.parts import check_rule, fitted, gives_typed
from aggregator.training.prompts import (
    CRITIC_SYSTEM_PROMPT,
    DEFAULT_OBJECTIVE,
    GRADIENT_SYSTEM_PROMPT,
    PROPOSER_SYSTEM_PROMPT,
    Layout,
    digest_of,
    number,
    ordered,
    proposal_messages,
    verdict,
)
from aggregator.training.variations import Question, Variation, check_variation, seeds

Item = TypeVar("Item")

OUTPUT_LIMIT = 40_000
"""How many characters of an agent's output an optimizer is shown; as many as of its transcript."""


class LLMOptimizer:
    """Proposes new parameter values from one instance's transcript, output and feedback.

    `parameters` are what it may change (default: every trainable parameter of the agent that the trainer was given).
    `llm` is a model, its name, or None for the default model. `memory_size` is how many earlier updates, accepted and
    refused, the prompt recalls. With `num_candidates` above 1 the model is asked that often; `variation` says how the
    questions differ, and `select`, a rule, makes one proposal of the answers (default: the variation's own).
    `layout` adds a worked example to the prompt, renames its headings or leaves sections out. It keeps no state: the
    same rollout and history give the same prompt.
    """

    def __init__(
        self,
        parameters: Sequence[Any] | None = None,
        llm: Any = None,
        *,
        objective: str = DEFAULT_OBJECTIVE,
        memory_size: int = 5,
        num_candidates: int | None = None,
        variation: Variation = seeds,
        select: UpdateRule | None = None,
        temperature: float | None = None,
        max_tokens: int = 4096,
        system_prompt: str = PROPOSER_SYSTEM_PROMPT,
        layout: Layout = Layout(),  # noqa: B008 - frozen
    ) -> None:
        if num_candidates is not None:
            check_positive("num_candidates", num_candidates)
        check_count("memory_size", memory_size, meaning="0 is off")
        if select is not None:
            check_rule(select)
        self.parameters = parameters
        self.llm: ChatModel = as_model(llm)
        self.objective = objective
        self.memory_size = memory_size
        self.num_candidates = check_variation(variation, num_candidates)
        self.variation = variation
        self.select = variation.select(self.llm) if select is None else select
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.system_prompt = system_prompt
        self.layout = layout

    @gives_typed
    async def propose(
        self, rollout: Rollout, parameters: Sequence[Any], *, history: Sequence[StepReport] = ()
    ) -> Proposal:
        """Return what this instance asks for; raises LLMError where the call failed."""
        messages = self.messages(rollout, parameters, history)
        with lineage("propose", role="optimizer"):
            if self.num_candidates == 1:
                return await self._ask(self._question(messages, 0), parameters, rollout)
            found = await self._candidates(messages, parameters, rollout)
        return await self._selected(found, parameters, rollout)

    def messages(
        self, rollout: Rollout, parameters: Sequence[Any], history: Sequence[StepReport]
    ) -> list[dict[str, str]]:
        """Return the prompt; a subclass may tell the model something else."""
        return self.asked_about(
            rollout,
            parameters,
            history=self.recalled(history),
            system_prompt=self.system_prompt,
            layout=self.layout,
        )

    def asked_about(
        self,
        rollout: Rollout,
        parameters: Sequence[Any],
        *,
        history: Sequence[str] = (),
        system_prompt: str,
        layout: Layout,
    ) -> list[dict[str, str]]:
        """Return a question about parameters and what the agent did with them."""
        return proposal_messages(
            {parameter.name: parameter.describe() for parameter in parameters},
            transcript=rollout.transcript,
            output=cut(render(rollout.output), OUTPUT_LIMIT),
            score=rollout.score,
            feedback=rollout.feedback,
            objective=self.objective,
            history=history,
            system_prompt=system_prompt,
            layout=layout,
        )

    def recalled(self, history: Sequence[StepReport]) -> list[str]:
        """Return the latest updates that were tried, with their verdicts, as lines."""
        tried = [report for report in history if report.update]
        return [verdict(report) for report in latest(tried, self.memory_size)]

    async def _candidates(
        self, messages: list[dict[str, str]], parameters: Sequence[Any], rollout: Rollout
    ) -> list[Proposal]:
        found: list[Proposal] = []

        async def candidate(i: int) -> Proposal:
            question = self._question(messages, i, found)
            with lineage(f"candidate={i}"):
                return await self._ask(question, parameters, rollout)

        if not self.variation.in_turn:
            return await AsyncExecutor(self.num_candidates).map(candidate, range(self.num_candidates))
        for i in range(self.num_candidates):
            found.append(await candidate(i))  # noqa: PERF401 - the next candidate reads `found`
        return found

    def _question(self, messages: list[dict[str, str]], i: int, before: Sequence[Proposal] = ()) -> Question:
        return self.variation.ask(messages, i, self.num_candidates, tuple(before))

    async def _selected(self, found: Sequence[Proposal], parameters: Sequence[Any], rollout: Rollout) -> Proposal:
        current = read(parameters)
        usable = [proposal for proposal in found if proposal.values]
        chosen = await self.select(current, usable, stepsize=current_step().stepsize)
        if not chosen:
            return replace(found[0], values={})
        return replace(fitted(chosen[0], parameters), support=1, score=rollout.score, feedback=rollout.feedback)

    async def _ask(self, question: Question, parameters: Sequence[Any], rollout: Rollout) -> Proposal:
        answer = await ask(
            self.llm,
            question.messages,
            parameters,
            max_tokens=self.max_tokens,
            temperature=self.temperature if question.temperature is None else question.temperature,
            seed=question.seed,
        )
        return Proposal(
            values=answer.values,
            score=rollout.score,
            feedback=rollout.feedback,
            reasoning=answer.reasoning,
            error=answer.error,
            sample_ids=(rollout.sample_id,),
        )


class OPROOptimizer(LLMOptimizer):
    """Recalls the best earlier values with the scores they reached, worst first, and asks for better ones.

    The method is OPRO's (Yang et al., 2023, "Large Language Models as Optimizers"): the model sees a trajectory of
    solutions in ascending order of score. The score of an update is the gate's where it measured one, else that of the
    test set after it, else that of the next minibatch.
    """

    def recalled(self, history: Sequence[StepReport]) -> list[str]:
        """Return the `memory_size` best updates in ascending order of score, as lines."""
        scored = [(score, report) for report, score in reached(history) if report.update and score is not None]
        ranked = sorted(scored, key=lambda pair: pair[0])
        return [
            f"score {number(score)}: {digest_of(report.update)}" for score, report in latest(ranked, self.memory_size)
        ]


def reached(history: Sequence[StepReport]) -> Iterator[tuple[StepReport, float | None]]:
    """Yield each step with the score that its update reached."""
    following = [report.score for report in history[1:]]
    for report, next_score in zip_longest(history, following):
        accepted = report.decision.accepted
        later = report.test_score if report.test_score is not None else next_score
        yield report, report.decision.after if report.decision.after is not None else later if accepted else None


def latest(items: Sequence[Item], count: int) -> Sequence[Item]:
    """Return the last `count` items, none for 0.

    >>> latest([1, 2, 3], 2)
    [2, 3]
    """
    return items[max(len(items) - count, 0) :]


def render(value: Any) -> str:
    """Write an agent's output as text: a string as it is, JSON where it can be."""
    return as_text(ordered(value))


class TextGradOptimizer(LLMOptimizer):
    """Asks for a criticism of each parameter first, the textual gradient, then for values that answer it.

    The method is TextGrad's (Yuksekgonul et al., 2024, "TextGrad: Automatic Differentiation via Text"). The critic sees
    transcript, output and feedback, and writes no values; the second prompt shows its criticism in place of the
    feedback, and only the parameters that were criticised. Without criticism there is no second call. Under
    MinibatchAlgorithm the critic sees the whole minibatch, so that the gradient is that of all its instances.

    `critic` is a model for the criticism (default: `llm`); the other arguments are LLMOptimizer's.
    """

    def __init__(
        self,
        parameters: Sequence[Any] | None = None,
        llm: Any = None,
        *,
        critic: Any = None,
        objective: str = DEFAULT_OBJECTIVE,
        memory_size: int = 5,
        num_candidates: int | None = None,
        variation: Variation = seeds,
        select: UpdateRule | None = None,
        temperature: float | None = None,
        max_tokens: int = 4096,
        system_prompt: str = GRADIENT_SYSTEM_PROMPT,
        critic_system_prompt: str = CRITIC_SYSTEM_PROMPT,
        layout: Layout = Layout(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(
            parameters,
            llm,
            objective=objective,
            memory_size=memory_size,
            num_candidates=num_candidates,
            variation=variation,
            select=select,
            temperature=temperature,
            max_tokens=max_tokens,
            system_prompt=system_prompt,
            layout=layout,
        )
        self.critic: ChatModel = self.llm if critic is None else as_model(critic)
        self.critic_system_prompt = critic_system_prompt

    @gives_typed
    async def propose(
        self, rollout: Rollout, parameters: Sequence[Any], *, history: Sequence[StepReport] = ()
    ) -> Proposal:
        """Return what the criticism of this instance asks for; raises LLMError where a call failed."""
        criticism = await self.criticise(rollout, parameters)
        criticised = [parameter for parameter in parameters if criticism.values.get(parameter.name, "").strip()]
        if not criticised:
            return Proposal(
                score=rollout.score,
                feedback=rollout.feedback,
                reasoning=criticism.reasoning,
                error=criticism.error,
                sample_ids=(rollout.sample_id,),
            )
        gradient = "\n".join(f"{parameter.name}: {criticism.values[parameter.name]}" for parameter in criticised)
        proposal = await super().propose(replace(rollout, feedback=gradient), criticised, history=history)
        return replace(
            proposal,
            feedback=rollout.feedback,
            reasoning="\n".join(text for text in (gradient, proposal.reasoning) if text),
            error="; ".join(error for error in (criticism.error, proposal.error) if error) or None,
        )

    async def criticise(self, rollout: Rollout, parameters: Sequence[Any]) -> Answer:
        """Return a criticism for each parameter that had its part in the result, as text under its name."""
        criticisms = [ParameterNode("", name=parameter.name, type=str) for parameter in parameters]
        with lineage("criticise", role="optimizer"):
            return await ask(
                self.critic,
                self.asked_about(
                    rollout,
                    parameters,
                    system_prompt=self.critic_system_prompt,
                    layout=replace(self.layout, include_example=False),  # it shows new values, no criticism
                ),
                criticisms,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
            )
