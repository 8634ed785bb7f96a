"""variance_mask on a GPU by CUDA: variances in a temporary, the selection of magnitude_threshold, then the bits.

The rank of the threshold stays on the device, so that the host waits for nothing. See csrc/cuda/variance_mask.cu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels._launch import prepare_group
from resm_kernels.cuda.launch import call
from resm_kernels.cuda.magnitude_threshold import select
from resm_kernels.dtypes import compute_dtype
from resm_kernels.masks import mask_bytes
from resm_kernels.reference.variance_mask import VarianceMaskOptions

CHUNK = 8192
"""Elements of a block that computes variances."""


def variance_mask(base: Tensor, experts: list[Tensor], options: VarianceMaskOptions) -> Tensor:
    """See `resm_kernels.ops.variance_mask` and its reference, whose arguments and result these are."""
    device, length = base.device, base.numel()
    variances = torch.empty(length, dtype=compute_dtype(base, *experts), device=device)
    nonzero = torch.zeros((), dtype=torch.int64, device=device)
    group = prepare_group(base, experts, outputs=[variances])
    call("variances", device, group=group, chunk=CHUNK, variances=variances, nonzero=nonzero)
    k = (nonzero.double() * options.density).long().reshape(1)
    threshold, _ = select(torch.zeros_like(variances), [variances], k)
    mask = torch.empty(mask_bytes(length), dtype=torch.uint8, device=device)
    call("variance_mask", device, variances=variances, threshold=threshold, mask=mask)
    return mask
