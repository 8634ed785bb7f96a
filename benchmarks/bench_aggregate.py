"""aggregate of three experts, against torch.clone of the same four tensors."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import aggregate, magnitude_threshold
from resm_kernels.reference.aggregate import AggregateOptions
from resm_kernels.reference.aggregate import aggregate as reference

pytestmark = pytest.mark.benchmark(group="aggregate")


def bench_torch_clone(timed, checkpoint):
    base, experts = checkpoint
    timed(lambda: [t.clone() for t in (base, *experts)], yardstick=True)


@pytest.mark.parametrize("rule", ["sum", "ties"])
def bench_aggregate(timed, checkpoint, rule):
    base, experts = checkpoint
    thresholds = magnitude_threshold(base, experts, base.numel() // 2) if rule == "ties" else None
    options = {"rule": rule, "normalize": rule == "ties", "thresholds": thresholds}
    weights = [1.0, 0.5, 0.25]
    result = aggregate(base, experts, weights, **options)
    expected, _ = reference(base, experts, AggregateOptions(weights=tuple(weights), **options))
    assert torch.equal(result, expected)
    # Of a weight and expert: the difference, its product with the weight, the sum; for TIES the comparison with the
    # threshold, the sum of signs, the comparison with the elected sign, the count.
    operations = (len(experts) * (7 if rule == "ties" else 3) + 1) * base.numel()
    timed(lambda: aggregate(base, experts, weights, **options), work=(operations, (len(experts) + 2) * base.nbytes))
