"""What RESM sees in a recipe's models: sparsity, outlier mass, weights and ranks of every tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from resm_kernels.checkpoint import parse_size
from resm_kernels.engine.plan import MergeError, TensorJob, plan_merge
from resm_kernels.engine.window import DEFAULT_WINDOW, Job, Pipeline, Window
from resm_kernels.methods import get
from resm_kernels.methods.resm import LayerPlan, layer_plan
from resm_kernels.ops import NonFiniteError
from resm_kernels.recipe import Recipe, load_recipe

_STATISTICS = (
    "numel",
    "sum",
    "sum_sq",
    "sum_abs",
    "max_abs",
    "n_zero",
    "n_small",
    "n_outlier",
    "outlier_sum_abs",
    "n_nonfinite",
)


@dataclass(frozen=True)
class TensorStats:
    """RESM's view of one tensor; lists have one entry per expert.

    Attributes:
        name: The tensor.
        shape: Its shape.
        spectral: True if RESM decomposes it, False if it averages its task vectors.
        sparsity: s_t, share of weights the expert left (nearly) unchanged.
        outlier_mass: a_t, Σ|δ| of the outliers per parameter.
        weights: w_t, mean 1 before user weights.
        ranks: k_t; empty if not spectral.
        statistics: Every statistic of the task vectors by name.
        problem: Why there are none (NaN or infinite values), else None.
    """

    name: str
    shape: tuple[int, ...]
    spectral: bool
    sparsity: list[float]
    outlier_mass: list[float]
    weights: list[float]
    ranks: list[int]
    statistics: Mapping[str, list[float | int]]
    problem: str | None = None


def checkpoint_stats(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    *,
    memory_limit: str | int = DEFAULT_WINDOW,
    progress: Any = None,
) -> list[TensorStats]:
    """Return RESM's statistics for every floating-point tensor, with the recipe's parameters if it is a RESM recipe.

    A tensor with NaN or infinite values gets an entry that says so instead of failing: this is the command to find it
    with. Arguments and errors are those of `merge_checkpoints`; a recipe without a base model is a MergeError.
    """
    recipe = load_recipe(recipe)
    if recipe.base_model is None:
        raise MergeError("base_model: missing; statistics are of the differences from a base model")
    if recipe.merge_method != "resm":
        recipe = _as_resm(recipe)
    rows: list[TensorStats] = []
    with plan_merge(recipe, memory_limit=memory_limit) as plan:
        jobs = [replace(j, output_bytes=0) for j in plan.jobs if not j.copied]

        def compute(job: Job, tensors: list[torch.Tensor]) -> None:
            assert isinstance(job, TensorJob)
            try:
                rows.append(_row(job, layer_plan(tensors[0], tensors[1:], **job.parameters)))
            except NonFiniteError as error:
                problem = f"{error.count} NaN or infinite values in {plan.inputs_label(error.index)}"
                rows.append(TensorStats(job.name, job.shape, False, [], [], [], [], {}, problem))

        window = Window.fit(jobs, parse_size(memory_limit, "memory_limit"))
        Pipeline(jobs=jobs, window=window, compute=compute, progress=progress).run()
    return rows


def _as_resm(recipe: Recipe) -> Recipe:
    entries = [{"model": entry.model} for entry in recipe.models]
    return load_recipe({"merge_method": get("resm").name, "base_model": recipe.base_model, "models": entries})


def _row(job: TensorJob, found: LayerPlan) -> TensorStats:
    statistics = {name: _numbers(getattr(found.stats, name)) for name in _STATISTICS}
    statistics["mean"] = _numbers(found.stats.mean())
    statistics["rms"] = _numbers(found.stats.rms())
    return TensorStats(
        name=job.name,
        shape=found.shape,
        spectral=found.spectral,
        sparsity=found.sparsity,
        outlier_mass=found.outlier_mass,
        weights=found.weights,
        ranks=found.ranks,
        statistics=statistics,
    )


def _numbers(tensor: torch.Tensor) -> list[float | int]:
    return [v if isinstance(v, int) or math.isfinite(v) else math.nan for v in tensor.tolist()]
