"""Merges the adapters that a recipe names to one adapter of the same base model."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, check_output_folder, format_bytes
from resm_kernels.checks import NonFiniteError
from resm_kernels.dtypes import ADAPTER_DTYPES, dtype_name
from resm_kernels.linalg.threads import thread_count
from resm_kernels.lora.base import OpenBase, open_base
from resm_kernels.lora.config import CONFIG_FILE, PREFIX
from resm_kernels.lora.elements import TaskVector
from resm_kernels.lora.factors import Factors
from resm_kernels.lora.group import AdapterGroup, open_group
from resm_kernels.lora.low_rank import MergedFactors, RankLimit, coefficients
from resm_kernels.lora.merged_config import merged_config, rank_notes
from resm_kernels.lora.one_weight import merge_weight
from resm_kernels.lora.peft_names import Adaptable, Kind
from resm_kernels.lora.peft_names import stored_factors as peft_factors
from resm_kernels.lora.routes import Route, route_of
from resm_kernels.lora.writer import AdapterWriter
from resm_kernels.options import MergeLoraKeywords, MergeLoraOptions
from resm_kernels.recipe import Recipe, RecipeError, load_recipe
from resm_kernels.roles import role_by_name
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


def merge_adapters(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    on_module: Callable[[MergedModule], None] | None = None,
    open_base: OpenBase = open_base,
    **options: Unpack[MergeLoraKeywords],
) -> MergeLoraReport:
    """Merge adapters as `engine.merge_lora` does, which documents the arguments, the result and the errors.

    Args:
        open_base: Opens the base model; by default its files have to name tensors as the loaded model does.
    """
    began, chosen = time.perf_counter(), MergeLoraOptions(**options)
    checked = load_recipe(recipe, adapters=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(thread_count(chosen.threads))
        group = open_group(checked, stack, open_base)
        if not group.modules:
            raise CheckpointError(f"{', '.join(map(str, group.folders))}: {_EMPTY}")
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
        names = list(map(self.group.tensor, self.group.modules))
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

    def module(self, name: str) -> tuple[list[MergedFactors], Route]:
        """Merge the task vectors of one weight as a merge of whole models does.

        Methods that decompose matrices get each expert of a stack by itself, and every matrix as (out, in); tables of
        positions and biases are averaged. All other methods get the weight as it is stored.
        """
        group, tensor, method = self.group, self.group.tensor(name), self.recipe.method
        parameters = self.parameters(tensor)
        decomposes = any(parameter.name == "spectral" for parameter in method.parameters)
        if decomposes and role_by_name(tensor, group.modules[name]).role.is_table:
            stated = self.piece.states(method, "spectral", tensor, self.depths.get(tensor, 0.0))
            parameters |= {} if stated else {"spectral": False}
        matrices, shape = group.deltas(name), group.modules[name]
        route = route_of(method, method.resolve(len(group.adapters), dict(parameters), tensor))
        if len(matrices) > 1 and not decomposes and route is not Route.SUM:
            raise CheckpointError(
                f"parameter {name!r}: {method.name} looks at the elements of all experts together, which are not "
                "merged adapter to adapter; need a weighted sum or a method that decomposes matrices "
                "(docs/merge_lora.md), or merge whole models (resm-kernels merge) and extract an adapter (extract-lora)"
            )
        turned = decomposes and route is not Route.WEIGHTS and group.transposed(name) and not group.embedding(name)
        if turned:
            matrices, shape = [list(map(_turned, deltas)) for deltas in matrices], (shape[1], shape[0])
        pairs = [self._matrix(tensor, deltas, shape, parameters) for deltas in matrices]
        merged = [factors for factors, _ in pairs]
        if turned:
            merged = [replace(factors, left=factors.right.mT, right=factors.left.mT) for factors in merged]
        return merged, pairs[0][1]

    def _matrix(
        self, tensor: str, deltas: Sequence[TaskVector], shape: tuple[int, int], parameters: Mapping[str, Any]
    ) -> tuple[MergedFactors, Route]:
        """Merge the task vectors of one matrix of a weight."""
        options = self.options
        return merge_weight(
            shape,
            deltas,
            self.recipe.method,
            parameters,
            lambda reason: self.group.weights(tensor, reason),
            name=tensor,
            seed=options.random_seed,
            limit=RankLimit(options.rank or options.max_rank, options.energy),
            accuracy=options.accuracy,
        )


def _turned(delta: TaskVector) -> TaskVector:
    """Return a task vector's transpose."""
    return delta.mT if isinstance(delta, Tensor) else Factors(delta.right.mT, delta.left.mT, delta.scale)


def _modules(
    merge: _Merge,
    writer: AdapterWriter,
    report: MergeLoraReport,
    on_module: Callable[[MergedModule], None] | None,
) -> dict[str, int]:
    """Merge all modules and store their factors; return the rank of each."""
    group, ranks = merge.group, dict[str, int]()
    for name, shape in group.modules.items():
        try:
            matrices, route = merge.module(name)
        except NonFiniteError as error:
            raise CheckpointError(f"{error}; the adapter is damaged") from error
        except (CheckpointError, RecipeError):
            raise
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"module {name!r}: {error}") from error
        rank = max(factors.rank for factors in matrices)
        norm = math.hypot(*(factors.norm for factors in matrices))
        lost = math.hypot(*(factors.norm * factors.error for factors in matrices))
        module = MergedModule(name, shape, rank, lost / norm if norm else 0.0, norm, route.value)
        report.modules.append(module)
        if on_module is not None:
            on_module(module)
        ranks[name] = max(rank, 1)  # PEFT has no rank of 0
        for part, factor in stored_factors(group, name, matrices, merge.dtype).items():
            writer.add(part, factor)
    largest = max(ranks.values())
    for name in group.modules:
        rank = largest if merge.options.uniform_rank else ranks[name]
        a, b = stored_names(group, name)
        writer.pad(a, 0, rank * group.slices(name), groups=group.slices(name))
        writer.pad(b, 1, rank * group.slices(name))
        ranks[name] = rank
    return ranks


def stored_names(group: AdapterGroup, name: str) -> tuple[str, str]:
    """Return the names of a module's or parameter's A and B, without PEFT's prefix."""
    if group.embedding(name):
        return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    owner = group.wrapper(name)
    return f"{owner}.lora_A.weight", f"{owner}.lora_B.weight"


def stored_factors(
    group: AdapterGroup, name: str, matrices: Sequence[MergedFactors], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return A and B of a module or parameter as PEFT stores them, rounded to `dtype`, by their names."""
    rank = max(factors.rank for factors in matrices)
    sides = [
        (_widened(factors.left.to(dtype), rank), _widened(factors.right.mT.to(dtype), rank)) for factors in matrices
    ]
    if not all(bool(torch.isfinite(side).all()) for pair in sides for side in pair):
        raise CheckpointError(f"module {name!r}: its factors exceed the range of {dtype_name(dtype)}; need float32")
    shape: tuple[int, ...] = group.modules[name]
    kind = Kind.CONV1D if group.transposed(name) else Kind.LINEAR
    if len(sides) > 1:
        kind, shape = Kind.PARAMETER, (len(sides), *shape)
    if kernel := group.kernel(name):
        kind, shape = Kind.CONVOLUTION, (shape[0], shape[1] // math.prod(kernel), *kernel)
    target = Adaptable(name, kind, transposed=group.transposed(name))
    return dict(zip(stored_names(group, name), peft_factors(target, shape, sides), strict=True))


def _widened(side: Tensor, rank: int) -> Tensor:
    """Return columns of factors with columns of zeros up to a rank."""
    return torch.nn.functional.pad(side, (0, rank - side.shape[1]))


def _saved(merge: _Merge, writer: AdapterWriter, report: MergeLoraReport) -> None:
    """Merge the tensors that adapters store whole, as changes of the base's; copy those that are the base's."""
    method, seed = merge.recipe.method, merge.options.random_seed
    for name, info in merge.group.saved.items():
        original, experts = merge.group.weights(name, _saved_reason(name))
        parameters = merge.parameters(name)
        values = method.resolve(len(experts), dict(parameters), name)
        if route_of(method, values) is Route.SUM:
            # Some of these methods merge models; adapters are merged as changes, see `routes`.
            shares = coefficients(method, values, len(experts))
            changes = (c * (expert - original) for c, expert in zip(shares, experts, strict=True))
            merged = functools.reduce(torch.add, changes, original).to(info.dtype)
        else:
            merged = method(original, experts, out_dtype=info.dtype, name=name, seed=seed, **parameters)
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
