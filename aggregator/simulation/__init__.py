"""simulation: the simulated model, served in process or over HTTP.

May import: training and the rooms below it.
"""
