"""Parameters that several methods share, so that they mean and default the same everywhere."""

from __future__ import annotations

import math

from resm_kernels.methods._registry import Parameter

WEIGHT = Parameter("weight", float, 1.0, "factor of each expert's task vector; 1 keeps it as it is", per_expert=True)
LAMBDA = Parameter("lambda", float, 1.0, "scale of the merged task vector before it is added to the base")


def elementwise_workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bytes that an element-wise method allocates beyond inputs and output, whatever the shape.

    Blocks of scratch per thread, and the candidates of a selection: csrc/cpu/magnitude_threshold.cpp bounds them by
    an eighth of the elements, four bytes each, for one expert at a time.
    """
    return (8 << 20) + math.prod(shape) // 2
