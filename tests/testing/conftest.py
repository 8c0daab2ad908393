"""The project tree is run in a copy, by the plugin's tests; pytest does not collect it here."""

collect_ignore = ["project"]
