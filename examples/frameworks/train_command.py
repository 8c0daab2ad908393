"""Train a program that is no Python of ours: a command that asks a model by itself."""

import sys
from pathlib import Path

from aggregator import exact_match, optimize
from aggregator.adapters.command import CommandAgent

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
Path("agent.py").write_text("""
import json, os, sys, urllib.request
given = json.load(sys.stdin)
messages = [
    {"role": "system", "content": given["values"]["instruction"]},
    {"role": "user", "content": given["input"]},
]
body = json.dumps({"model": "gpt-4o-mini", "messages": messages}).encode()
headers = {"content-type": "application/json", "authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
address = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
with urllib.request.urlopen(urllib.request.Request(address, body, headers)) as answer:
    reply = json.load(answer)
output = reply["choices"][0]["message"]["content"]
usage = {"input_tokens": reply["usage"]["prompt_tokens"], "output_tokens": reply["usage"]["completion_tokens"]}
print(json.dumps({"output": output, "usage": usage, "transcript": [{"messages": messages, "output": output}]}))
""")

agent = CommandAgent([sys.executable, "agent.py"], {"instruction": "If no rule applies, answer sales."})
result = optimize(agent, tickets, guide=exact_match, model="openai/gpt-4o")
agent.save("agent.json")
