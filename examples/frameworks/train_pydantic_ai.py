"""Train the instructions of a pydantic-ai agent and the description of its tool."""

from pydantic_ai import Agent

from aggregator import exact_match, optimize, trainable

tickets = [
    ("do you sell lamps", "sales"),
    ("the invoice is wrong", "billing"),
    ("my parcel is broken", "shipping"),
    ("a refund for the invoice", "billing"),
    ("where is my parcel", "shipping"),
    ("the refund did not come", "billing"),
    ("the courier lost my parcel", "shipping"),
    ("the courier never rang", "shipping"),
]
support = Agent("openai-chat:gpt-4o-mini", instructions="If no rule applies, answer sales.")


@support.tool_plain
def history(customer: str) -> str:
    """Return what a customer bought."""
    return f"{customer} bought a lamp."


agent = trainable(support)
result = optimize(agent, tickets, guide=exact_match, model="openai/gpt-4o")
agent.save("support.json")
