"""The demo: an agent that routes support tickets, its data set, and its training run.

May import every room below the command line. Its data and cassette are part of the wheel.
"""
