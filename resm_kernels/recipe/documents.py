"""Recipes of several documents: which document refers to which, in which order they are merged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resm_kernels.files import expanded, shortened
from resm_kernels.recipe.errors import LocatedError, Location, RecipeError
from resm_kernels.recipe.tokens import BASE, UNION

if TYPE_CHECKING:
    from resm_kernels.recipe.schema import Recipe


class DocumentError(Exception):
    """A document cannot be used: its number, and the error that says what is wrong with it."""

    def __init__(self, number: int, error: LocatedError) -> None:
        super().__init__(number, error)
        self.number, self.error = number, error


def link(recipes: Sequence[Recipe]) -> Recipe:
    """Return the recipe of the output, with all others as its `documents`.

    The output is what the document without a name merges. The others are known by their names to all documents.

    Raises:
        DocumentError: Two documents have one name or none, or every one has a name, or documents refer to each other in
            a circle.
    """
    numbers: dict[str | None, int] = {}
    for number, recipe in enumerate(recipes):
        if recipe.name in numbers:
            first = numbers[recipe.name] + 1
            if recipe.name is None:
                raise _error(number, ("name",), f"missing, as in document {first}; only the output has no name")
            raise _error(number, ("name",), f"got {shortened(recipe.name)}, which is document {first}'s name already")
        numbers[recipe.name] = number
    if None not in numbers:
        message = "every document has a name, need one without: its merge is the output"
        raise _error(len(recipes) - 1, ("name",), message)
    done: dict[str, Recipe] = {}
    for name in [*(n for n in numbers if n is not None), None]:
        _link_one(name, recipes, numbers, [], done)
    output = recipes[numbers[None]]
    return output.with_documents(done)


def document_name(path: str, names: Mapping[str, object]) -> str | None:
    """Return the name of the document that the model `path` of a recipe is, or is an adapter on; None if it is none."""
    name = path if path in names else path.partition("+")[0]
    return name if name in names else None


def unread_documents(recipe: Recipe) -> list[str]:
    """Return the names of the documents that neither the output nor a document that it is merged from refers to."""
    read: set[str] = set()
    for _, model in _references(recipe):
        name = document_name(model, recipe.documents)
        if name is not None:
            read |= {name, *recipe.documents[name].documents}
    return [name for name in recipe.documents if name not in read]


def kept_folders(recipe: Recipe, folder: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Return for each document the folder within `folder` that its merge is kept in; none if `folder` is None."""
    if folder is None:
        return {}
    parent = Path(os.path.realpath(expanded(folder, RecipeError, "keep_intermediates")))
    return {name: parent / name for name in recipe.documents}


def _link_one(
    name: str | None,
    recipes: Sequence[Recipe],
    numbers: Mapping[str | None, int],
    within: Sequence[str],
    done: dict[str, Recipe],
) -> None:
    """Put a document into `done` after those that it refers to; `within` are the documents that refer to it."""
    number = numbers[name]
    recipe, names = recipes[number], {n: n for n in numbers if n is not None}
    path = [*within, name] if name is not None else [*within]
    needed: dict[str, None] = {}
    for location, model in _references(recipe):
        other = document_name(model, names)
        if other is None:
            continue
        if other in path:
            circle = " → ".join([*path[path.index(other) :], other])
            raise _error(number, location, f"documents must not refer to each other in a circle ({circle})")
        if other not in done:
            _link_one(other, recipes, numbers, path, done)
        needed |= dict.fromkeys([*done[other].documents, other])
    if name is not None:
        done[name] = recipe.with_documents({n: r for n, r in done.items() if n in needed})


def _references(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield every model of a recipe that may be a document, with its location."""
    if recipe.base_model is not None:
        yield ("base_model",), recipe.base_model
    for source in recipe.sources:
        yield source.model_location, source.model
    entry = recipe.output_tokenizer
    if entry is None:
        return
    if entry.source not in (BASE, UNION):
        key: Location = ("tokenizer", "source") if recipe.tokenizer is not None else ("tokenizer_source",)
        yield key, entry.source
    for token, chosen in entry.tokens.items():
        if chosen.source is not None and chosen.source.model is not None:
            yield ("tokenizer", "tokens", token, "source"), chosen.source.model


def _error(number: int, location: Location, message: str) -> DocumentError:
    return DocumentError(number, LocatedError(location, message))
