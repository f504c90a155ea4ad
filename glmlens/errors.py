"""The base class of every error of this package."""


class GlmlensError(Exception):
    """An error that glmlens raises on purpose: its message says what was asked, what was there, and what to type."""
