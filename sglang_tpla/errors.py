"""The one base class of this package's exceptions: each says what was expected, what came, where, and what to do."""

from __future__ import annotations


class SglangTplaError(Exception):
    """Anything that this package refuses or fails at."""
