"""variance_mask on a GPU by CUDA: variances in a temporary, the selection of magnitude_threshold, then the bits.

The rank of the threshold stays on the device, so that the host waits for nothing. See csrc/cuda/variance_mask.cu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels._launch import launch_of, of_one_dtype, on_device
from resm_kernels.cuda._launch import DTYPE_CODES, call
from resm_kernels.cuda.magnitude_threshold import selected
from resm_kernels.dtypes import compute_dtype
from resm_kernels.masks import mask_bytes

CHUNK, MASK_CHUNK = 8192, 2048
"""Elements of a block that finds variances, bytes of one that makes bits."""


def variance_mask(base: Tensor, experts: list[Tensor], density: float) -> Tensor:
    """See `resm_kernels.ops.variance_mask` and its reference, whose arguments these are."""
    n, device, dtype = base.numel(), base.device, compute_dtype(base, *experts)
    in_double = int(dtype == torch.float64)
    origin, own = base.contiguous(), of_one_dtype(experts)
    mask = torch.empty(mask_bytes(n), dtype=torch.uint8, device=device)
    spread = torch.empty(n, dtype=dtype, device=device)
    nonzero = torch.zeros((), dtype=torch.int64, device=device)
    codes = DTYPE_CODES[origin.dtype], DTYPE_CODES[own[0].dtype]
    with on_device(device):
        variances = launch_of([[spread, origin, *own]], CHUNK)
        call("variances", variances, 1, device, len(own), *codes, in_double, nonzero)
        k = (nonzero.double() * density).long()
        threshold, _ = selected([torch.zeros_like(spread)], [spread], k.reshape(1, 1))
        call("variance_mask", launch_of([[mask]], MASK_CHUNK), 1, device, n, in_double, spread, threshold)
    return mask
