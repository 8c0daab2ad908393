"""One pure file per wire format: our records to bytes, and bytes to our records. No I/O.

May import: records, errors, and the messages of `llm/`.
"""
