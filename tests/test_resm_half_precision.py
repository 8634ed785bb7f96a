"""RESM of experts in half precision: fp32 by default, how far that is from the definition, and who keeps float64."""

from __future__ import annotations

import pytest
import torch
from inputs import power_law, randn, relative, same_bits, with_spectrum
from test_resm import formula
from torch import Tensor

from resm_kernels import merge
from resm_kernels.methods.resm import layer_plan

pytestmark = pytest.mark.usefixtures("one_thread")


def half_precision(m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A base of 0.02 and task vectors of rms 2e-4 with decaying spectra, as stored: a fifth of bf16's are zeros."""
    base = (0.02 * randn(m, n, seed=0, dtype=torch.float64)).to(dtype)
    experts = []
    for t in range(3):
        delta = with_spectrum(m, n, power_law(min(m, n), 0.7), seed=10 * (t + 1))
        experts.append((base.double() + delta * (2e-4 * (m * n) ** 0.5 / delta.norm())).to(dtype))
    return base, experts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(256, 256), (300, 210), (210, 300)], ids=str)
def test_half_precision_experts_are_merged_in_fp32_by_default(shape: tuple[int, int], dtype: torch.dtype) -> None:
    base, experts = half_precision(*shape, dtype)
    m, _ = formula(base, experts)
    default, loose, exact = (
        merge(base, experts, "resm", out_dtype=torch.float64, **choice)
        for choice in ({}, {"accuracy": 1e-3}, {"accuracy": 0})
    )
    assert same_bits(default, loose) and not torch.equal(default, exact)
    for merged, bound in ((exact, 2e-6), (default, 1e-4)):
        # fp32 rounds θ₀ + M by 2^-24 of θ₀, which is a hundred times M.
        assert relative(merged - base.double(), m) <= bound + 100 * 2.0**-24
    assert layer_plan(base, experts).accuracy == 1e-3 and layer_plan(base, experts, accuracy=0).accuracy == 0


def test_other_experts_are_merged_in_float64_by_default() -> None:
    base, experts = half_precision(256, 256, torch.bfloat16)
    for mixed in ([*experts[:2], experts[2].float()], [e.float() for e in experts], [e.double() for e in experts]):
        assert same_bits(merge(base, mixed, "resm"), merge(base, mixed, "resm", accuracy=0.0))
        assert layer_plan(base, mixed).accuracy == 0
    # The base's dtype says nothing about the experts.
    assert layer_plan(base.float(), experts).accuracy == 1e-3
