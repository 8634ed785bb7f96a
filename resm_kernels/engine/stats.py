"""What RESM sees in a recipe's models: sparsity, outlier mass, weights and ranks of every tensor, on demand spectra."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import parse_size
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.plan import TensorJob, plan_merge
from resm_kernels.engine.window import DEFAULT_WINDOW, Job, Pipeline, Window
from resm_kernels.linalg import (
    decay_exponent,
    decompose_list,
    effective_rank,
    energy_rank,
    stable_rank,
    task_interference,
)
from resm_kernels.linalg.products import task_matrix
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
_SAMPLES: Final = 64
"""Most points of a spectrum that are kept: enough to draw it, and a bound for the JSON of a large model."""


@dataclass(frozen=True)
class Spectra:
    """Singular values of one matrix's task vectors Δ_t and how far their subspaces coincide; lists as in TensorStats.

    Attributes:
        indices: i of the singular values that `values` holds: at most 64 from 1 to r, evenly spaced on a log scale.
        values: σ_i/σ_1 there, for each expert.
        largest: σ_1.
        frobenius: ‖Δ_t‖_F.
        nuclear: ‖Δ_t‖_*, the sum of the singular values.
        effective_rank: exp of the entropy of σ/Σσ (Roy and Vetterli 2007).
        stable_rank: ‖Δ_t‖_F²/σ_1².
        rank_90, rank_99: The smallest rank with that share of ‖Δ_t‖_F².
        decay: α of σ_i ∝ i^−α (`linalg.decay_exponent`); NaN where there are too few.
        kept: k_t of the subspaces compared below: RESM's rank, or the numerical rank if that is smaller.
        left_overlap: ‖U_sᵀU_t‖_F²/min(k_s, k_t) of every two experts: 0 orthogonal, 1 contained.
        right_overlap: The same of V.
        left_expected, right_expected: What random subspaces of these ranks have on average.
        interference: Share of an expert's squared norm within the subspaces of another (`linalg.task_interference`).
        interference_expected: What random subspaces have on average.
        sti: Singular task interference of arXiv 2412.00081, of the truncated task vectors.
    """

    indices: list[int]
    values: list[list[float]]
    largest: list[float]
    frobenius: list[float]
    nuclear: list[float]
    effective_rank: list[float]
    stable_rank: list[float]
    rank_90: list[int]
    rank_99: list[int]
    decay: list[float]
    kept: list[int]
    left_overlap: list[list[float]]
    right_overlap: list[list[float]]
    left_expected: list[list[float]]
    right_expected: list[list[float]]
    interference: float
    interference_expected: float
    sti: float


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
        spectra: Singular values and overlaps, where they were asked for and RESM decomposes the tensor; else None.
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
    spectra: Spectra | None = None


def checkpoint_stats(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    *,
    memory_limit: str | int = DEFAULT_WINDOW,
    progress: Any = None,
    spectra: bool = False,
) -> list[TensorStats]:
    """Return RESM's statistics for every floating-point tensor, with the recipe's parameters if it is a RESM recipe.

    A tensor with NaN or infinite values gets an entry that says so instead of failing: this is the command to find it
    with. `spectra` adds singular values and overlaps of every tensor that RESM decomposes, and takes as long as a
    merge does. Other arguments and errors are those of `merge_checkpoints`; a recipe without a base model is a
    MergeError.
    """
    recipe = load_recipe(recipe)
    if recipe.base_model is None:
        raise MergeError("base_model: missing; statistics are of the differences from a base model")
    lists = [[source.model for source in piece.experts] for part in recipe.parts for piece in part.slices]
    if any(names != lists[0] for names in lists):
        raise MergeError("slices: statistics need the same experts everywhere, got several lists of them")
    if recipe.merge_method != "resm":
        recipe = _as_resm(recipe)
    rows: list[TensorStats] = []
    with plan_merge(recipe, memory_limit=memory_limit, dense=True) as plan:
        jobs = [replace(j, output_bytes=0) for j in plan.jobs if not j.copied]
        if spectra:
            jobs = [replace(j, workspace=max(j.workspace, _workspace(j))) for j in jobs]

        def compute(job: Job, tensors: list[Tensor]) -> None:
            assert isinstance(job, TensorJob)
            try:
                found = layer_plan(tensors[0], tensors[1:], **job.parameters)
                row = _row(job, found)
                if spectra and found.spectral:
                    method = "exact" if job.parameters.get("decomposition") == "exact" else "gram"
                    row = replace(row, spectra=tensor_spectra(tensors[0], tensors[1:], found.ranks, method))
                rows.append(row)
            except NonFiniteError as error:
                problem = f"{error.count} NaN or infinite values in {job.folder(error.index)}"
                rows.append(TensorStats(job.name, job.shape, False, [], [], [], [], {}, problem))

        window = Window.fit(jobs, parse_size(memory_limit, "memory_limit"))
        Pipeline(jobs=jobs, window=window, compute=compute, progress=progress).run()
    return rows


def tensor_spectra(base: Tensor, experts: Sequence[Tensor], ranks: Sequence[int], method: str = "gram") -> Spectra:
    """Spectra of one tensor's task vectors, and overlaps of their dominant subspaces.

    Args:
        base, experts: Matrices of one shape, finite.
        ranks: k_t, how many directions of each expert are compared.
        method: As for `linalg.decompose`, which has all singular values.

    Determinism: the same bits for the same input, whatever the number of threads.
    """
    found = decompose_list([task_matrix(base, expert) for expert in experts], method)
    parts = [d.truncate(k) for d, k in zip(found, ranks, strict=True)]
    values = [d.singular_values.cpu() for d in found]
    del found
    indices = _log_spaced(min(base.shape))
    shared = task_interference(parts)
    return Spectra(
        indices=indices,
        values=[_relative(v)[torch.tensor(indices) - 1].tolist() for v in values],
        largest=[float(v[0]) for v in values],
        frobenius=[float(v.square().sum().sqrt()) for v in values],
        nuclear=[float(v.sum()) for v in values],
        effective_rank=[effective_rank(v) for v in values],
        stable_rank=[stable_rank(v) for v in values],
        rank_90=[energy_rank(v, 0.9) for v in values],
        rank_99=[energy_rank(v, 0.99) for v in values],
        decay=[decay_exponent(v) for v in values],
        kept=[p.core.shape[0] for p in parts],
        left_overlap=shared.left,
        right_overlap=shared.right,
        left_expected=shared.left_expected,
        right_expected=shared.right_expected,
        interference=shared.interference,
        interference_expected=shared.expected,
        sti=shared.sti,
    )


def _log_spaced(r: int) -> list[int]:
    """At most `_SAMPLES` different integers from 1 to r."""
    steps = _SAMPLES - 1
    return list(range(1, r + 1)) if r <= _SAMPLES else sorted({round(r ** (i / steps)) for i in range(_SAMPLES)})


def _relative(values: Tensor) -> Tensor:
    return values / values[0] if float(values[0]) > 0 else values


def _workspace(job: TensorJob) -> int:
    """Bytes `tensor_spectra` allocates: task vectors, Gram matrices and what eigh makes of them, bases, their products.

    All experts are in memory at once, each solved by a thread of its own at most; the ranks of all together are at most
    r. Peaks measured with two threads were half of this.
    """
    if len(job.shape) != 2:
        return 0
    m, n = job.shape
    r, n_experts = min(m, n), len(job.inputs) - 1
    item = max(info.dtype.itemsize for _, info in job.inputs)
    return (24 << 20) + n_experts * (max(item, 4) * m * n + 40 * r * r) + 24 * (m + n) * r + 24 * r * r


def _as_resm(recipe: Recipe) -> Recipe:
    """The same models and slices, merged by RESM with its default parameters."""

    def bare(entry: Any) -> Any:
        return entry.model_copy(update={"parameters": {}})

    def slices(entries: Any) -> Any:
        return entries and [bare(e).model_copy(update={"sources": [bare(s) for s in e.sources]}) for e in entries]

    def modules(entries: Any) -> Any:
        return entries and {
            name: bare(e).model_copy(
                update={"models": e.models and [bare(m) for m in e.models], "slices": slices(e.slices)}
            )
            for name, e in entries.items()
        }

    data = {
        "merge_method": get("resm").name,
        "base_model": recipe.base_model,
        "models": recipe.models and [bare(entry) for entry in recipe.models],
        "slices": slices(recipe.slices),
        "modules": modules(recipe.modules),
        "tokenizer": recipe.output_tokenizer,
    }
    return load_recipe({key: value for key, value in data.items() if value is not None})


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


def _numbers(tensor: Tensor) -> list[float | int]:
    return [v if isinstance(v, int) or math.isfinite(v) else math.nan for v in tensor.tolist()]
