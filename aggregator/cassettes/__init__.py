"""Record and replay: the place of a call (lineage), its request (key), its answers (tape), the file (journal).

May import: agents, sandbox, protocols, records and below, portal. Opens no socket, and does not import vcrpy.
"""
