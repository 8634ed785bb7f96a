"""Merges the adapters that a recipe names to one adapter of the same base model."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, check_output_folder, format_bytes
from resm_kernels.checks import NonFiniteError
from resm_kernels.dtypes import ADAPTER_DTYPES, dtype_name
from resm_kernels.linalg.threads import thread_count
from resm_kernels.lora.config import CONFIG_FILE, PREFIX
from resm_kernels.lora.group import AdapterGroup, open_group
from resm_kernels.lora.low_rank import MergedFactors, RankLimit
from resm_kernels.lora.merged_config import merged_config, rank_notes
from resm_kernels.lora.one_weight import merge_weight
from resm_kernels.lora.routes import Route
from resm_kernels.lora.writer import AdapterWriter
from resm_kernels.options import MergeLoraKeywords, MergeLoraOptions
from resm_kernels.recipe import Recipe, RecipeError, load_recipe
from resm_kernels.tensor_names import tensor_depths

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.11 has it in `typing`

_EMPTY: Final = "no adapter changes a weight; there is nothing to merge"


@dataclass(frozen=True)
class MergedModule:
    """How one weight's adapter was merged, with M the merged task vector.

    Attributes:
        name: The module's name.
        shape: The weight's shape.
        rank: The rank of its factors.
        error: An upper bound of ‖M − s·B·A‖_F / ‖M‖_F, before the factors are rounded to their dtype.
        norm: ‖M‖_F.
        route: How it was merged, see `lora.routes.Route`.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    error: float
    norm: float
    route: str

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        return f"{self.name}  {shape}  rank {self.rank:>4}  error {self.error:.2%}"


@dataclass
class MergeLoraReport:
    """The result of a merge of adapters; `str()` of it is a summary of some lines.

    Attributes:
        out: The adapter's folder.
        method: The name of the merge method.
        modules: Every adapted weight.
        saved: The names of the tensors that the adapter stores whole, as the base model has them.
        notes: What a user should know before serving the adapter, a line each.
        nbytes: The size of the adapter's tensors in bytes.
        seconds: Wall time.
    """

    out: Path
    method: str
    modules: list[MergedModule] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def error(self) -> float:
        """The relative error ‖M − M_k‖_F / ‖M‖_F of all merged task vectors together."""
        total = math.fsum(module.norm**2 for module in self.modules)
        lost = math.fsum((module.norm * module.error) ** 2 for module in self.modules)
        return math.sqrt(lost / total) if total else 0.0

    def __str__(self) -> str:
        ranks = [module.rank for module in self.modules]
        rank_range = f"rank {min(ranks)}" + (f" to {max(ranks)}" if min(ranks) < max(ranks) else "")
        worst = max(self.modules, key=lambda module: module.error)
        least = f", at most {worst.error:.2%} ({worst.name})" if worst.error else ""
        line = (
            f"merged {len(ranks)} modules with {self.method} in {self.seconds:.1f} s, {rank_range}, error "
            f"{self.error:.2%} of the change{least}: {self.out} ({format_bytes(self.nbytes)})"
        )
        return "\n".join([line, *(f"note: {note}" for note in self.notes)])


def merge_lora(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    on_module: Callable[[MergedModule], None] | None = None,
    **options: Unpack[MergeLoraKeywords],
) -> MergeLoraReport:
    """Merge PEFT adapters of one base model to one adapter, as the recipe says, and write it to the folder `out`.

    The result is the adapter that a merge of the whole models and an extraction would give: with M what the recipe's
    method makes of the task vectors Δ_t = s_t·B_t·A_t, the adapter has B·A = M, or the best approximation of a lower
    rank. A module that an adapter does not have counts as one that it does not change.

    - Methods whose M is of low rank (`lora.routes.Route` says which) merge factors, in float64, and no matrix of a
      weight's size is formed. The rank of the result is at most the sum of the adapters' ranks.
    - The other methods (TIES, DARE, DELLA, Breadcrumbs, SCE, …) form the task vectors block by block. M is truncated
      to `rank` or `energy`, and the report and the output's record have the error of every module.
    - DoRA adapters are merged with their magnitudes; they, tensors that adapters store whole, and methods that use the
      weights themselves (SLERP, Karcher mean, Arcee Fusion) need the recipe's `base_model`.

    Args:
        recipe: As for `merge_checkpoints`; `models` are adapter folders, or BASE+ADAPTER, and `base_model` may be left
            out where the base's weights are not needed.
        out: The folder to create. It appears when it is complete.
        on_module: This function is called with each module as soon as it is merged.
        rank: At most so many directions of each module. By default all, or the sum of the adapters' ranks where M is
            not of low rank.
        energy: Take for each module the fewest directions that hold this share of ‖M‖²_F.
        max_rank: An upper bound of the rank, with `energy` only.
        uniform_rank: Pad the factors of all modules with zeros to one rank (default: False). Without it, PEFT's
            rank_pattern has the ranks of modules that differ.
        dtype: The dtype of the factors, one of `dtypes.ADAPTER_DTYPES`, by default the recipe's `out_dtype` or `dtype`,
            else the widest of the adapters'.
        accuracy: Of the decomposition of an M that is not of low rank, see `linalg.truncated_svd`; 5e-2 by default.
        random_seed: As for `merge_checkpoints`.
        overwrite: Replace `out` if it is an adapter folder (default: False).
        threads: Number of threads to compute with; None, the default, leaves torch's setting.

    Returns:
        A MergeLoraReport.

    Raises:
        ValueError: An option is out of its range.
        RecipeError, CheckpointError: The recipe or the adapters cannot be used, or do not fit together.

    Determinism: the same bits for any number of threads.
    """
    began, chosen = time.perf_counter(), MergeLoraOptions(**options)
    checked = load_recipe(recipe, adapters=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(thread_count(chosen.threads))
        group = open_group(checked, stack)
        folder = check_output_folder(
            out, overwrite=chosen.overwrite, inputs=group.folders, marker=CONFIG_FILE, goes_on=False
        )
        merge = _Merge(checked, group, chosen)
        report = MergeLoraReport(folder, checked.method.name)
        writer = stack.enter_context(AdapterWriter(folder, overwrite=chosen.overwrite))
        ranks = _modules(merge, writer, report, on_module)
        _saved(merge, writer, report)
        report.notes += rank_notes(group, ranks, report.saved)
        report.nbytes = writer.nbytes
        writer.commit(merged_config(group, ranks), facts=_facts(checked, chosen, report))
    report.seconds = time.perf_counter() - began
    return report


@dataclass
class _Merge:
    """What the merge of every module needs."""

    recipe: Recipe
    group: AdapterGroup
    options: MergeLoraOptions

    def __post_init__(self) -> None:
        base = self.group.base
        names = [f"{module}.weight" for module in self.group.modules]
        # The base model's files may name tensors otherwise.
        self.depths = tensor_depths([*names, *self.group.saved])
        if base is not None:
            self.depths |= tensor_depths(base.reader.tensors)
        self.dtype = self._dtype()
        for name in self.group.saved:
            self.group.need_base(_saved_reason(name))
        self.piece = self.recipe.parts[0].slices[0]

    def _dtype(self) -> torch.dtype:
        if self.options.dtype is not None:
            return self.options.dtype
        dtype = self.recipe.output_dtype
        if dtype is None:
            return torch.float32 if len(self.group.dtypes) > 1 else next(iter(self.group.dtypes))
        if dtype not in ADAPTER_DTYPES:
            names = ", ".join(map(dtype_name, ADAPTER_DTYPES))
            raise CheckpointError(f"dtype: got {dtype_name(dtype)}, need one of {names} for an adapter")
        return dtype

    def parameters(self, tensor: str) -> dict[str, Any]:
        """Return the method's keyword arguments for one tensor."""
        names = [tensor] * len(self.group.adapters)
        return self.recipe.tensor_parameters(tensor, self.depths.get(tensor, 0.0), self.piece, names)

    def module(self, name: str) -> tuple[MergedFactors, Route]:
        """Merge the task vectors of one weight."""
        tensor, options = f"{name}.weight", self.options
        return merge_weight(
            self.group.modules[name],
            self.group.deltas(name),
            self.recipe.method,
            self.parameters(tensor),
            lambda reason: self.group.weights(tensor, reason),
            name=tensor,
            seed=options.random_seed,
            limit=RankLimit(options.rank or options.max_rank, options.energy),
            accuracy=options.accuracy,
        )


def _modules(
    merge: _Merge,
    writer: AdapterWriter,
    report: MergeLoraReport,
    on_module: Callable[[MergedModule], None] | None,
) -> dict[str, int]:
    """Merge all modules and store their factors; return the rank of each."""
    group, ranks = merge.group, dict[str, int]()
    if not group.modules:
        raise CheckpointError(f"{', '.join(str(a.folder) for a in group.adapters)}: {_EMPTY}")
    for name, shape in group.modules.items():
        try:
            factors, route = merge.module(name)
        except NonFiniteError as error:
            raise CheckpointError(f"{error}; the adapter is damaged") from error
        except (CheckpointError, RecipeError):
            raise
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"module {name!r}: {error}") from error
        module = MergedModule(name, shape, factors.rank, factors.error, factors.norm, route.value)
        report.modules.append(module)
        if on_module is not None:
            on_module(module)
        ranks[name] = max(factors.rank, 1)  # PEFT has no rank of 0
        for part, factor in stored_factors(group, name, factors, merge.dtype).items():
            writer.add(part, factor)
    largest = max(ranks.values())
    for name in group.modules:
        rank = largest if merge.options.uniform_rank else ranks[name]
        for part, dimension in zip(stored_names(group, name), (0, 1), strict=True):
            writer.pad(part, dimension, rank)
        ranks[name] = rank
    return ranks


def stored_names(group: AdapterGroup, name: str) -> tuple[str, str]:
    """Return the names of a module's A and B, without PEFT's prefix."""
    parts = ("lora_embedding_A", "lora_embedding_B") if group.embedding(name) else ("lora_A.weight", "lora_B.weight")
    return f"{name}.{parts[0]}", f"{name}.{parts[1]}"


def stored_factors(group: AdapterGroup, name: str, factors: MergedFactors, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return A and B of a module as PEFT stores them, rounded to `dtype`, by their names."""
    left, right = factors.left.to(dtype), factors.right.to(dtype)
    if not bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
        raise CheckpointError(f"module {name!r}: its factors exceed the range of {dtype_name(dtype)}; need float32")
    b, a = (right.mT, left.mT) if group.transposed(name) else (left, right)
    if kernel := group.kernel(name):
        a, b = a.reshape(factors.rank, -1, *kernel), b.reshape(*b.shape, *[1] * len(kernel))
    return dict(zip(stored_names(group, name), (a, b), strict=True))


def _saved(merge: _Merge, writer: AdapterWriter, report: MergeLoraReport) -> None:
    """Merge the tensors that adapters store whole, as a merge of the whole models does; copy those of the base."""
    method, seed = merge.recipe.method, merge.options.random_seed
    for name, info in merge.group.saved.items():
        original, experts = merge.group.weights(name, _saved_reason(name))
        merged = method(original, experts, out_dtype=info.dtype, name=name, seed=seed, **merge.parameters(name))
        writer.add(info.name.removeprefix(PREFIX), merged)
        report.saved.append(name)
    for name, info in merge.group.wrapped.items():
        read = functools.partial(merge.group.read_wrapped, name)
        writer.add_from(info.name.removeprefix(PREFIX), info.dtype, info.shape, read)
        report.saved.append(name)


def _saved_reason(name: str) -> str:
    return f"an adapter stores {name!r} whole"


def _facts(recipe: Recipe, options: MergeLoraOptions, report: MergeLoraReport) -> dict[str, Any]:
    """Return what the record in the output says of the merge."""
    return {
        "recipe": hashlib.sha256(recipe.text.encode()).hexdigest(),
        "method": recipe.method.name,
        "random_seed": options.random_seed,
        "error": report.error,
        "modules": {m.name: {"rank": m.rank, "error": m.error, "norm": m.norm, "by": m.route} for m in report.modules},
    }
