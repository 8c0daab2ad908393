"""The demo's agent: it routes support tickets to teams, by an instruction that training writes."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from aggregator.agents.bundles import bundle
from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.protocols import ChatModel

TEAMS = ("account", "billing", "sales", "shipping", "technical")

FRAME = f"""

The teams are {", ".join(TEAMS)}. Where several rules fit, follow the one with the most words in the ticket. \
Answer with the team's name and nothing else."""


class TicketRouter(Module):
    """Names the team that should handle a ticket.

    Three things are trained: the instruction, how many words of the ticket the model sees, and the code that
    prepares the ticket.
    """

    def __init__(self, llm: ChatModel) -> None:
        self.llm = llm
        self.instruction = ParameterNode(
            "Route the ticket to the team that should handle it.\nIf no rule applies, answer sales.",
            description="How to route a ticket: sentences, then rules, one line a team: `word, other word -> team`. "
            "A rule's word must stand in the prepared ticket as it is written there.",
        )
        self.excerpt_words = ParameterNode(
            8,
            type=Annotated[int, Meta(ge=5, le=80)],
            description="How many words of the prepared ticket the model sees.",
        )

    @bundle(trainable=True)
    def clean(self, ticket: str) -> str:
        """Prepare the ticket's text for the model."""
        return ticket

    @bundle()
    def excerpt(self, text: str) -> str:
        """Cut the text to `excerpt_words` words; … stands where it goes on."""
        words = text.split()
        shown = words[: self.excerpt_words.data]
        return " ".join(shown) + (" …" if len(words) > len(shown) else "")

    async def forward(self, ticket: str) -> str:
        """Return the name of a team."""
        completion = await self.llm.complete(
            [
                {"role": "system", "content": self.instruction.data + FRAME},
                {"role": "user", "content": self.excerpt(self.clean(ticket))},
            ]
        )
        return completion.text.strip()


def right_team(_: str, answer: Any, team: str) -> tuple[float, str]:
    """Judge an answer: the score, and in words what was expected and what came.

    >>> right_team("Where is my parcel?", "sales", "shipping")
    (0.0, 'Expected "shipping", got "sales".')
    """
    if answer == team:
        return 1.0, "Correct."
    return 0.0, f'Expected "{team}", got "{answer}".'
