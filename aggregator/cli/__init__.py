"""The command line: `aggregator demo | cassette ... | report`. The only room that prints.

May import every room. Errors of the library end a command with one message, never a traceback.
"""
