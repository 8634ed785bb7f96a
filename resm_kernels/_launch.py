"""The preparation of GPU kernels that Triton's and CUDA's launchers share.

Kernels take contiguous tensors, whose experts have one dtype and a table of addresses on the device; numbers for each
expert as float64 on the device; and results that start as zeros where kernels add to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.reference.aggregate import AggregateOptions
from resm_kernels.reference.delta_stats import DeltaStatsOptions
from resm_kernels.reference.deltas import SparsityOptions, vector_layout

_VECTOR_BYTES = 16
"""The widest access of a thread."""


@dataclass(frozen=True)
class Group:
    """Base and experts of an op as kernels take them. It keeps the tensors alive until the kernels are enqueued.

    Attributes:
        base: Contiguous; None where the op has no base.
        experts: Contiguous, of one dtype and the base's shape.
        masks: Contiguous bit masks, one for each expert, or none.
        addresses: (T,) int64 on the device, the experts' addresses; (2·T,) with the masks' after them.
        compute: The dtype of the arithmetic, float32 or float64.
        aligned: Whether the addresses of base, experts and outputs are multiples of 16 bytes.
        rows: How many vectors the op treats, each by itself.
        length: Elements of a vector.
    """

    base: Tensor | None
    experts: list[Tensor]
    masks: list[Tensor]
    addresses: Tensor
    compute: torch.dtype
    aligned: bool
    rows: int
    length: int

    @property
    def first(self) -> Tensor:
        """The base, or the first expert where there is no base."""
        return self.experts[0] if self.base is None else self.base

    @property
    def n_experts(self) -> int:
        return len(self.experts)

    @property
    def device(self) -> torch.device:
        return self.experts[0].device

    def programs(self, chunk: int) -> int:
        """How many programs a launch needs if each works on one chunk of `chunk` elements of a vector."""
        return self.rows * -(-self.length // chunk)


def prepare_group(
    base: Tensor | None,
    experts: Sequence[Tensor],
    *,
    masks: Sequence[Tensor] | None = None,
    rows: bool = False,
    outputs: Sequence[Tensor] = (),
) -> Group:
    """The group of an op's inputs. Experts of several dtypes are widened to a common one, which is exact.

    Args:
        rows: Whether each row along the last dimension is a vector, instead of the whole tensor.
        outputs: Results of the experts' shape, which count for `Group.aligned`.
    """
    tensors = [*experts] if base is None else [base, *experts]
    dtypes = {e.dtype for e in experts}
    common = experts[0].dtype if len(dtypes) == 1 else compute_dtype(*experts)
    bases = [] if base is None else [base.contiguous()]
    contiguous = [e.to(common).contiguous() for e in experts]
    bit_masks = [mask.contiguous() for mask in masks or ()]
    addresses = torch.tensor([t.data_ptr() for t in (*contiguous, *bit_masks)], dtype=torch.int64)
    count, length = vector_layout(experts[0].shape, rows)
    return Group(
        base=bases[0] if bases else None,
        experts=contiguous,
        masks=bit_masks,
        addresses=addresses.to(experts[0].device, non_blocking=True),
        compute=compute_dtype(*tensors),
        aligned=all(t.data_ptr() % _VECTOR_BYTES == 0 for t in (*bases, *contiguous, *outputs)),
        rows=count,
        length=length,
    )


def prepare_thresholds(
    options: SparsityOptions, n_experts: int, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The lower and the upper thresholds of every expert, float64 on the device; None where no expert has any."""
    limits = ((options.thresholds, 0.0), (options.upper_thresholds, math.inf))
    if all(thresholds is None for thresholds, _ in limits):
        return None, None
    lower, upper = (
        torch.full((n_experts,), bound, dtype=torch.float64, device=device)
        if thresholds is None
        else thresholds.to(device, torch.float64).contiguous()
        for thresholds, bound in limits
    )
    return lower, upper


@dataclass(frozen=True)
class AggregateLaunch:
    """The arguments of `aggregate`'s kernels.

    Attributes:
        group: The inputs; its `aligned` holds for `merged` too.
        scalars: (2,) float64: λ and the least divisor.
        factors: (T,) float64; each expert's delta is multiplied by its factor before the votes are counted.
        divisors: (T,) float64; the weights, by whose sum a normalised merge divides.
        lower: (T,) float64 or None, as `prepare_thresholds` returns it.
        upper: Likewise.
        merged: The result, not written yet.
        nonfinite: (1 + T,) int64, zeros.
    """

    group: Group
    scalars: Tensor
    factors: Tensor
    divisors: Tensor
    lower: Tensor | None
    upper: Tensor | None
    merged: Tensor
    nonfinite: Tensor


def prepare_aggregate(base: Tensor | None, experts: Sequence[Tensor], options: AggregateOptions) -> AggregateLaunch:
    """The arguments of `aggregate`'s kernels, with the arithmetic that the definition gives to weights and rescales."""
    first = experts[0] if base is None else base
    device, n_experts = first.device, len(experts)
    merged = torch.empty(first.shape, dtype=options.out_dtype or first.dtype, device=device)
    least = -math.inf if options.min_divisor is None else options.min_divisor
    numbers = torch.tensor([options.scale, least, *options.weights], dtype=torch.float64)
    numbers = numbers.to(device, non_blocking=True)
    divisors = numbers[2:]
    factors = torch.ones_like(divisors) if options.votes_before_weights else divisors
    if options.rescale is not None:
        factors = factors * options.rescale.to(device, torch.float64)
    lower, upper = prepare_thresholds(options, n_experts, device)
    return AggregateLaunch(
        group=prepare_group(base, experts, masks=options.masks, outputs=[merged]),
        scalars=numbers[:2],
        factors=factors,
        divisors=divisors,
        lower=lower,
        upper=upper,
        merged=merged,
        nonfinite=torch.zeros(1 + n_experts, dtype=torch.int64, device=device),
    )


@dataclass(frozen=True)
class DeltaStatsLaunch:
    """The arguments of `delta_stats`'s kernels: the inputs, and zeros for the results that the definition returns."""

    group: Group
    moments: Tensor
    counts: Tensor
    bin_counts: Tensor
    bin_sums: Tensor

    @property
    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.moments, self.counts, self.bin_counts, self.bin_sums


def prepare_delta_stats(base: Tensor, experts: Sequence[Tensor], options: DeltaStatsOptions) -> DeltaStatsLaunch:
    """The arguments of `delta_stats`'s kernels."""
    shape = (len(experts), *options.vectors_shape(base))
    widths = {"moments": (5, torch.float64), "counts": (5, torch.int64)}
    widths |= {"bin_counts": (options.bins, torch.int64), "bin_sums": (options.bins, torch.float64)}
    results = {
        name: torch.zeros((*shape, width), dtype=dtype, device=base.device) for name, (width, dtype) in widths.items()
    }
    return DeltaStatsLaunch(prepare_group(base, experts, rows=options.rows), **results)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one within a `with` block, because kernels are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
