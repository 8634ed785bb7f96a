"""`load_recipe` turns a file or a mapping into a checked recipe, or raises an error that names file, line and key."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from resm_kernels.files import check_structure, expanded, read_text, shortened
from resm_kernels.files.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_DOCUMENTS, MAX_VALUES, Document, parse_yaml
from resm_kernels.recipe.adapters import AdapterRecipe
from resm_kernels.recipe.documents import DocumentError, link
from resm_kernels.recipe.errors import LocatedError, Location, RecipeError, dotted
from resm_kernels.recipe.schema import ModelEntry, ModuleEntry, Recipe, SliceEntry, SourceEntry
from resm_kernels.recipe.tokens import TokenEntry, TokenizerEntry
from resm_kernels.suggestions import did_you_mean

_ENTRIES: Final[Mapping[str | int, type[BaseModel]]] = {
    "models": ModelEntry,
    "slices": SliceEntry,
    "sources": SourceEntry,
    "modules": ModuleEntry,
    "tokenizer": TokenizerEntry,
    "tokens": TokenEntry,
}


RecipeSource = Recipe | str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""What a recipe can be read from: a path, a mapping, or a mapping for each of several documents."""


def load_recipe(source: RecipeSource, *, adapters: bool = False) -> Recipe:
    """Return the checked recipe of a YAML file (named by its path) or of a mapping with the same structure.

    A file of several documents, or a list of mappings, gives the recipe of the output, which is merged as the document
    without a name says; it has the others as its `documents`. A `Recipe` is returned as it is.

    With `adapters` the result is an `AdapterRecipe`, of one document: the models are adapters that are merged to one,
    so that no method needs a `base_model`, and keys about whole models are errors.

    Raises:
        RecipeError: The file cannot be read or is not YAML, a key is unknown or not supported, or a value is out of
            range; documents have equal names, or refer to each other in a circle.
    """
    kind = AdapterRecipe if adapters else Recipe
    if isinstance(source, kind):
        return source
    if isinstance(source, Recipe):
        raise RecipeError("recipe: got one of whole models, need load_recipe(…, adapters=True), a file or a mapping")
    if isinstance(source, Mapping):
        return _checked([Document(source)], "recipe", [source], kind)
    if not isinstance(source, (str, os.PathLike)):
        entries = list(source)
        return _checked([Document(entry) for entry in entries], "recipe", entries, kind)
    name = os.fspath(source)
    text = read_text(expanded(name, RecipeError, "recipe"), RecipeError, limit=MAX_BYTES, missing="need a recipe")
    return _checked(parse_yaml(text, name, RecipeError), name, text, kind)


def _checked(
    documents: Sequence[Document], name: str, whole: str | Sequence[Mapping[str, Any]], kind: type[Recipe]
) -> Recipe:
    """Return the recipe of documents.

    Args:
        name: What errors call the recipe.
        whole: The text, or the mappings, of all documents.
        kind: `Recipe` or `AdapterRecipe`.
    """
    if not documents:
        raise RecipeError(f"{name}: is empty, need a mapping with merge_method and models")
    if len(documents) > MAX_DOCUMENTS:
        raise RecipeError(f"{name}: has {len(documents)} documents, need at most {MAX_DOCUMENTS}")
    if len(documents) > 1 and kind is AdapterRecipe:
        raise RecipeError(f"{name}: has {len(documents)} documents, need one; merge adapters in several runs")
    recipes = []
    for number, document in enumerate(documents):
        place = f"{name}:{document.first_line}" if len(documents) > 1 and document.first_line else name
        if document.root is None:
            check_structure(document.data, name, RecipeError, max_depth=MAX_DEPTH, max_values=MAX_VALUES)
        if not isinstance(document.data, Mapping):
            which = "" if len(documents) == 1 else f"document {number + 1}: "
            got = "nothing" if document.data is None else type(document.data).__name__
            raise RecipeError(f"{place}: {which}got {got}, need a mapping with merge_method and models")
        own = document.text if isinstance(whole, str) else [document.data]
        try:
            recipes.append(kind.model_validate(dict(document.data)).written_as(own))
        except ValidationError as error:
            # A misspelt key also makes the right one missing. The misspelling is reported first, as it explains both.
            unknown_keys_first = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
            problems = [_describe(problem) for problem in unknown_keys_first]
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            message = _located(documents, number, name, *problems[0])
            raise RecipeError(message + more) from None
    try:
        return link(recipes).written_as(whole)
    except DocumentError as error:
        raise RecipeError(_located(documents, error.number, name, error.error.location, str(error.error))) from None


def _located(documents: Sequence[Document], number: int, name: str, location: Location, message: str) -> str:
    """Return a message that begins with the file, the line, the document, if there are several, and the key."""
    document = documents[number]
    line = document.line(location) or (document.first_line if len(documents) > 1 else None)
    which = None
    if len(documents) > 1:
        own = document.data.get("name")
        which = f"document {number + 1 if own is None else shortened(own)}"
    return ": ".join(filter(None, (f"{name}:{line}" if line else name, which, dotted(location), message)))


def _describe(problem: Any) -> tuple[Location, str]:
    """Return the location of a problem that pydantic reports, and a message about it."""
    location: Location = problem["loc"]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, LocatedError):
        return cause.location, str(cause)
    if problem["type"] == "extra_forbidden":
        entry = next((_ENTRIES[key] for key in reversed(location[:-1]) if key in _ENTRIES), Recipe)
        known = tuple(entry.model_fields)
        return location, f"unknown key{did_you_mean(location[-1], known)}; known: {', '.join(known)}"
    if problem["type"] == "missing":
        return location, "missing; this key is needed"
    if cause is not None:
        return location, str(cause)
    return location, f"got {shortened(problem['input'])}: {problem['msg']}"
