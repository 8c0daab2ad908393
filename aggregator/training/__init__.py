"""The training loop and its parts: batches, proposers, prompts, suggestions, rules, gates, executors, checkpoints.

May import: observing, guides, llm, agents, cassettes and below.
"""
