"""variance_mask of three experts, against torch.var and torch.topk of the same."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import variance_mask
from resm_kernels.reference.variance_mask import VarianceMaskOptions
from resm_kernels.reference.variance_mask import variance_mask as reference

pytestmark = pytest.mark.benchmark(group="variance_mask")


def bench_torch_var_and_topk(timed, checkpoint):
    base, experts = checkpoint

    def select():
        spread = torch.stack([e.float() - base.float() for e in experts]).var(0, unbiased=False)
        return spread.flatten().topk(spread.numel() // 2)

    timed(select, 3, yardstick=True)


def bench_variance_mask(timed, checkpoint):
    base, experts = checkpoint
    assert torch.equal(variance_mask(base, experts, 0.5), reference(base, experts, VarianceMaskOptions(density=0.5)))
    # Of a weight: differences, their mean, the squares of what is left, their sum, one comparison.
    work = ((5 * len(experts) + 1) * base.numel(), (len(experts) + 1) * base.nbytes + base.numel() / 8)
    timed(lambda: variance_mask(base, experts, 0.5), work=work)
