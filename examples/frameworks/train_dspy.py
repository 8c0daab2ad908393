"""Train the instructions of a DSPy program."""

import dspy

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
tickets = [dspy.Example(ticket=ticket, team=team).with_inputs("ticket") for ticket, team in rows]
dspy.configure(lm=dspy.LM("openai/gpt-4o-mini"))
program = dspy.Predict(dspy.Signature("ticket -> team", "If no rule applies, answer sales."))


def same_team(gold, prediction, trace=None):
    return dspy.Prediction(score=gold.team == prediction.team, feedback=f"Expected: {gold.team}")


agent = trainable(program, train=["instructions"])
result = optimize(agent, tickets, guide=same_team, model="openai/gpt-4o")
program.save("program.json")
