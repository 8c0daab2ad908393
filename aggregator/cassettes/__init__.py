"""Record and replay: the place of a call (lineage), what it asks (key), what was answered (tape), on disk (journal).

May import: protocols, records, errors, portal. Opens no socket; vcrpy is imported in `vcr.py` only, when asked for.
"""
