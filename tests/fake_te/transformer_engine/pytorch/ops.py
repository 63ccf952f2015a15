"""Fusible operations: named in annotations alone."""


class Sequential:
    """Not used."""


class FusibleOperation:
    """Not used."""
