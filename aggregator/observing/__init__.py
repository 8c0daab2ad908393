"""What a person or a log sees of a run: observers, the console, the progress bar, trackers, structlog set-up.

May import: llm (the ledger), protocols, records and below. Observers read records; they never change a run.
"""
