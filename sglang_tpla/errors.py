"""The base class of this package's exceptions; each says what was expected, what came, where, and what to do."""


class SglangTplaError(Exception):
    """Anything that this package refuses or fails at."""
