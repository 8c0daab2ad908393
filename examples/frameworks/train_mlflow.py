"""Train a prompt of MLflow's registry that a function loads."""

import mlflow

from aggregator import LLM, exact_match, optimize
from aggregator.adapters.mlflow import RegisteredPrompts

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
mlflow.set_tracking_uri("sqlite:///mlflow.db")
mlflow.genai.register_prompt("route", "If no rule applies, answer sales.")
llm = LLM("openai/gpt-4o-mini")


async def predict(ticket: str) -> str:
    instruction = mlflow.genai.load_prompt("prompts:/route/1").format()
    messages = [{"role": "system", "content": instruction}, {"role": "user", "content": ticket}]
    return (await llm.complete(messages)).text


agent = RegisteredPrompts(predict, ["prompts:/route/1"])
result = optimize(agent, tickets, guide=exact_match, model="openai/gpt-4o")
agent.register()
