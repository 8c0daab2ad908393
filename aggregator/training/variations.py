"""How several candidates for one proposal differ: the prompt of each, and the rule that chooses.

A variation is data around one pure function, so a custom one is as small as those here. They are those of Trace's
OptoPrimeMulti.
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
            "Expected a variation of aggregator.training.variations: seeds, temperatures(), refine, alternatives, "
            f"experts(...) or a Variation of your own, got {variation!r}"
        )
    if count is not None and count < variation.least:
        raise ConfigError(f"Expected num_candidates of at least {variation.least} for {variation.name}, got {count}")
    return variation.least if count is None else count
