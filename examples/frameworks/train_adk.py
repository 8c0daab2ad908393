"""Train the instructions of a Google ADK agent and its sub-agent."""

from google.adk.agents import LlmAgent
from google.adk.models.lite_llm import LiteLlm

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
model = LiteLlm(model="openai/gpt-4o-mini")
refunds = LlmAgent(name="refunds", model=model, description="Handles refunds.", instruction="Ask for the order.")
router = LlmAgent(name="router", model=model, instruction="If no rule applies, answer sales.", sub_agents=[refunds])

agent = trainable(router)
result = optimize(agent, tickets, guide=exact_match, model="openai/gpt-4o")
agent.save("router.json")
