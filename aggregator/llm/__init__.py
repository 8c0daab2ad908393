"""One call to a model: encode, ask the tape, reserve budget, wait for the limiter, send, retry, decode, settle.

May import: agents (transcripts), cassettes (the tape) and below. aiohttp is imported in `transport.py` only.
"""
