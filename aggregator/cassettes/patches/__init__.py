"""How each HTTP client asks and answers: one file per client, functions that stand in for its own and decide per call.

May import what `cassettes` may. A client is imported here only by functions that run once it is imported already.
"""
