"""The base class of every error of this package."""


class GlmlensError(Exception):
    """Base class of the errors of glmlens: each message has what was asked, what was found and what to type instead."""
