"""The trained agent, and what production needs: parameters, modules, traced operations, transcripts.

May import: protocols, records, errors, portal. Imports no HTTP client, so a trained agent loads lightly.
"""
