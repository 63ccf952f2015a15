"""Every setting of a run, the command line made of them, and presets of the papers' recipes.

Standard library only; imports nothing of the package.
"""
