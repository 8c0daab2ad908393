"""How several candidates for one proposal are made to differ: what each is asked, and which rule then chooses.

A variation is data around one pure function, so one of your own is as small as those here. The ways are those of
Trace's OptoPrimeMulti.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from aggregator.checks import is_finite
from aggregator.errors import ConfigError
from aggregator.protocols import ChatModel
from aggregator.records import Proposal
from aggregator.training.merge import LLMChoice, LLMMerge, last_of
from aggregator.training.prompts import ALTERNATIVE_PROMPT, REFINE_PROMPT, reply_of
from aggregator.training.rules import majority
from aggregator.training.step import UpdateRule

Messages = list[dict[str, str]]


class Question(Struct, frozen=True, kw_only=True):
    """What one candidate is asked; None leaves an option as the optimizer has it."""

    messages: Messages
    temperature: float | None = None
    seed: int | None = None


def _by_majority(_: ChatModel) -> UpdateRule:
    return majority


Asked = Callable[[Messages, int, int, Sequence[Proposal]], Question]
"""(the optimizer's prompt, i, number of candidates, the candidates before) -> what candidate i is asked."""


class Variation(Struct, frozen=True, kw_only=True):
    """How candidates come to differ.

    `in_turn` asks one after the other, so that `ask` sees all candidates before; otherwise all are asked at once and it
    sees none. `least` is how many it takes to make sense. `select` makes the rule that chooses of the optimizer's
    model, unless the optimizer is given another rule.
    """

    name: str
    ask: Asked
    in_turn: bool = False
    least: int = 1
    select: Callable[[ChatModel], UpdateRule] = _by_majority


def _seeded(messages: Messages, i: int, count: int, _before: Sequence[Proposal]) -> Question:
    return Question(messages=messages, seed=i if count > 1 else None)


seeds = Variation(name="seeds", ask=_seeded)
"""The same question each time, with a different seed; the majority of the answers is taken."""


def temperatures(highest: float = 1.3, lowest: float = 0.0) -> Variation:
    """Ask at temperatures spread evenly from `highest` to `lowest`; the majority of the answers is taken.

    The defaults are OptoPrimeMulti's; some models take no temperature above 1.

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
"""Each candidate sees the one before and improves it; the last is taken (self-refinement)."""


def _another(messages: Messages, _i: int, _count: int, before: Sequence[Proposal]) -> Question:
    return Question(messages=continue_with(messages, before, ALTERNATIVE_PROMPT))


alternatives = Variation(name="alternatives", ask=_another, in_turn=True, least=2, select=LLMChoice)
"""Each candidate sees all before and must differ from them; the optimizer's model chooses one."""


def experts(*personas: str) -> Variation:
    r"""Ask with a persona in front of the system prompt, in turn; the optimizer's model merges the answers.

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
    """Return the conversation as it went on: each answer, and what was asked then.

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
    """Return how many candidates are asked for; raises ConfigError for an invalid variation or too few candidates."""
    if not isinstance(variation, Variation):
        raise ConfigError(
            "Expected a variation of aggregator.training.variations: seeds, temperatures(), refine, alternatives, "
            f"experts(...) or a Variation of your own, got {variation!r}"
        )
    if count is not None and count < variation.least:
        raise ConfigError(f"Expected num_candidates of at least {variation.least} for {variation.name}, got {count}")
    return variation.least if count is None else count
