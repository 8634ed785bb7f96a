"""Writes the output's model card, which names the models and the method and holds the recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import yaml

from resm_kernels._version import __version__
from resm_kernels.checkpoint import CheckpointError
from resm_kernels.engine.models import Model, OpenedModels
from resm_kernels.files import read_bytes
from resm_kernels.hub import cached_commit, parse_id
from resm_kernels.recipe import Recipe

RECIPE_FILE: Final = "mergekit_config.yml"
"""The file of an output that has the recipe, under the name that tools look for."""
_COMMIT: Final = re.compile(rb"[0-9a-zA-Z]{1,64}")


def model_card_files(recipe: Recipe, models: OpenedModels, title: str) -> Mapping[str, bytes]:
    """Return README.md with the hub's metadata, and the recipe under the name that tools look for.

    The metadata's `base_model` lists the models that the recipe names like hub ids, such as org/model. The text gives
    the revision of models that were downloaded from the hub.
    """
    names = list(
        dict.fromkeys([*([recipe.base_model] if recipe.base_model else []), *(s.model for s in recipe.sources)])
    )
    parsed = [parse_id(part) for name in names for part in name.split("+")]
    hub = list(dict.fromkeys(found[0] for found in parsed if found is not None))
    metadata = {"base_model": hub, "library_name": "transformers", "tags": ["mergekit", "merge", "resm-kernels"]}
    method = recipe.method
    revisions = {source.model: _revisions(model) for source, model in models.by_source.items()}
    base = ""
    if recipe.base_model:
        base = f", with {_link(recipe.base_model)}{_revisions(models.reference)} as the base model"
    merged = [name for name in names if name != recipe.base_model]
    text = f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---
# {title}

A merge of pre-trained language models, made with resm-kernels {__version__}.

## Method

[{method.title}]({method.reference}){base}.

## Models

{chr(10).join(f"* {_link(name)}{revisions.get(name, '')}" for name in merged)}

## Recipe

```yaml
{recipe.text.strip()}
```
"""
    return {"README.md": text.encode(), RECIPE_FILE: f"{recipe.text.strip()}\n".encode()}


def _link(name: str) -> str:
    linked = []
    for part in name.split("+"):
        found = parse_id(part)
        linked.append(part if found is None else f"[{part}](https://huggingface.co/{found[0]})")
    return " + ".join(linked)


def _revisions(model: Model) -> str:
    """Return the hub's commit of a model, and that of an adapter's base model before it; "" if they have none."""
    base = model.base_folder if model.form.config_file is not None else model.folder
    commits = [_commit(folder) for folder in dict.fromkeys((base, model.folder))]
    named = [commit for commit in commits if commit]
    return f" (revision {' + '.join(named)})" if named else ""


def _commit(folder: Path) -> str:
    """Return the hub's commit that a folder was downloaded from, if the hub's client has recorded it, else ""."""
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if os.path.lexists(note):
        recorded = read_bytes(note, CheckpointError).partition(b"\n")[0].strip()
        return recorded.decode() if _COMMIT.fullmatch(recorded) else ""
    cached = cached_commit(folder)
    return "" if cached is None else cached[1]
