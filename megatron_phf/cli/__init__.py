"""What the commands do: checks before launch, the ranks' entry, conversion, evaluation, parity.

``tools/`` calls it, and so do the installed commands.  The top: may import everything, is imported
by nothing.
"""
