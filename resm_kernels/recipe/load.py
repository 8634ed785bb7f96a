"""`load_recipe` turns a file or a mapping into a checked recipe, or raises an error that names file, line and key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from resm_kernels.files import check_structure, expanded, read_text, shortened
from resm_kernels.files.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, Document, parse_yaml
from resm_kernels.recipe.adapters import AdapterRecipe
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

_SEVERAL: Final = (
    "a second document; merges in several stages (mergekit-multi) are not supported: put each stage into a separate "
    "file and run them in order"
)


def load_recipe(source: Recipe | str | os.PathLike[str] | Mapping[str, Any], *, adapters: bool = False) -> Recipe:
    """Return the checked recipe of a YAML file (named by its path) or of a mapping with the same structure.

    A `Recipe` is returned as it is. With `adapters` the result is an `AdapterRecipe`: the models are adapters that are
    merged to one, so that no method needs a `base_model`, and keys about whole models are errors.

    Raises:
        RecipeError: The file cannot be read or is not YAML, a key is unknown or not supported, or a value is out of
            range.
    """
    kind = AdapterRecipe if adapters else Recipe
    if isinstance(source, kind):
        return source
    if isinstance(source, Recipe):
        raise RecipeError("recipe: got one of whole models, need load_recipe(…, adapters=True), a file or a mapping")
    if isinstance(source, Mapping):
        check_structure(source, "recipe", RecipeError, max_depth=MAX_DEPTH, max_values=MAX_VALUES)
        return _validate(kind, dict(source), "recipe", Document(source, None), None)
    name = os.fspath(source)
    text = read_text(expanded(name, RecipeError, "recipe"), RecipeError, limit=MAX_BYTES, missing="need a recipe")
    document = parse_yaml(text, name, RecipeError, _SEVERAL)
    if not isinstance(document.data, dict):
        raise RecipeError(f"{name}: got {type(document.data).__name__}, need a mapping with merge_method and models")
    return _validate(kind, document.data, name, document, text)


def _validate(kind: type[Recipe], data: dict[str, Any], name: str, document: Document, text: str | None) -> Recipe:
    try:
        return kind.model_validate(data).written_as(data if text is None else text)
    except ValidationError as error:
        # A misspelt key also makes the right one missing. The misspelling is reported first, as it explains both.
        unknown_keys_first = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        problems = [_describe(problem) for problem in unknown_keys_first]
    location, message = problems[0]
    line = document.line(location)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise RecipeError(": ".join(filter(None, (f"{name}:{line}" if line else name, dotted(location), message))) + more)


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
