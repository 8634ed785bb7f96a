"""Files of random statistics, for tests of recipes that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import Family
from inputs import randn
from torch import Tensor

from resm_kernels.checkpoint import CheckpointReader
from resm_kernels.checkpoint.statistics import StatisticsInfo, write_statistics

Statistics = dict[str, Tensor]
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Modules of a Llama that get the same input as another one, and that one."""


def leader(name: str) -> str:
    """The weight that a weight shares its Gram matrix with; itself if it shares none."""
    return next((name.replace(module, other) for module, other in SHARED.items() if module in name), name)


def grams_of(shapes: dict[str, tuple[int, ...]], seed: int) -> tuple[Statistics, dict[str, str]]:
    """Random Gram matrices of all linear layers, and which of these share another one's."""
    grams: Statistics = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if name.endswith("proj.weight") and leader(name) == name:
            x = randn(2 * shape[1], shape[1], seed=100 * seed + i)
            grams[name] = x.mT @ x / len(x)
    return grams, {name: leader(name) for name in shapes if name.endswith("proj.weight") and leader(name) != name}


def fishers_of(shapes: dict[str, tuple[int, ...]], seed: int) -> Statistics:
    return {name: randn(*shape, seed=100 * seed + i).square() for i, (name, shape) in enumerate(shapes.items())}


def write(file: Path, folder: Path, kind: str, seed: int = 0, **changes: Any) -> Statistics:
    """Write random statistics of a model, and return them by the names of all weights that have one."""
    with CheckpointReader(folder) as reader:
        shapes = {name: info.shape for name, info in reader.tensors.items() if info.dtype.is_floating_point}
        fingerprint = reader.fingerprint()
    tensors, shared = grams_of(shapes, seed) if kind == "gram" else (fishers_of(shapes, seed), {})
    tensors = changes.pop("tensors", lambda t: t)(tensors)
    entries = {
        "model": str(folder),
        "answers_by": str(folder),
        "fingerprint": fingerprint,
        "prompts": 5,
        "tokens": 1234,
        "shared": shared,
    }
    write_statistics(file, tensors, StatisticsInfo(kind=kind, **entries | changes))
    return tensors | {name: tensors[stored] for name, stored in shared.items() if stored in tensors}


def with_statistics(family: Family, method: str = "regmean", **keys: Any) -> tuple[dict[str, Any], list[Statistics]]:
    """A recipe with a file of statistics for every expert, and the statistics."""
    kind = "fisher" if method == "fisher" else "gram"
    merged = {"fingerprint": "of a merge"} if method == "regmean_plus" else {}
    files = [family.root / f"expert{t}.statistics.safetensors" for t in range(len(family.folders))]
    statistics = [
        write(file, folder, kind, seed=t, **merged)
        for t, (file, folder) in enumerate(zip(files, family.folders, strict=True))
    ]
    models = [{"model": str(m), "statistics": str(f)} for m, f in zip(family.folders, files, strict=True)]
    return family.recipe(method, models=models) | keys, statistics
