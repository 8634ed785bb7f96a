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
from resm_kernels.engine.models import OpenedModels
from resm_kernels.files import read_bytes
from resm_kernels.recipe import Recipe

_COMMIT: Final = re.compile(rb"[0-9a-zA-Z]{1,64}")
_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card_files(recipe: Recipe, models: OpenedModels, title: str) -> Mapping[str, bytes]:
    """Return README.md with the hub's metadata, and the recipe under the name that tools look for.

    The metadata's `base_model` lists the models that the recipe names like hub ids, such as org/model. The text gives
    the revision of models that were downloaded from the hub.
    """
    names = list(
        dict.fromkeys([*([recipe.base_model] if recipe.base_model else []), *(s.model for s in recipe.sources)])
    )
    hub = [part for name in names for part in name.split("+") if _HUB_ID.fullmatch(part)]
    metadata = {"base_model": hub, "library_name": "transformers", "tags": ["mergekit", "merge", "resm-kernels"]}
    method = recipe.method
    base = f", with {_link(recipe.base_model)} as the base model" if recipe.base_model else ""
    revisions = {source.model: _revision(model.folder) for source, model in models.by_source.items()}
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
    return {"README.md": text.encode(), "mergekit_config.yml": f"{recipe.text.strip()}\n".encode()}


def _link(name: str) -> str:
    return " + ".join(f"[{p}](https://huggingface.co/{p})" if _HUB_ID.fullmatch(p) else p for p in name.split("+"))


def _revision(folder: Path) -> str:
    """Return the hub's commit that a folder was downloaded from, if the hub's client has recorded it, else ""."""
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    commit = folder.resolve().name if folder.resolve().parent.name == "snapshots" else ""
    if os.path.lexists(note):
        recorded = read_bytes(note, CheckpointError).partition(b"\n")[0].strip()
        commit = recorded.decode() if _COMMIT.fullmatch(recorded) else ""
    return f" (revision {commit})" if commit else ""
