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
            {parameter.name: describe(parameter) for parameter in parameters},
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


def describe(parameter: Any) -> dict[str, Any]:
    """Return what the prompt says about one parameter: its value and type, description and constraint where given."""
    facts: dict[str, Any] = {"value": parameter.data, "type": type_name(parameter)}
    if getattr(parameter, "description", None):
        facts["description"] = parameter.description
    constraint = getattr(parameter, "constraint", None)
    if isinstance(constraint, str):
        facts["constraint"] = constraint
    return facts


def type_name(parameter: Any) -> str:
    """Name a parameter's type in the words of JSON schema, limits included.

    A parameter that has no schema of its own is named by its value's type.
    """
    if not hasattr(parameter, "json_schema"):
        return type(parameter.data).__name__
    schema = {key: value for key, value in parameter.json_schema().items() if key not in {"description", "title"}}
    return schema["type"] if set(schema) == {"type"} else msgspec.json.encode(schema).decode()


def render(value: Any) -> str:
    """Write an agent's output as text: a string as it is, JSON where it can be."""
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError):
        return f"<{type(value).__name__}>" if " at 0x" in repr(value) else repr(value)
