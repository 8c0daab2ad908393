"""Train a pydantic-ai agent on a data set of pydantic-evals, judged by the data set's evaluators."""

from pydantic_ai import Agent
from pydantic_evals import Case, Dataset
from pydantic_evals.evaluators import EqualsExpected

from aggregator import optimize, trainable
from aggregator.adapters.pydantic_evals import cases

rows = [
    ("do you sell lamps", "sales"),
    ("the invoice is wrong", "billing"),
    ("my parcel is broken", "shipping"),
    ("a refund for the invoice", "billing"),
    ("where is my parcel", "shipping"),
    ("the refund did not come", "billing"),
    ("the courier lost my parcel", "shipping"),
    ("the courier never rang", "shipping"),
]
dataset = Dataset(
    name="tickets",
    cases=[Case(inputs=ticket, expected_output=team) for ticket, team in rows],
    evaluators=[EqualsExpected()],
)
support = Agent("openai-chat:gpt-4o-mini", instructions="If no rule applies, answer sales.")

agent = trainable(support)
tickets, guide = cases(dataset)
result = optimize(agent, tickets, guide=guide, model="openai/gpt-4o")
agent.save("support.json")
