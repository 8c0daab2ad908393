"""What a person or a log sees of a run: loggers, the progress bar, structlog set-up, the report.

May import: records, protocols, errors. It reads reports; it never changes a run.
"""
