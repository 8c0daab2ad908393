"""The trained agent, and what production needs: parameters, modules, traced operations, transcripts.

May import: sandbox, protocols, records and below, portal. Imports no HTTP client, so a trained agent loads lightly.
"""
