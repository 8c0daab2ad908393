"""Train the instruction of an agent written for Trace."""

from opto import trace

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
instruction = trace.node("If no rule applies, answer sales.", name="instruction", trainable=True)


@trace.bundle()
def ask(instruction, ticket):
    messages = [{"role": "system", "content": instruction}, {"role": "user", "content": ticket}]
    return llm(messages=messages).text


@trace.model
class Router:
    def __init__(self):
        self.instruction = instruction

    def forward(self, ticket):
        return ask(self.instruction, ticket)


agent = trainable(Router())
result = optimize(agent, tickets, guide=exact_match, model="openai/gpt-4o")
agent.save("router.json")
