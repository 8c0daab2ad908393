"""Train the agents of the OpenAI Agents SDK that a triage agent leads to, and the description of a tool."""

from agents import Agent, function_tool

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


@function_tool
def lookup(order: str) -> str:
    """Look up an order."""
    return f"{order} is on its way."


refunds = Agent(name="refunds", model="gpt-4o-mini", instructions="Handle refunds.", tools=[lookup])
triage = Agent(name="triage", model="gpt-4o-mini", instructions="If no rule applies, answer sales.", handoffs=[refunds])

agent = trainable(triage)
result = optimize(agent, tickets, guide=exact_match, model="openai/gpt-4o")
agent.save("triage.json")
