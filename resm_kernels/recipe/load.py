"""`load_recipe` turns a file or a mapping into a checked recipe, or raises an error that names file, line and key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError

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


def load_recipe(source: Recipe | str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """Return the checked recipe of a YAML file (named by its path) or of a mapping with the same structure.

    A `Recipe` is returned as it is.

    Raises:
        RecipeError: The file cannot be read or is not YAML, a key is unknown or not supported, or a value is out of
            range.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _validate(dict(source), "recipe", None, None)
    name = os.fspath(source)
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
        roots = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        if len(roots) > 1:
            raise RecipeError(
                f"{name}:{roots[1].start_mark.line + 1}: a second document; merges in several stages (mergekit-multi) "
                "are not supported: put each stage into a separate file and run them in order"
            )
        root = roots[0] if roots else None
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line_or_file = f"{name}:{mark.line + 1}" if mark else name
        raise RecipeError(f"{line_or_file}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{name}: got {type(data).__name__}, need a mapping with merge_method and models")
    _refuse_duplicate_keys(root, name)
    return _validate(data, name, root, text)


def _validate(data: dict[str, Any], name: str, root: yaml.Node | None, text: str | None) -> Recipe:
    try:
        return Recipe.model_validate(data).written_as(data if text is None else text)
    except ValidationError as error:
        # A misspelt key also makes the right one missing. The misspelling is reported first, as it explains both.
        unknown_keys_first = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        problems = [_describe(problem) for problem in unknown_keys_first]
    location, message = problems[0]
    line = _line(root, location)
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
    return location, f"got {problem['input']!r}: {problem['msg']}"


def _line(node: yaml.Node | None, location: Location) -> int | None:
    """Return the line, counted from 1, of the deepest part of `location` that the file has."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if key.value == str(part)]
            if not pairs:
                break
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _refuse_duplicate_keys(node: yaml.Node | None, name: str) -> None:
    # YAML readers silently keep only the last of two equal keys, so that the author's first value would be ignored.
    if isinstance(node, yaml.MappingNode):
        line_of_key: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key.value, str) and line_of_key.setdefault(key.value, line) != line:
                raise RecipeError(f"{name}:{line}: key {key.value!r} is already set in line {line_of_key[key.value]}")
            _refuse_duplicate_keys(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicate_keys(item, name)
