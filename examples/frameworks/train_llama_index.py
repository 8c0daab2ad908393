"""Train the system prompt of a LlamaIndex agent."""

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.llms.openai import OpenAI

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


def history(customer: str) -> str:
    """Return what a customer bought."""
    return f"{customer} bought a lamp."


router = FunctionAgent(
    llm=OpenAI("gpt-4o-mini"), tools=[history], system_prompt="If no rule applies, answer sales.", streaming=False
)

agent = trainable(router)
result = optimize(agent, tickets, guide=exact_match, model="openai/gpt-4o")
agent.save("router.json")
