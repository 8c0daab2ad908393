"""One pure file per wire format: our records to bytes, and bytes to our records. No I/O.

`base.JSONCodec` is their base class. May import: records, errors, and the calls and messages of `llm/`.
"""
