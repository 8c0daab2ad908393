"""The command line: `aggregator demo | cassette ...`. The only room that prints.

May import every room. An error of the library ends a command with one message, never a traceback.
"""
