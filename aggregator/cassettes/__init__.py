"""Record and replay: the place of a call (lineage), its request (key), its answers (tape), the file (journal).

May import: protocols, records, errors, portal. Opens no socket; vcrpy is imported in `vcr.py` only, on request.
"""
