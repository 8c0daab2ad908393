"""Guides judge an agent's output: exact match, pattern, keywords, number, LLM judge, or any callable.

May import: llm, agents, cassettes and below. A guide keeps no state between calls, so instances share it safely.
"""
