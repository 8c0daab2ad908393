"""What is trained, and all that production needs of it: parameters, modules, traced operations, transcripts.

May import: protocols, records, errors, portal. Imports no HTTP client, so a trained agent loads lightly.
"""
