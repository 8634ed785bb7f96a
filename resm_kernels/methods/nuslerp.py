"""NuSLERP: SLERP between two models, or between two task vectors, for whole tensors or vector by vector (mergekit)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from resm_kernels.elementwise.angles import PARALLEL, cosines, great_circle
from resm_kernels.elementwise.blocks import blocks_workspace, merge_vectors
from resm_kernels.elementwise.inputs import check_inputs, element_blocks, row_blocks
from resm_kernels.methods._aliases import Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.inner_products import inner_products


def _blocks(shape: tuple[int, ...], parameters: Mapping[str, Any]) -> int | None:
    """Vectors along the first dimension need the whole tensor."""
    if parameters["nuslerp_flatten"]:
        return element_blocks(shape, parameters)
    return None if parameters["nuslerp_row_wise"] else row_blocks(shape, parameters)


@merge_method(
    title="NuSLERP",
    reference="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md#nuslerp-nuslerp",
    workspace=blocks_workspace,
    min_experts=2,
    max_experts=2,
    blocks=_blocks,
)
def nuslerp(
    base: Tensor | None,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    nuslerp_flatten: Annotated[bool, Option("false: interpolate vector by vector, not the tensor as a whole")] = True,
    nuslerp_row_wise: Annotated[
        bool, Option("if not flattened: vectors along the first dimension, not the last")
    ] = False,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = sin((1−t)·Ω)/sin Ω · x_1 + sin(t·Ω)/sin Ω · x_2 with t = w_2/(w_1 + w_2), to which a base is added.

    x_t = θ_t, or with a base the task vectors θ_t − θ₀; Ω is the angle between them. t = 1/2 if |w_1 + w_2| < 1e-6.
    With `nuslerp_flatten` the whole tensor is one vector. Otherwise the vectors are those along the last dimension (a
    matrix' rows, one for each output), or with `nuslerp_row_wise` those along the first (its columns); the names are
    mergekit's.

    Where sin²Ω ≤ 1e-12, x = (1−t)·x_1 + t·x_2: the same to 2e-13 for parallel vectors, and the only choice for opposite
    vectors, through which no great circle is distinguished. mergekit tests 1 − cos²Ω ≤ 1e-16, which in fp32 holds for
    Ω up to 3e-4. A vector that is 0 has no direction, and Ω = 90°.

    Whole tensors are read twice, vectors once. θ is computed in fp32 (float64 if an input is) and rounded once, angles
    in float64. Vectors are merged by plain torch, a block at a time.
    """
    check_inputs(base, experts, out_dtype)
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    if not nuslerp_flatten:
        along = 0 if nuslerp_row_wise else -1
        return merge_vectors(functools.partial(_coefficients, t=t), base, experts, out_dtype, along)
    return aggregate(base, experts, _coefficients(inner_products(base, experts).cpu(), t), out_dtype=out_dtype)


def _coefficients(gram: Tensor, t: float) -> Tensor:
    cosine = cosines(gram)[..., 0, 1]
    return great_circle(cosine, t, (1 - cosine) * (1 + cosine) <= PARALLEL)
