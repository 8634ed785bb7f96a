"""SLERP: interpolation between two models along a great circle (Shoemake, SIGGRAPH 1985).

Shoemake's rotations are unit vectors; weights, whose norms differ, get the same coefficients, as in mergekit.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.checks import check_group
from resm_kernels.elementwise.angles import PARALLEL, cosines, gram_with_base, great_circle
from resm_kernels.elementwise.inputs import element_blocks, elementwise_workspace
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option
from resm_kernels.ops.aggregate import aggregate


@merge_method(
    title="SLERP",
    reference="https://doi.org/10.1145/325165.325242",
    workspace=elementwise_workspace,
    max_experts=1,
    blocks=element_blocks,
)
def slerp(
    base: Tensor,
    experts: list[Tensor],
    *,
    t: Annotated[float, Option("how far to go from the base, 0, to the other model, 1")],
    dot_threshold: Annotated[
        float,
        Option(
            "interpolate in a straight line where the cosine is beyond this (mergekit's constant)",
            minimum=0.0,
            maximum=1.0,
        ),
    ] = 0.9995,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = sin((1−t)·Ω)/sin Ω · θ₀ + sin(t·Ω)/sin Ω · θ_1, Ω the angle between the whole tensors θ₀ and θ_1.

    Where |cos Ω| > `dot_threshold`, θ = (1−t)·θ₀ + t·θ_1: the two are nearly parallel, or nearly opposite, so that no
    great circle is distinguished. The default is the constant of mergekit and of the code that most merges are made
    with; most fine-tuned models are that close to their base. For nearly parallel models and t from 0 to 1 the two
    formulas differ by at most 1.3e-4 of θ. A threshold of 1 interpolates linearly only if the two are exactly parallel.
    A tensor that is 0 has no direction, and Ω = 90°.

    Ω comes from one read in float64, θ from a second one, in fp32 (float64 if an input is), rounded once.
    """
    check_group(base, experts)
    cosine = cosines(gram_with_base(base, experts))[0, 1]
    # The second condition keeps the rounding of the cosine from deciding at a threshold of 1.
    linear = (cosine.abs() > dot_threshold) | ((1 - cosine) * (1 + cosine) <= PARALLEL)
    weights = great_circle(cosine, t, linear)
    return aggregate(None, [base, *experts], weights, out_dtype=out_dtype or base.dtype)
