"""TextGrad's optimizer: one call criticises the parameters, a second one changes them as the criticism asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from aggregator.agents.parameters import ParameterNode
from aggregator.cassettes.lineage import lineage
from aggregator.llm.models import as_model
from aggregator.protocols import ChatModel, UpdateRule
from aggregator.records import Proposal, Rollout, StepReport
from aggregator.training.asking import Answer, ask
from aggregator.training.parts import gives_typed
from aggregator.training.prompts import CRITIC_SYSTEM_PROMPT, DEFAULT_OBJECTIVE, GRADIENT_SYSTEM_PROMPT, Layout
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.variations import Variation, seeds


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
