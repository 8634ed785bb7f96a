"""The errors about recipes, and the locations that they name."""

from __future__ import annotations

Location = tuple[str | int, ...]
"""The keys and list indices that lead to a part of a recipe: ("slices", 0, "sources", 1, "model")."""


class RecipeError(ValueError):
    """A recipe cannot be used. The message names the line and the key, the value that it has and the need."""


class LocatedError(ValueError):
    """The part of a recipe at `location` is wrong. `load_recipe` turns it into a RecipeError that names the line."""

    def __init__(self, location: Location, message: str) -> None:
        super().__init__(message)
        self.location = location


def dotted(location: Location) -> str:
    """Return a location as people write it: slices[0].sources[1].model."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
