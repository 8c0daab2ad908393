"""The native optimizers: one model call proposes new values for one instance, independent of all others.

Several candidates for one proposal differ by a variation, which is data around one pure function, so that a custom one
is as small as those here. They are those of Trace's OptoPrimeMulti.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, TypeVar, get_args

from msgspec import Struct
from msgspec.structs import replace

from aggregator.agents.parameters import ParameterNode
from aggregator.agents.transcripts import TRANSCRIPT_LIMIT
from aggregator.cassettes.lineage import lineage
from aggregator.checks import check_count, check_positive, is_finite
from aggregator.errors import ConfigError
from aggregator.executors.local import fan_out
from aggregator.llm.models import as_model
from aggregator.protocols import ChatModel
from aggregator.records import Proposal, Rollout, StepReport
from aggregator.text import cut, show_call
from aggregator.training.asking import Answer, ask, lean_schema
from aggregator.training.gates import keeps_placeholders, template_placeholders
from aggregator.training.merge import LLMChoice, LLMMerge, last_of, majority
from aggregator.training.parts import check_rule, fit_to_types, merge_with, refuse_values
from aggregator.training.prompts import (
    ALTERNATIVE_PROMPT,
    CRITIC_SYSTEM_PROMPT,
    DEFAULT_OBJECTIVE,
    GRADIENT_SYSTEM_PROMPT,
    LEAN_PROPOSER_SYSTEM_PROMPT,
    PROPOSER_SYSTEM_PROMPT,
    REFINE_PROMPT,
    Layout,
    digest_of,
    input_of,
    join_rollouts,
    number,
    proposal_messages,
    render,
    reply_of,
    sort_sets,
    verdict,
)
from aggregator.training.step import Step, UpdateRule

# ---- variations: the question of each candidate, and the rule that chooses

Messages = list[dict[str, str]]


class Question(Struct, frozen=True, kw_only=True):
    """The prompt and options of one candidate; None keeps the optimizer's option."""

    messages: Messages
    temperature: float | None = None
    seed: int | None = None


def _by_majority(_: ChatModel) -> UpdateRule:
    return majority


Asked = Callable[[Messages, int, int, Sequence[Proposal]], Question]
"""(the optimizer's prompt, i, number of candidates, the previous candidates) -> the question for candidate i."""


class Variation(Struct, frozen=True, kw_only=True):
    """How candidates differ.

    `in_turn` makes the calls sequential, so that `ask` sees all previous candidates; otherwise all calls are concurrent
    and it sees none. `least` is the minimum number of candidates. `select` makes the rule that chooses from the
    optimizer's model, unless the optimizer has another rule.
    """

    name: str
    ask: Asked
    in_turn: bool = False
    least: int = 1
    select: Callable[[ChatModel], UpdateRule] = _by_majority

    def __repr__(self) -> str:
        return f"<Variation {self.name}>"


def _seeded(messages: Messages, i: int, count: int, _before: Sequence[Proposal]) -> Question:
    return Question(messages=messages, seed=i if count > 1 else None)


seeds = Variation(name="seeds", ask=_seeded)
"""The same prompt each time, with a different seed; the majority of the answers wins."""


def temperatures(highest: float = 1.3, lowest: float = 0.0) -> Variation:
    """Ask at temperatures spread evenly from `highest` to `lowest`; the majority of the answers wins.

    The defaults are OptoPrimeMulti's; some models refuse a temperature above 1.

    >>> spread = temperatures(1.0, 0.0)
    >>> [spread.ask([], i, 3, ()).temperature for i in range(3)]
    [1.0, 0.5, 0.0]
    """
    given: tuple[Any, Any] = (lowest, highest)
    if not all(map(is_finite, given)) or not 0 <= lowest <= highest:
        raise ConfigError(
            f"Expected temperatures(highest, lowest) with 0 <= lowest <= highest, got {highest!r}, {lowest!r}"
        )

    def cooling(messages: Messages, i: int, count: int, before: Sequence[Proposal]) -> Question:
        share = i / max(count - 1, 1)
        return replace(_seeded(messages, i, count, before), temperature=round(highest - share * (highest - lowest), 6))

    return Variation(name="temperatures", ask=cooling, least=2)


def _refined(messages: Messages, _i: int, _count: int, before: Sequence[Proposal]) -> Question:
    return Question(messages=continue_with(messages, before[-1:], REFINE_PROMPT))


refine = Variation(name="refine", ask=_refined, in_turn=True, least=2, select=lambda _: last_of)
"""Each candidate sees the previous one and improves it; the last is used (self-refinement)."""


def _another(messages: Messages, _i: int, _count: int, before: Sequence[Proposal]) -> Question:
    return Question(messages=continue_with(messages, before, ALTERNATIVE_PROMPT))


alternatives = Variation(name="alternatives", ask=_another, in_turn=True, least=2, select=LLMChoice)
"""Each candidate sees all previous ones and must differ from them; the optimizer's model chooses one."""


def experts(*personas: str) -> Variation:
    r"""Ask with a persona before the system prompt, in rotation; the optimizer's model merges the answers.

    >>> panel = experts("You know the law.", "You write plainly.")
    >>> panel.ask([{"role": "system", "content": "Improve it."}], 1, 2, ()).messages[0]["content"]
    'You write plainly.\n\nImprove it.'
    """
    if {type(persona) for persona in personas} != {str} or not all(personas):
        raise ConfigError(f"Expected personas as text, as in experts('You know the law.', ...), got {personas!r}")

    def speaking(messages: Messages, i: int, count: int, before: Sequence[Proposal]) -> Question:
        system, *rest = messages
        text = f"{personas[i % len(personas)]}\n\n{system['content']}"
        return replace(_seeded(messages, i, count, before), messages=[{**system, "content": text}, *rest])

    return Variation(name="experts", ask=speaking, least=len(personas), select=LLMMerge)


def continue_with(messages: Messages, answers: Sequence[Proposal], request: str) -> Messages:
    """Return the continued conversation: each answer, followed by the next request.

    >>> [message["role"] for message in continue_with([{"role": "user", "content": "Q"}], [Proposal()], "Again.")]
    ['user', 'assistant', 'user']
    """
    turns = [
        turn
        for answer in answers
        for turn in ({"role": "assistant", "content": reply_of(answer)}, {"role": "user", "content": request})
    ]
    return [*messages, *turns]


def check_variation(variation: object, count: int | None) -> int:
    """Return the number of candidates to request; raises ConfigError for an invalid variation or too few candidates."""
    if not isinstance(variation, Variation):
        raise ConfigError(
            "Expected a variation of aggregator.optimizers: seeds, temperatures(), refine, alternatives, "
            f"experts(...) or a Variation of your own, got {variation!r}"
        )
    if count is not None and count < variation.least:
        raise ConfigError(f"Expected num_candidates of at least {variation.least} for {variation.name}, got {count}")
    return variation.least if count is None else count


Item = TypeVar("Item")

OUTPUT_LIMIT = 40_000
"""The default number of characters of an output, and of a transcript, that an optimizer is shown."""

Style = Literal["full", "lean"]
"""The style of a proposal: reasons for each parameter first or, for small models, values first."""


# ---- LLMOptimizer


class LLMOptimizer:
    """Proposes new parameter values from one instance's transcript, output and feedback.

    `parameters` are those that it may change (default: every trainable parameter of the trainer's agent). `llm` is a
    model, its name, or None for the default model. `memory_size` is the number of earlier updates, accepted and
    refused, in the prompt. With `num_candidates` above 1 the model is called that often; `variation` makes the calls
    differ, and the rule `select` makes one proposal of the answers (default: the variation's own). `layout` adds a
    worked example to the prompt, renames its headings or leaves sections out. `style="lean"` is for small models: a
    short system prompt, and a reply with the values first, no nulls and one short reason. At most `transcript_limit`
    and `output_limit` characters of a transcript and an output are shown. It keeps no state: the same rollout and
    history give the same prompt. Raises ConfigError for an invalid argument; a failed call is listed in the proposal.

    >>> from aggregator.testing import ScriptedModel, suggestion
    >>> from asyncio import run
    >>> optimizer = LLMOptimizer(llm=ScriptedModel(suggestion(amount=4)))
    >>> rollout = Rollout(sample_id=0, x=1, output=2, score=0.0, feedback="expected 5, got 2")
    >>> run(optimizer.propose([rollout], Step.of(lambda x, *, amount=1: x + amount))).values
    {'amount': 4}
    """

    def __init__(
        self,
        parameters: Sequence[Any] | None = None,
        llm: Any = None,
        *,
        objective: str | None = None,
        memory_size: int = 5,
        num_candidates: int | None = None,
        variation: Variation = seeds,
        select: UpdateRule | None = None,
        temperature: float | None = None,
        max_tokens: int = 4096,
        system_prompt: str | None = None,
        layout: Layout = Layout(),  # noqa: B008 - frozen
        style: Style = "full",
        transcript_limit: int = TRANSCRIPT_LIMIT,
        output_limit: int = OUTPUT_LIMIT,
    ) -> None:
        if style not in get_args(Style):
            raise ConfigError(f"Expected style 'full' or 'lean', got {style!r}")
        check_positive("transcript_limit", transcript_limit)
        check_positive("output_limit", output_limit)
        if num_candidates is not None:
            check_positive("num_candidates", num_candidates)
        check_count("memory_size", memory_size, meaning="0 is off")
        if select is not None:
            check_rule(select)
        self.parameters = parameters
        self.llm: ChatModel = as_model(llm)
        self.objective = DEFAULT_OBJECTIVE if objective is None else objective
        self.memory_size = memory_size
        self.num_candidates = check_variation(variation, num_candidates)
        self.variation = variation
        self.select = variation.select(self.llm) if select is None else select
        self.temperature = temperature
        self.max_tokens = max_tokens
        usual = LEAN_PROPOSER_SYSTEM_PROMPT if style == "lean" else PROPOSER_SYSTEM_PROMPT
        self.system_prompt = usual if system_prompt is None else system_prompt
        self.layout = layout
        self.style: Style = style
        self.transcript_limit = transcript_limit
        self.output_limit = output_limit

    def __repr__(self) -> str:
        return show_call(type(self).__name__, self.llm)

    @property
    def calls_per_proposal(self) -> int:
        """The number of calls for one proposal, without repairs."""
        return self.num_candidates

    async def propose(self, rollouts: Sequence[Rollout], step: Step) -> Proposal:
        """Return the proposal for one instance, or for a whole minibatch; raises LLMError if a call failed."""
        step, seen = self._limit(step), join_rollouts(rollouts)
        messages = self.messages(seen, step)
        facts: dict[str, Any] = {"score": seen.score, "feedback": seen.feedback}
        facts["sample_ids"] = tuple([rollout.sample_id for rollout in rollouts])
        with lineage("propose", role="optimizer"):
            if self.num_candidates == 1:
                return await self._ask(self.variation.ask(messages, 0, 1, ()), step, facts)
            found = await self._candidates(messages, step, facts)
        chosen = await merge_with(self.select, [proposal for proposal in found if proposal.values], step)
        if not chosen:
            return replace(found[0], values={})
        return replace(fit_to_types(chosen[0], step), support=1, **facts)

    def _limit(self, step: Step) -> Step:
        """Return the step with only the parameters that this optimizer may change."""
        if self.parameters is None:
            return step
        names = {parameter.name for parameter in self.parameters}
        return replace(step, parameters=[parameter for parameter in step.parameters if parameter.name in names])

    def messages(self, rollout: Rollout, step: Step) -> list[dict[str, str]]:
        """Return the prompt; a subclass may override it."""
        return self.describe(
            rollout, step, history=self.recall(step.history), system_prompt=self.system_prompt, layout=self.layout
        )

    def describe(
        self, rollout: Rollout, step: Step, *, history: Sequence[str] = (), system_prompt: str, layout: Layout
    ) -> list[dict[str, str]]:
        """Return the request about the step's parameters and the agent's results with them."""
        return proposal_messages(
            {parameter.name: describe_parameter(parameter, step) for parameter in step.parameters},
            given=cut(input_of(rollout), self.transcript_limit),
            transcript=cut(rollout.transcript, self.transcript_limit),
            output=cut(render(rollout.output), self.output_limit),
            score=rollout.score,
            feedback=rollout.feedback,
            objective=self.objective,
            history=history,
            system_prompt=system_prompt,
            layout=layout,
            is_shared=self.num_candidates > 1 or step.batch_size > max(1, len(step.samples)),
        )

    def recall(self, history: Sequence[StepReport]) -> list[str]:
        """Return the latest updates with their verdicts, as lines."""
        tried = [report for report in history if report.update] if history else history
        return [verdict(report) for report in latest(tried, self.memory_size)]

    async def _candidates(self, messages: list[dict[str, str]], step: Step, facts: Mapping[str, Any]) -> list[Proposal]:
        found: list[Proposal] = []

        async def candidate(i: int) -> Proposal:
            question = self.variation.ask(messages, i, self.num_candidates, tuple(found))
            with lineage(f"candidate={i}"):
                return await self._ask(question, step, facts)

        if not self.variation.in_turn:
            return await fan_out(candidate, range(self.num_candidates), self.num_candidates)
        for i in range(self.num_candidates):
            found.append(await candidate(i))  # noqa: PERF401 - the next candidate reads `found`
        return found

    async def _ask(self, question: Question, step: Step, facts: Mapping[str, Any]) -> Proposal:
        answer = await ask(
            self.llm,
            question.messages,
            step.parameters,
            max_tokens=self.max_tokens,
            temperature=self.temperature if question.temperature is None else question.temperature,
            seed=question.seed,
            refuse=partial(refuse_values, step=step),
            schema=lean_schema if self.style == "lean" else None,
        )
        return Proposal(values=answer.values, reasoning=answer.reasoning, error=answer.error, **facts)


def describe_parameter(parameter: ParameterNode[Any], step: Step) -> dict[str, Any]:
    """Return a parameter's description in a prompt: value, type, description, constraint and placeholders."""
    facts = parameter.describe()
    facts["value"] = sort_sets(step.values.get(parameter.name, facts["value"]))
    if keeps_placeholders in step.checks and (kept := template_placeholders(facts["value"], parameter)):
        facts["placeholders"] = f"keep {', '.join(kept)} as they are, and add no others"
    return facts


# ---- OPROOptimizer


class OPROOptimizer(LLMOptimizer):
    """Shows the best earlier values with their scores, worst first, and asks for better ones.

    The method is OPRO's (Yang et al., 2023, "Large Language Models as Optimizers"): the model sees a trajectory of
    solutions in ascending order of score. The score of an update is the gate's if it measured one, else that of the
    test set after it, else that of the next minibatch.
    """

    def recall(self, history: Sequence[StepReport]) -> list[str]:
        """Return the `memory_size` best updates in ascending order of score, as lines."""
        scored = [(score, report) for report, score in scores_reached(history) if report.update and score is not None]
        ranked = sorted(scored, key=lambda pair: pair[0])
        return [
            f"score {number(score)}: {digest_of(report.update)}" for score, report in latest(ranked, self.memory_size)
        ]


def scores_reached(history: Sequence[StepReport]) -> Iterator[tuple[StepReport, float | None]]:
    """Yield each step with the score that its update reached."""
    following = [report.score for report in history[1:]]
    for report, next_score in zip_longest(history, following):
        accepted = report.decision.accepted
        later = report.test_score if report.test_score is not None else next_score
        yield report, report.decision.after if report.decision.after is not None else later if accepted else None


def latest(items: Sequence[Item], count: int) -> Sequence[Item]:
    """Return the last `count` items, or none for 0.

    >>> latest([1, 2, 3], 2)
    [2, 3]
    """
    return items[max(len(items) - count, 0) :]


# ---- TextGradOptimizer


class TextGradOptimizer(LLMOptimizer):
    """Asks for a criticism of each parameter first, the textual gradient, then for values that answer it.

    The method is TextGrad's (Yuksekgonul et al., 2024, "TextGrad: Automatic Differentiation via Text"). The critic sees
    transcript, output and feedback, and writes no values; the second prompt shows its criticism instead of the
    feedback, and only the criticised parameters. Without criticism there is no second call. Under MinibatchAlgorithm
    the critic sees the whole minibatch, so that the gradient is that of all its instances.

    `critic` is a model for the criticism (default: `llm`); the other arguments are LLMOptimizer's.
    """

    def __init__(
        self,
        parameters: Sequence[Any] | None = None,
        llm: Any = None,
        *,
        critic: Any = None,
        objective: str | None = None,
        memory_size: int = 5,
        num_candidates: int | None = None,
        variation: Variation = seeds,
        select: UpdateRule | None = None,
        temperature: float | None = None,
        max_tokens: int = 4096,
        system_prompt: str | None = None,
        critic_system_prompt: str | None = None,
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
            system_prompt=GRADIENT_SYSTEM_PROMPT if system_prompt is None else system_prompt,
            layout=layout,
        )
        self.critic: ChatModel = self.llm if critic is None else as_model(critic)
        self.critic_system_prompt = CRITIC_SYSTEM_PROMPT if critic_system_prompt is None else critic_system_prompt

    @property
    def calls_per_proposal(self) -> int:
        """The number of calls for one proposal, without repairs; the criticism is the first one."""
        return 1 + self.num_candidates

    async def propose(self, rollouts: Sequence[Rollout], step: Step) -> Proposal:
        """Return the proposal that answers the criticism of this instance; raises LLMError if a call failed."""
        step, seen = self._limit(step), join_rollouts(rollouts)
        ids = tuple(rollout.sample_id for rollout in rollouts)
        criticism = await self.criticise(seen, step)
        criticised = [one for one in step.parameters if criticism.values.get(one.name, "").strip()]
        if not criticised:
            facts: dict[str, Any] = {"score": seen.score, "feedback": seen.feedback, "sample_ids": ids}
            return Proposal(reasoning=criticism.reasoning, error=criticism.error, **facts)
        gradient = "\n".join(f"{parameter.name}: {criticism.values[parameter.name]}" for parameter in criticised)
        question = replace(step, parameters=criticised, batch_size=1)  # no other call shows the same ones
        proposal = await super().propose([replace(seen, feedback=gradient)], question)
        return replace(
            proposal,
            feedback=seen.feedback,
            reasoning="\n".join(text for text in (gradient, proposal.reasoning) if text),
            error="; ".join(error for error in (criticism.error, proposal.error) if error) or None,
            sample_ids=ids,
        )

    async def criticise(self, rollout: Rollout, step: Step) -> Answer:
        """Return a criticism for each parameter that contributed to the result, by name."""
        criticisms = [ParameterNode("", name=parameter.name, type=str) for parameter in step.parameters]
        with lineage("criticise", role="optimizer"):
            return await ask(
                self.critic,
                self.describe(
                    rollout,
                    step,
                    system_prompt=self.critic_system_prompt,
                    layout=replace(self.layout, include_example=False),  # the example shows new values, not a criticism
                ),
                criticisms,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
            )
