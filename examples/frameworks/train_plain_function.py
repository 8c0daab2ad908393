"""Train the keyword-only arguments of a plain function."""

from aggregator import LLM, exact_match, optimize, trainable

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
llm = LLM("openai/gpt-4o-mini")


@trainable
async def agent(ticket: str, *, instruction: str = "If no rule applies, answer sales.") -> str:
    messages = [{"role": "system", "content": instruction}, {"role": "user", "content": ticket}]
    return (await llm.complete(messages)).text


result = optimize(agent, tickets, guide=exact_match, model="openai/gpt-4o")
agent.save("agent.json")
