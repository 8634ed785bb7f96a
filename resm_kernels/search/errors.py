"""The errors of searches."""

from __future__ import annotations


class SearchError(ValueError):
    """A search cannot be done; the message names the cause and the need."""


class NotFiniteError(SearchError):
    """A merge has been judged by a score that is infinite or not a number."""


class EvaluateError(SearchError):
    """The function that judges merges has raised an exception.

    Attributes:
        traceback: Where, as Python prints it.
    """

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


class ChangedModelError(SearchError):
    """The function that judges merges has left the model in another state, so that it can judge no other merge."""


class TimeIsUp(BaseException):
    """The search's time ended while a merge was judged. No handler of errors is to catch it but the search's own."""
