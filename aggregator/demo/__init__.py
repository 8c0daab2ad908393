"""The demo: an agent that routes support tickets, its data set, and what trains it.

May import every room below the command line. Its data and cassette travel with the wheel.
"""
