"""The process of one case: `python -m benchmarks.worker MODULE FUNCTION ARGUMENTS`; the last line is JSON."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from importlib import import_module

if __name__ == "__main__":
    module, function, arguments = sys.argv[1:]
    outcome = getattr(import_module(f"benchmarks.{module}"), function)(**json.loads(arguments))
    if inspect.iscoroutine(outcome):
        with asyncio.Runner() as runner:
            outcome = runner.run(outcome)
    print(json.dumps(outcome))
