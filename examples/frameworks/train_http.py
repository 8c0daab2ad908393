"""Train an agent that answers at an address, in whatever language: here a server that asks a model by itself."""

import atexit
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from aggregator import exact_match, optimize
from aggregator.adapters.http import HTTPAgent

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
Path("server.py").write_text("""
import http.server, json, os, urllib.request
class Agent(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["content-length"])))
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
        rollout = {"output": output, "usage": usage, "transcript": [{"messages": messages, "output": output}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(rollout).encode())
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8377), Agent).serve_forever()
""")
server = subprocess.Popen([sys.executable, "server.py"], stderr=subprocess.DEVNULL)
atexit.register(server.kill)
for _ in range(100):
    with suppress(OSError), socket.create_connection(("127.0.0.1", 8377)):
        break
    time.sleep(0.1)

agent = HTTPAgent("http://127.0.0.1:8377/run", {"instruction": "If no rule applies, answer sales."})
result = optimize(agent, tickets, guide=exact_match, model="openai/gpt-4o")
agent.save("agent.json")
