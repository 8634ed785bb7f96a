"""regmean_plus: RegMean's arithmetic with other defaults, against fusion-bench's RegMean++."""

from __future__ import annotations

import pytest
import torch
from inputs import group, randn, relative, same_bits
from oracles import fusion_bench

from resm_kernels import merge
from resm_kernels.methods import get

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("transposed", [False, True])
def test_equals_fusion_bench(transposed: bool) -> None:
    _, experts = group((20, 24), 3, base_dtype=torch.float64)
    experts = [e.mT.contiguous() for e in experts] if transposed else experts
    inputs = [randn(90, 24, seed=t, dtype=torch.float64) for t in range(3)]
    grams = [x.mT @ x / len(x) for x in inputs]
    module = fusion_bench("regmean_plusplus.regmean_plusplus")
    expected = module.regmean_params_merge(experts, grams, 0.95, weight_transpose=not transposed)
    merged = merge(None, experts, "regmean_plus", statistics=grams, ridge=0.0, transposed=transposed)
    assert relative(merged, expected) <= 1e-7  # fusion-bench forms 1 − 0.95 in fp32


def test_differs_from_regmean_by_its_default_and_by_whose_statistics_it_takes() -> None:
    base, experts = group((12, 10), 2)
    grams = [x.mT @ x / 40 for x in (randn(40, 10, seed=t, dtype=torch.float64) for t in range(2))]
    merged = merge(base, experts, "regmean_plus", statistics=grams)
    assert same_bits(merged, merge(base, experts, "regmean", statistics=grams, off_diagonal=0.95))
    assert not same_bits(merged, merge(base, experts, "regmean", statistics=grams))
    assert (get("regmean_plus").statistics, get("regmean_plus").statistics_model) == ("gram", "merged")
