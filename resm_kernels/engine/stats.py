"""RESM's statistics of a recipe's models: sparsity, outlier mass, weights and ranks of every tensor, and spectra."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from pydantic import BaseModel
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.engine.cpu_executor import CpuExecutor
from resm_kernels.engine.matrices import as_out_in
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.pipeline import Pipeline
from resm_kernels.engine.plan import MergePlan, plan_merge
from resm_kernels.engine.tensor_jobs import TensorJob
from resm_kernels.engine.window import Window
from resm_kernels.linalg import (
    decay_exponent,
    decompose_list,
    effective_rank,
    energy_rank,
    stable_rank,
    task_interference,
)
from resm_kernels.linalg.products import task_matrix
from resm_kernels.methods.resm import layer_plan
from resm_kernels.options import MergeOptions
from resm_kernels.recipe import Recipe, RecipeSource, load_recipe

_STATISTICS: Final = (
    *("numel", "sum", "sum_sq", "sum_abs", "max_abs", "n_zero", "n_small", "n_outlier", "outlier_sum_abs"),
    "n_nonfinite",
)
_SAMPLES: Final = 64
"""The most points of a spectrum that are stored: enough to draw it, and a bound on the JSON of a large model."""


@dataclass(frozen=True)
class Spectra:
    """Singular values of one matrix's task vectors Δ_t, and overlaps of their dominant subspaces.

    Lists have one entry per expert, lists of lists one per pair of experts or per expert and singular value.

    Attributes:
        indices: The i of the singular values in `values`: at most 64 from 1 to r, evenly spaced on a log scale.
        values: σ_i/σ_1 at these indices, for each expert.
        largest: σ_1.
        frobenius: ‖Δ_t‖_F.
        nuclear: ‖Δ_t‖_*, the sum of the singular values.
        effective_rank: exp of the entropy of σ/Σσ (Roy and Vetterli 2007).
        stable_rank: ‖Δ_t‖_F²/σ_1².
        rank_90, rank_99: The smallest rank that has 90 % and 99 % of ‖Δ_t‖_F².
        decay: α of σ_i ∝ i^−α (`linalg.decay_exponent`); NaN where there are too few singular values.
        kept: k_t of the subspaces compared below: RESM's rank, or the numerical rank if that is smaller.
        left_overlap: ‖U_sᵀU_t‖_F²/min(k_s, k_t) of every two experts: 0 if orthogonal, 1 if one contains the other.
        right_overlap: The same for V.
        left_expected, right_expected: The mean overlaps of random subspaces of these ranks.
        interference: The share of an expert's squared norm within the subspaces of another
            (`linalg.task_interference`).
        interference_expected: The mean interference of random subspaces.
        sti: Singular task interference (arXiv 2412.00081) of the truncated task vectors.
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
    """RESM's statistics of one tensor, or of one of its matrices; lists have one entry per expert.

    Attributes:
        name: The tensor.
        role: Its role, one of `resm_kernels.roles.Role`.
        slice: The number of the matrix, from 0, if the tensor holds several and RESM merges each alone: an expert of
            fused experts, or a group of a convolution. None for a tensor as a whole.
        shape: The shape of the tensor, or of the matrix (out, in) that RESM decomposes.
        spectral: True if RESM decomposes it, False if it averages its task vectors.
        sparsity: s_t, the share of weights that the expert changed by no more than ε.
        outlier_mass: a_t, Σ|δ| over the outliers divided by the number of parameters.
        weights: w_t, whose mean is 1 before they are multiplied by the recipe's weights.
        ranks: k_t; empty if not spectral.
        statistics: Every statistic of the task vectors by name.
        problem: Why there are no statistics (NaN or infinite values), else None.
        spectra: Singular values and overlaps if they were asked for and RESM decomposes the tensor, else None.
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
    role: str = "other"
    slice: int | None = None


def checkpoint_stats(
    recipe: RecipeSource,
    *,
    memory_limit: str | int = MergeOptions.memory_limit,
    progress: Callable[[int, int], None] | None = None,
    spectra: bool = False,
    strict: bool = MergeOptions.strict,
    say: Callable[[Sequence[str]], None] | None = None,
) -> list[TensorStats]:
    """Return RESM's statistics of every floating-point tensor of a recipe's models, or of each matrix that it holds.

    They are computed with the recipe's parameters if its method is RESM, else with RESM's defaults. A tensor with NaN
    or infinite values raises no error: its entry says so, and names the damaged model.

    Args:
        recipe: As for `merge_checkpoints`.
        memory_limit: As for `merge_checkpoints`.
        progress: As for `merge_checkpoints`; tensors count when their statistics are complete.
        spectra: Also return singular values and overlaps of every tensor that RESM decomposes, which takes as long as a
            merge.
        strict: As for `merge_checkpoints`.
        say: Called with lines about what is left out of the models, renamed or added, and what their configurations
            say differently, before tensors are read.

    Raises:
        MergeError: The recipe has no base model, or merges different experts in different layers.
        RecipeError, CheckpointError: As for `merge_checkpoints`.
    """
    recipe = load_recipe(recipe)
    if recipe.base_model is None:
        raise MergeError("base_model: missing; statistics are of task vectors, which need a base model")
    lists = [[source.model for source in piece.experts] for part in recipe.parts for piece in part.slices]
    if any(names != lists[0] for names in lists):
        raise MergeError("slices: statistics need the same experts everywhere, got several lists of them")
    rows: list[TensorStats] = []
    options = MergeOptions(memory_limit=memory_limit, strict=strict)
    with plan_merge(as_resm(recipe), options=options, dense=True) as plan:
        if say is not None:
            say(plan.said)
        jobs = stats_jobs(plan, spectra=spectra)

        def compute(job: TensorJob, tensors: list[Tensor]) -> None:
            rows.extend(job_stats(job, tensors[0], tensors[1:], spectra=spectra))

        Pipeline(jobs, Window.for_cpu(jobs, options.window_bytes), CpuExecutor(compute), progress=progress).run()
    return rows


def tensor_spectra(base: Tensor, experts: Sequence[Tensor], ranks: Sequence[int], method: str = "gram") -> Spectra:
    """Return the spectra of one tensor's task vectors, and overlaps of their dominant subspaces.

    Args:
        base, experts: Matrices of one shape, finite.
        ranks: k_t, the number of dominant directions of each expert that are compared.
        method: A method of `linalg.decompose` that computes all singular values.

    Determinism: the same bits for the same input, whatever the number of threads.
    """
    decompositions = decompose_list([task_matrix(base, expert) for expert in experts], method)
    truncated = [d.truncate(k) for d, k in zip(decompositions, ranks, strict=True)]
    values = [d.singular_values.cpu() for d in decompositions]
    del decompositions
    indices = _log_spaced(min(base.shape))
    overlap = task_interference(truncated)
    return Spectra(
        indices=indices,
        values=[(v / (float(v[0]) or 1.0))[torch.tensor(indices) - 1].tolist() for v in values],
        largest=[float(v[0]) for v in values],
        frobenius=[float(v.square().sum().sqrt()) for v in values],
        nuclear=[float(v.sum()) for v in values],
        effective_rank=[effective_rank(v) for v in values],
        stable_rank=[stable_rank(v) for v in values],
        rank_90=[energy_rank(v, 0.9) for v in values],
        rank_99=[energy_rank(v, 0.99) for v in values],
        decay=[decay_exponent(v) for v in values],
        kept=[p.core.shape[0] for p in truncated],
        left_overlap=overlap.left,
        right_overlap=overlap.right,
        left_expected=overlap.left_expected,
        right_expected=overlap.right_expected,
        interference=overlap.interference,
        interference_expected=overlap.expected,
        sti=overlap.sti,
    )


def _log_spaced(r: int) -> list[int]:
    """Return at most `_SAMPLES` different integers from 1 to r, evenly spaced on a log scale."""
    steps = _SAMPLES - 1
    return list(range(1, r + 1)) if r <= _SAMPLES else sorted({round(r ** (i / steps)) for i in range(_SAMPLES)})


def _spectra_workspace(job: TensorJob) -> int:
    """Return the bytes that `tensor_spectra` allocates at most.

    These are task vectors, Gram matrices, the results of eigh, bases and their products. All experts are in memory at
    once, each is solved by one thread, and the ranks of all experts together are at most r. Peaks measured with two
    threads were half of this.
    """
    shape = job.shape if job.matrices is None else (job.matrices.rows, job.matrices.columns)
    if len(shape) != 2:
        return 0
    m, n = shape
    r, n_experts = min(m, n), len(job.inputs) - 1
    item = max(info.dtype.itemsize for _, info in job.inputs)
    return (24 << 20) + n_experts * (max(item, 4) * m * n + 40 * r * r) + 24 * (m + n) * r + 24 * r * r


def as_resm(recipe: Recipe, *, base: str | None = None, without: Collection[str] = ()) -> Recipe:
    """Return a recipe of the same models and slices that merges them by RESM, with its default parameters.

    A recipe of RESM is returned as it is if no model is left out.

    Args:
        base: The base model, for a recipe of whole models that names none.
        without: Names of models that are left out of a recipe of whole models.
    """
    if recipe.merge_method == "resm" and not without:
        return recipe
    data = {name: _without_parameters(getattr(recipe, name)) for name in ("base_model", "models", "slices", "modules")}
    data |= {"merge_method": "resm", "tokenizer": recipe.output_tokenizer}
    if base is not None:
        data["base_model"] = base
    if without:
        data["models"] = [entry for entry in data["models"] if entry.model not in without]
    same = load_recipe({key: value for key, value in data.items() if value is not None})
    return same.with_documents(recipe.documents)


def _without_parameters(entry: Any) -> Any:
    """Return an entry of a recipe without its `parameters` and `statistics` and those of the entries in it."""
    if isinstance(entry, BaseModel):
        fields = {key: _without_parameters(value) for key, value in entry if key not in ("parameters", "statistics")}
        return type(entry).model_construct(**fields)
    if isinstance(entry, dict):
        return {key: _without_parameters(value) for key, value in entry.items()}
    return [_without_parameters(item) for item in entry] if isinstance(entry, list) else entry


def stats_jobs(plan: MergePlan, *, spectra: bool) -> list[TensorJob]:
    """Return the jobs of statistics: of whole tensors, or of blocks of whole matrices where a tensor has several.

    Args:
        plan: A plan of a recipe of RESM (`as_resm`) that was made with `dense`.
        spectra: As for `job_stats`; the jobs have the workspace for it.
    """
    blocks: dict[str, list[TensorJob]] = {}
    for piece in plan.pieces:
        if piece.whole is not None and piece.matrices is not None:
            blocks.setdefault(piece.name, []).append(piece)
    found = (job for whole in plan.jobs for job in blocks.get(whole.name, [whole]))
    jobs = [replace(job, output_bytes=0) for job in found if not job.copied]
    return [replace(j, workspace=max(j.workspace, _spectra_workspace(j))) for j in jobs] if spectra else jobs


def job_stats(job: TensorJob, base: Tensor, experts: list[Tensor], *, spectra: bool) -> Iterator[TensorStats]:
    """Yield the statistics of the tensor of a job of `stats_jobs`, or of each of its matrices."""
    assert job.role is not None
    role = str(job.role.role)
    if (held := job.matrices) is None:
        yield replace(_tensor_stats(job, base, experts, spectra=spectra), role=role)
        return
    stacks = [tensor.reshape(-1, held.rows, held.columns) for tensor in (base, *experts)]
    first = job.start // (held.rows * held.columns)
    for i in range(stacks[0].shape[0]):
        own, *others = [as_out_in(held, stack[i]) for stack in stacks]
        row = _tensor_stats(job, own, others, spectra=spectra)
        yield replace(row, shape=tuple(own.shape), role=role, slice=first + i if held.slices > 1 else None)


def _tensor_stats(job: TensorJob, base: Tensor, experts: list[Tensor], *, spectra: bool) -> TensorStats:
    """Return the statistics of one tensor, or an entry that says why it has none."""
    try:
        plan = layer_plan(base, experts, **job.parameters)
        statistics = {name: _numbers(getattr(plan.stats, name)) for name in _STATISTICS}
        statistics |= {"mean": _numbers(plan.stats.mean()), "rms": _numbers(plan.stats.rms())}
        figures = {name: getattr(plan, name) for name in ("sparsity", "outlier_mass", "weights", "ranks")}
        method = "exact" if job.parameters.get("decomposition") == "exact" else "gram"
        overlaps = tensor_spectra(base, experts, plan.ranks, method) if spectra and plan.spectral else None
        return TensorStats(job.name, plan.shape, plan.spectral, **figures, statistics=statistics, spectra=overlaps)
    except NonFiniteError as error:
        problem = f"{error.count} NaN or infinite values in {job.folder(error.index)}"
        return TensorStats(job.name, job.shape, False, [], [], [], [], {}, problem)


def _numbers(tensor: Tensor) -> list[float | int]:
    """Return the values of a tensor, infinite ones as NaN."""
    return [v if isinstance(v, int) or math.isfinite(v) else math.nan for v in tensor.tolist()]
