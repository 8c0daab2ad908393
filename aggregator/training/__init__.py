"""The training loop and its parts: step, trainer, optimizers, rules, gates, checks, searches, run folder.

May import: adapters, executors, guides, observing, llm, cassettes, agents, sandbox and below.
"""
