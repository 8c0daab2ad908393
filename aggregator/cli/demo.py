"""`aggregator demo`: train the ticket router and show the result."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command to the main parser."""
    parser = subparsers.add_parser(
        "demo",
        help="train an agent that routes support tickets, offline",
        description="Train an agent that routes support tickets for two epochs. Without further options every answer "
        "of the model is replayed from the bundled cassette: no network, no key.",
    )
    parser.add_argument("--serve", action="store_true", help="ask the simulated model over real HTTP, on 127.0.0.1")
    parser.add_argument("--model", metavar="NAME", help="ask a real provider, such as openai/gpt-4o-mini (costs money)")
    parser.add_argument("--record", action="store_true", help="re-record the cassette while running")
    parser.add_argument("--concurrency", type=_positive, default=16, metavar="N", help="tickets at once (default: 16)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="order of the tickets (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo and print its summary; returns the exit code."""
    from aggregator.demo.run import Settings, summary, train_demo
    from aggregator.observing.observer import ProgressBar

    settings = Settings(
        seed=options.seed,
        concurrency=options.concurrency,
        serve=options.serve,
        record=options.record,
        model=options.model,
        out=options.out,
    )
    try:
        outcome = train_demo(settings, observers=[ProgressBar(name="training")])
    except KeyboardInterrupt:
        sys.stderr.write(f"\nInterrupted. The finished steps are in {options.out / 'events.jsonl'}\n")
        raise
    sys.stdout.write(summary(outcome, options.out, sys.stdout))
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"Expected a number of at least 1, got {text}")
    return value
