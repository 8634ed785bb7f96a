"""The error of searches."""

from __future__ import annotations


class SearchError(ValueError):
    """A search cannot be done; the message names the cause and the need."""


class NotFiniteError(SearchError):
    """A merge has been judged by a score that is infinite or not a number."""
