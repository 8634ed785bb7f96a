"""magnitude_threshold of three experts, against one full sort of one expert's deltas in torch."""

from __future__ import annotations

import pytest

from resm_kernels.ops import magnitude_threshold

pytestmark = pytest.mark.benchmark(group="magnitude_threshold")


def bench_torch_sort_of_one(timed, checkpoint):
    base, experts = checkpoint
    timed(lambda: (experts[0].float() - base.float()).abs().flatten().sort(descending=True), 3, yardstick=True)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def bench_magnitude_threshold(timed, checkpoint, density):
    base, experts = checkpoint
    k = int(density * base.numel())
    for expert, result in zip(experts, magnitude_threshold(base, experts, k), strict=True):
        size = (expert.float() - base.float()).abs()
        assert (size >= result).sum() >= k > (size > result).sum()
    work = (2 * len(experts) * base.numel(), (len(experts) + 1) * base.nbytes)  # the difference and one comparison
    timed(lambda: magnitude_threshold(base, experts, k), work=work)
