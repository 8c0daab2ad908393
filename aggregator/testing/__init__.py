"""For tests: the pytest plugin, the simulated model server, fault injection.

May import every room below the command line.
"""
