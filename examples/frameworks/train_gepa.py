"""Train the texts of a GEPA adapter."""

from gepa.adapters.default_adapter.default_adapter import DefaultAdapter

from aggregator import optimize, trainable

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
tickets = [{"input": ticket, "answer": team, "additional_context": {}} for ticket, team in rows]
adapter = DefaultAdapter(model="openai/gpt-4o-mini")

agent = trainable(adapter, candidate={"system_prompt": "If no rule applies, answer sales."})
result = optimize(agent, tickets, guide=None, model="openai/gpt-4o")
print(agent.candidate)
