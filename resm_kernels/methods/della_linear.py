"""DELLA: drop at random by rank, rescale, and add up or merge by TIES (Deep et al., arXiv 2406.11617)."""

from __future__ import annotations

import functools
import math
from typing import Final

import torch
from torch import Tensor

from resm_kernels.checks import raise_nonfinite
from resm_kernels.dtypes import compute_dtype
from resm_kernels.elementwise.inputs import ranked_blocks
from resm_kernels.elementwise.sparsify import can_normalize, masked_workspace, merge_kept, random_selection
from resm_kernels.masks import unpacked
from resm_kernels.methods._aliases import Density, Epsilon, Int8Mask, Lambda, Normalize, Rescale, RescaleBy, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import each
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.random_mask import random_mask
from resm_kernels.reference.random_mask import FRACTION, doubled_ranks, probability_law, row_length
from resm_kernels.spectral.low_rank import join
from resm_kernels.streams import Block, stream_of

RANKED_AT_ONCE: Final = 1 << 20
"""Elements of a tensor whose task vectors are formed at a time, if each is divided by its probability."""


def ranked_workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bytes of masked methods, and of at least eight sorted rows with their task vectors and unpacked masks."""
    elements = max(RANKED_AT_ONCE, 8 * (shape[-1] if shape else 1))
    return masked_workspace(shape, n_experts) + min(elements, math.prod(shape)) * (64 + 8 * n_experts)


_variant = functools.partial(
    merge_method,
    reference="https://arxiv.org/abs/2406.11617",
    workspace=ranked_workspace,
    blocks=ranked_blocks,
)


@_variant(name="della_linear", title="Linear DELLA", rule="sum")
@_variant(name="della", title="DELLA", rule="ties", normalize=True)
def della(
    base: Tensor,
    experts: list[Tensor],
    *,
    rule: str,
    weight: Weight = each(1.0),
    density: Density = each(1.0),
    epsilon: Epsilon = each(0.15),
    normalize: Normalize = False,
    rescale: Rescale = True,
    rescale_by: RescaleBy = "l1",
    lambda_: Lambda = 1.0,
    int8_mask: Int8Mask = False,
    seed: int,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·rule(w_t·r_t·m_t∘Δ_t), where m_t keeps an element with probability density_t ± epsilon_t by its rank.

    The probability rises from density − ε for a row's smallest |δ| to density + ε for its largest, evenly over the
    ranks (`resm_kernels.ops.random_mask` defines rows, and how ties are ranked); density ≥ 1 keeps all elements.
    With `rescale`, r_t is Σ|Δ_t|/Σ|m_t∘Δ_t| for `rescale_by` "l1", as in mergekit. For "probability", the paper's
    1/(1 − p) and the authors' code, each element is divided by its probability of being kept, which leaves its
    expectation unchanged; this sorts groups of rows whose task vectors are in memory, and takes about as long as
    mergekit. Without `rescale` r_t is 1.

    Raises:
        ValueError: density ± epsilon is not between 0 and 1 where density is.
    """
    if rescale and rescale_by == "probability" and base.numel() and any(d < 1 for d in density):
        masks = random_mask(base, experts, density, epsilon, seed=seed)
        raise_nonfinite(base, experts)  # aggregate sees only the elements that are kept
        dtype = out_dtype or base.dtype
        merge = functools.partial(
            _merge_by_probability,
            density=density,
            epsilon=epsilon,
            rule=rule,
            weight=weight,
            normalize=normalize,
            lambda_=lambda_,
            out_dtype=dtype,
        )
        stream = stream_of(base)
        if stream is None:
            return merge(base, experts, masks)

        def merge_block(block: Block) -> Tensor:
            return merge(block[base], block.all(experts), block.all(masks))

        return stream.computed(merge_block, dtype)
    selection = random_selection(base, experts, density, epsilon, seed)
    return merge_kept(
        base, experts, selection, rule, weight, normalize=normalize, rescale=rescale, scale=lambda_, out_dtype=out_dtype
    )


def _merge_by_probability(
    base: Tensor,
    experts: list[Tensor],
    masks: list[Tensor],
    *,
    density: list[float],
    epsilon: list[float],
    rule: str,
    weight: list[float],
    normalize: bool,
    lambda_: float,
    out_dtype: torch.dtype,
) -> Tensor:
    columns, dtype = row_length(base), compute_dtype(base, *experts)
    laws = [probability_law(d, e, columns) for d, e in zip(density, epsilon, strict=True)]
    base_rows, *expert_rows = (tensor.reshape(-1, columns) for tensor in (base, *experts))
    merged = torch.empty(base_rows.shape, dtype=out_dtype, device=base.device)
    rows = max(1, RANKED_AT_ONCE // columns // 8) * 8  # masks of eight rows are whole bytes
    for start in range(0, base_rows.shape[0], rows):
        base_block, *expert_blocks = (tensor[start : start + rows] for tensor in (base_rows, *expert_rows))
        deltas = []
        for t, expert in enumerate(expert_blocks):
            lowest, step = laws[t]
            probability = (lowest + step * doubled_ranks(base_block, expert_blocks, t)).double() / 2.0**FRACTION
            mask = unpacked(masks[t][start * columns // 8 :], base_block.shape)
            delta = (expert.to(dtype) - base_block.to(dtype)) / probability.to(dtype)
            deltas.append(torch.where(mask, delta, 0.0))
        change = aggregate(None, deltas, weight, rule=rule, normalize=normalize and can_normalize(rule, weight))
        merged[start : start + rows] = join(base_block, change, lambda_, out_dtype)
    return merged.reshape(base.shape)
