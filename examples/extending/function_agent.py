"""An agent that is a plain function: keyword-only arguments are its parameters, and so are ParameterNodes it reads.

Sync or async. Values are converted to the types in the signature; an accepted value becomes the argument's default, so
the function itself uses it afterwards.
"""

from typing import Annotated

from msgspec import Meta

from aggregator import AggregatedUpdate, LLMOptimizer
from aggregator.testing import ScriptedModel, suggestion


def shorten(text: str, *, words: Annotated[int, Meta(ge=1, le=50)] = 2, ending: str = "...") -> str:
    """The agent: the first words of a text."""
    given = text.split()
    return " ".join(given[:words]) + (ending if len(given) > words else "")


def guide(text: str, output: str, wanted: str) -> tuple[float, str]:
    """The judge: a score, and in words what was expected."""
    return float(output == wanted), f"Expected {wanted!r}, got {output!r}."


DATA = [
    ("the parcel is lost again", "the parcel is …"),
    ("an invoice came twice", "an invoice came …"),
    ("where is it", "where is it"),
]


def main() -> None:
    # A model of your own in its place: llm = "openai/gpt-4o-mini". This one always answers the same.
    llm = ScriptedModel(suggestion("three words, and one sign for what is left out", words=3, ending=" …"))
    trainer = AggregatedUpdate(shorten, LLMOptimizer(llm=llm), llm=llm, observers=[])
    result = trainer.train(guide, DATA, batch_size=3, test_dataset=DATA)
    print(f"score {result.test_scores[0]:.2f} -> {result.test_scores[-1]:.2f} with {result.parameters}")
    print(shorten("my refund did not come"))


if __name__ == "__main__":
    main()
