"""The native optimizer: one call to a model proposes new values for one instance, independent of all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from aggregator.cassettes.lineage import lineage
from aggregator.protocols import ChatModel
from aggregator.records import Proposal, Rollout, StepReport
from aggregator.training.asking import ask
from aggregator.training.prompts import DEFAULT_OBJECTIVE, PROPOSER_SYSTEM_PROMPT, proposal_messages


class LLMOptimizer:
    """Proposes new parameter values from one instance's transcript, output and feedback.

    `parameters` are what it may change (default: every trainable parameter of the agent that the trainer was given).
    `llm` is a model, its name, or None for the default model. `memory_size` is how many earlier updates, accepted and
    refused, the prompt recalls. It keeps no state: the same rollout and history give the same prompt.
    """

    def __init__(
        self,
        parameters: Sequence[Any] | None = None,
        llm: Any = None,
        *,
        objective: str = DEFAULT_OBJECTIVE,
        memory_size: int = 5,
        max_tokens: int = 4096,
        system_prompt: str = PROPOSER_SYSTEM_PROMPT,
    ) -> None:
        from aggregator.llm.models import as_model

        self.parameters = parameters
        self.llm: ChatModel = as_model(llm)
        self.objective = objective
        self.memory_size = memory_size
        self.max_tokens = max_tokens
        self.system_prompt = system_prompt

    async def propose(
        self, rollout: Rollout, parameters: Sequence[Any], *, history: Sequence[StepReport] = ()
    ) -> Proposal:
        """Return what this instance asks for; raises LLMError where the call failed."""
        messages = proposal_messages(
            {parameter.name: parameter.describe() for parameter in parameters},
            transcript=rollout.transcript,
            output=render(rollout.output),
            score=rollout.score,
            feedback=rollout.feedback,
            objective=self.objective,
            history=self._recalled(history),
            system_prompt=self.system_prompt,
        )
        with lineage("propose", role="optimizer"):
            answer = await ask(self.llm, messages, parameters, max_tokens=self.max_tokens)
        return Proposal(
            values=answer.values,
            score=rollout.score,
            feedback=rollout.feedback,
            reasoning=answer.reasoning,
            error=answer.error,
            sample_ids=(rollout.sample_id,),
        )

    def _recalled(self, history: Sequence[StepReport]) -> list[StepReport]:
        tried = [report for report in history if report.update]
        return tried[len(tried) - self.memory_size :] if self.memory_size < len(tried) else tried


def render(value: Any) -> str:
    """Write an agent's output as text: a string as it is, JSON where it can be."""
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError):
        return f"<{type(value).__name__}>" if " at 0x" in repr(value) else repr(value)
