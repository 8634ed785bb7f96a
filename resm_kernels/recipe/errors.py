"""The errors about recipes, and the locations that they name."""

from __future__ import annotations

from resm_kernels.files import Location, dotted

__all__ = ["LocatedError", "Location", "RecipeError", "dotted"]


class RecipeError(ValueError):
    """A recipe cannot be used. The message names the line and the key, the value that it has and the need."""


class LocatedError(ValueError):
    """The part of a recipe at `location` is wrong. `load_recipe` turns it into a RecipeError that names the line."""

    def __init__(self, location: Location, message: str) -> None:
        super().__init__(message)
        self.location = location
