"""adapters: agents of other frameworks as ours, one file per framework, imported only when the framework is present.

May import: executors, guides, observing, llm and the rooms below them.
"""
