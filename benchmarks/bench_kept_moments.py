"""kept_moments of three experts, against summing |δ| of one in torch."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import kept_moments, random_mask
from resm_kernels.reference.deltas import SparsityOptions
from resm_kernels.reference.kept_moments import kept_moments as reference

pytestmark = pytest.mark.benchmark(group="kept_moments")


def bench_torch_sum_of_one(timed, checkpoint):
    base, experts = checkpoint
    timed(lambda: (experts[0].float() - base.float()).abs().sum(), 3, yardstick=True)


@pytest.mark.parametrize("sparsity", ["thresholds", "masks"])
def bench_kept_moments(timed, checkpoint, sparsity):
    base, experts = checkpoint
    limits = torch.tensor([1e-3] * 3).double()
    options = {"thresholds": limits} if sparsity == "thresholds" else {"masks": random_mask(base, experts, 0.5)}
    expected = reference(base, experts, SparsityOptions(**options))
    torch.testing.assert_close(torch.stack(kept_moments(base, experts, **options), 1), expected, rtol=1e-9, atol=0)
    masks = sum(mask.nbytes for mask in options.get("masks", ()))
    # Of a weight and expert: the difference, whether it is kept, the sums of |δ| and δ².
    work = (5 * len(experts) * base.numel(), (len(experts) + 1) * base.nbytes + masks)
    timed(lambda: kept_moments(base, experts, **options), work=work)
