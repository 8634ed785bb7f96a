"""aggregate on a GPU by CUDA, with the CPU's bits. See csrc/cuda/aggregate.cu."""

from __future__ import annotations

from torch import Tensor

from resm_kernels._launch import prepare_aggregate
from resm_kernels.cuda.launch import call
from resm_kernels.reference.aggregate import AggregateOptions

CHUNK = 8192
"""Elements of a block."""


def aggregate(base: Tensor | None, experts: list[Tensor], options: AggregateOptions) -> tuple[Tensor, Tensor]:
    """See `resm_kernels.ops.aggregate` and its reference, whose arguments and results these are."""
    launch = prepare_aggregate(base, experts, options)
    call(
        "aggregate",
        launch.group.device,
        group=launch.group,
        options=options,
        chunk=CHUNK,
        factors=launch.factors,
        divisors=launch.divisors,
        lower=launch.lower,
        upper=launch.upper,
        merged=launch.merged,
        nonfinite=launch.nonfinite,
    )
    return launch.merged, launch.nonfinite
