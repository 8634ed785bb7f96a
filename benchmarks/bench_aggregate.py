"""aggregate of three experts, against torch.clone of the same four tensors."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import aggregate, magnitude_threshold
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
    found = aggregate(base, experts, weights, **options)
    limits = None if thresholds is None else thresholds[None]
    (want,), _ = reference([base], experts, weights, 3, 1.0, rule, rule == "ties", limits, None)
    assert torch.equal(found, want)
    timed(lambda: aggregate(base, experts, weights, **options))


def bench_aggregate_list_of_small(timed, checkpoint):
    """200 tensors of 4096 elements in one call, for the cost of a call."""
    from resm_kernels.ops import aggregate_list

    base, experts = checkpoint
    bases, groups = list(base[:200].unbind(0)), [[e[i] for e in experts] for i in range(200)]
    merged = aggregate_list(bases, groups, [[1.0, 1.0, 1.0]] * 200)
    assert torch.equal(merged[7], aggregate(bases[7], groups[7], [1.0, 1.0, 1.0]))
    timed(lambda: aggregate_list(bases, groups, [[1.0, 1.0, 1.0]] * 200))
