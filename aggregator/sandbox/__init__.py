"""sandbox: trained code in a worker process with limits. Knows nothing about parameters.

May import: protocols, records, errors, text, files, checks, portal.
"""
