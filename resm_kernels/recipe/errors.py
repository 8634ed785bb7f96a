"""How a recipe that cannot be used is reported."""

from __future__ import annotations

Location = tuple[str | int, ...]


class RecipeError(ValueError):
    """A recipe cannot be used; the message says where in the file, what was got and what is needed."""


class ProblemAt(ValueError):
    """A problem with the part of a recipe at `location`; `load_recipe` makes a RecipeError with its line of it."""

    def __init__(self, location: Location, message: str) -> None:
        super().__init__(message)
        self.location = location


def dotted(location: Location) -> str:
    """The location as people write it: slices[0].sources[1].model."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
