"""random_mask of three experts, against torch.bernoulli of one of them; by rank, against a sort of its rows."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.masks import unpacked
from resm_kernels.ops import random_mask

pytestmark = pytest.mark.benchmark(group="random_mask")


def bench_torch_bernoulli_of_one(timed, checkpoint):
    base, _ = checkpoint
    timed(lambda: torch.bernoulli(torch.full_like(base, 0.5)), 3, yardstick=True)


def bench_torch_sort_rows_of_one(timed, checkpoint):
    base, experts = checkpoint
    timed(lambda: (experts[0].float() - base.float()).abs().argsort(dim=1).argsort(dim=1), 3)


@pytest.mark.parametrize("epsilon", [0.0, 0.15])
def bench_random_mask(timed, checkpoint, epsilon):
    base, experts = checkpoint
    for mask in random_mask(base, experts, 0.5, epsilon):
        assert abs(float(unpacked(mask, base.shape).float().mean()) - 0.5) < 1e-3
    # A weight's bit: Philox's ten rounds of six operations make four random numbers; by rank also the difference and a
    # comparison. Without rank nothing is read.
    read = (len(experts) + 1) * base.nbytes if epsilon else 0
    operations = len(experts) * (15 + 1 + (2 if epsilon else 0)) * base.numel()
    work = (operations, read + len(experts) * base.numel() / 8)
    timed(lambda: random_mask(base, experts, 0.5, epsilon), work=work)
