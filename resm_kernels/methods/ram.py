"""RAM, Reinforced Agent Merging (Yuan et al., arXiv 2601.13572): shared changes are averaged, unique ones kept."""

from __future__ import annotations

import functools
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from resm_kernels.elementwise.blocks import blocks_workspace, merge_elements
from resm_kernels.elementwise.inputs import check_inputs, element_blocks
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option

SmallestChange = Annotated[float, Option("an expert has changed a weight if |δ| is more than this", minimum=0.0)]


@merge_method(
    title="RAM", reference="https://arxiv.org/abs/2601.13572", workspace=blocks_workspace, blocks=element_blocks
)
def ram(
    base: Tensor, experts: list[Tensor], *, epsilon: SmallestChange = 1e-5, out_dtype: torch.dtype | None
) -> Tensor:
    """θ = θ₀ + (1/c)·Σ over the c experts with |δ_t| > ε of δ_t, weight by weight; θ₀ where c = 0.

    Reinforcement learning changes few weights, and different ones in different experts. A weight that only one expert
    has changed (c = 1) gets the whole change; one that several have changed gets the average of their changes.

    The inputs are read once, by plain torch in blocks; θ is computed in fp32 (float64 if an input is), rounded once.
    """
    check_inputs(base, experts, out_dtype)

    def merge(theta: Tensor, expert_blocks: list[Tensor]) -> Tensor:
        changes, counts = changes_of(theta, expert_blocks, epsilon)
        return theta + in_order(changes) / counts.clamp_(min=1)

    return merge_elements(merge, base, experts, out_dtype)


def changes_of(theta: Tensor, experts: list[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Each expert's δ where |δ| > ε, else 0; and how many experts have changed each weight, as floating point."""
    changes = [hardshrink(expert - theta, epsilon) for expert in experts]
    return changes, in_order([change.sign().abs_() for change in changes])


def in_order(terms: list[Tensor]) -> Tensor:
    """The sum of the terms, added in their order."""
    return functools.reduce(torch.add, terms)
