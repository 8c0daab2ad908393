"""Train the system prompt of a LangChain agent and the description of its tool."""

from langchain.agents import create_agent
from langchain_core.tools import tool

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


@tool
def history(customer: str) -> str:
    """Return what a customer bought."""
    return f"{customer} bought a lamp."


support = create_agent("openai:gpt-4o-mini", tools=[history], system_prompt="If no rule applies, answer sales.")

agent = trainable(support)
result = optimize(agent, tickets, guide=exact_match, model="openai/gpt-4o")
agent.save("support.json")
