"""Our algorithm and our model inside other people's libraries: one file per library, imported by its user.

    from aggregator.hosts.pydantic_ai import model

May import training and every room below it.
"""
