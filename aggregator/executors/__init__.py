"""executors: where rollouts run.

May import: adapters, guides, observing, llm and the rooms below them.
"""
