"""What every merge of matrices by their singular vectors has to keep to; the methods' tests call these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import LAYOUTS, experts_with_spectra, laid_out, orthonormal, randn, relative, same_bits
from torch import Tensor

from resm_kernels import NonFiniteError, merge

SHAPES = [(40, 40), (52, 31), (31, 52)]


def merged_delta(base: Tensor, experts: list[Tensor], method: str, **given: Any) -> Tensor:
    """λ·M in float64; of float64 inputs with nothing lost by rounding but what the base's size costs."""
    return merge(base, experts, method, out_dtype=torch.float64, **given) - base.double()


def refuses_what_no_merge_takes(method: str, **given: Any) -> None:
    base, experts = experts_with_spectra(9, 7, 2)
    for shaped in (lambda x: x.clone(), lambda x: x[0].clone()):
        for bad in (torch.nan, torch.inf, -torch.inf):
            for where, name in ((0, "base"), (2, r"experts\[1\]")):
                tensors = [shaped(t) for t in (base, *experts)]
                tensors[where].view(-1)[3] = bad
                with pytest.raises(NonFiniteError, match=name + ": got 1 NaN or infinite values"):
                    merge(tensors[0], tensors[1:], method, **given)
    with pytest.raises(ValueError, match=r"experts\[1\]: got shape \[9, 6\], need \[9, 7\]"):
        merge(base, [experts[0], experts[1][:, :6]], method, **given)
    with pytest.raises(TypeError, match=r"experts\[0\]: got dtype int64"):
        merge(base, [experts[0].long(), experts[1]], method, **given)
    with pytest.raises(TypeError, match=r"out_dtype: got torch\.int32"):
        merge(base, experts, method, out_dtype=torch.int32, **given)
    with pytest.raises(ValueError, match=f"{method} has no parameter 'weights', did you mean 'weight'"):
        merge(base, experts, method, weights=1.0, **given)
    with pytest.raises(ValueError, match="base: got None"):
        merge(None, experts, method, **given)


def refuses_differences_beyond_fp32(method: str, **given: Any) -> None:
    base, far = torch.full((9, 7), -3e38), torch.full((9, 7), 3e38)
    with pytest.raises(ValueError, match="exceeds the range of fp32"):
        merge(base, [far, far], method, **given)


def gives_the_base_for_zero_task_vectors(method: str, **given: Any) -> None:
    for shape in [*SHAPES, (1, 1), (1, 5), (5, 1), (0, 4), (4, 0)]:
        for dtype in (torch.float32, torch.bfloat16):
            base = randn(*shape, seed=0, dtype=dtype)
            assert same_bits(merge(base, [base.clone() for _ in range(3)], method, **given), base)


def averages_what_is_no_matrix(method: str, **given: Any) -> None:
    weight = [1.0, 0.5, 2.0]
    for shape in [(), (0,), (17,), (3, 4, 5), (0, 6)]:
        base, experts = randn(*shape, seed=0), [randn(*shape, seed=t) for t in (1, 2, 3)]
        # Vectors in float64, rounded once.
        dtype = torch.float64 if len(shape) < 2 else torch.float32
        inputs = base.to(dtype), [expert.to(dtype) for expert in experts]
        wanted = merge(*inputs, "task_arithmetic", weight=[w / 3 for w in weight], lambda_=0.7).float()
        assert same_bits(merge(base, experts, method, weight=weight, lambda_=0.7, **given), wanted)
    base, experts = experts_with_spectra(12, 10, 3)
    wanted = merge(base, experts, "task_arithmetic", weight=[w / 3 for w in weight], lambda_=0.7)
    assert same_bits(merge(base, experts, method, weight=weight, lambda_=0.7, spectral=False, **given), wanted)


def does_not_depend_on_the_order_of_experts(method: str, tolerance: float, **given: Any) -> None:
    for shape in SHAPES:
        base, experts = experts_with_spectra(*shape, 3, dtype=torch.float64)
        wanted = merged_delta(base, experts, method, weight=[1.0, 0.5, 2.0], **given)
        turned = merged_delta(base, experts[1:] + experts[:1], method, weight=[0.5, 2.0, 1.0], **given)
        assert relative(turned, wanted) <= tolerance


def turns_with_its_inputs(method: str, tolerance: float, sides: str = "left right", **given: Any) -> None:
    """M(Q·Δ·Pᵀ) = Q·M(Δ)·Pᵀ for orthogonal Q and P."""
    for m, n in SHAPES:
        base, experts = experts_with_spectra(m, n, 3, dtype=torch.float64)
        q = orthonormal(m, m, seed=5) if "left" in sides else torch.eye(m, dtype=torch.float64)
        p = orthonormal(n, n, seed=6) if "right" in sides else torch.eye(n, dtype=torch.float64)
        turned = merged_delta(q @ base @ p.mT, [q @ e @ p.mT for e in experts], method, **given)
        assert relative(turned, q @ merged_delta(base, experts, method, **given) @ p.mT) <= tolerance


def scales_with_its_inputs(method: str, tolerance: float, **given: Any) -> None:
    base, experts = experts_with_spectra(31, 24, 3, dtype=torch.float64)
    zero = torch.zeros_like(base)
    deltas = [e - base for e in experts]
    wanted = merged_delta(zero, deltas, method, **given)
    for factor in (1e-9, 0.5, 1e9):
        larger = merged_delta(zero, [factor * d for d in deltas], method, **given)
        assert relative(larger, factor * wanted) <= tolerance
    assert relative(merged_delta(zero, deltas, method, lambda_=-0.3, **given), -0.3 * wanted) <= 1e-12


def takes_all_dtypes_and_layouts(method: str, tolerance: float, **given: Any) -> None:
    """Δ of half-precision inputs is exact in fp32, so that float64 copies of them give the same but for rounding."""
    for kinds in [(torch.bfloat16,) * 3, (torch.float16,) * 3, (torch.bfloat16, torch.float32, torch.float16)]:
        base, experts = experts_with_spectra(40, 31, 2, dtype=torch.float64)
        base, experts = base.to(kinds[0]), [e.to(kind) for e, kind in zip(experts, kinds[1:], strict=True)]
        exact = merge(base.double(), [e.double() for e in experts], method, **given)
        found = merge(base, experts, method, out_dtype=torch.float32, **given)
        assert found.dtype == torch.float32 and found.is_contiguous()
        assert relative(found.double() - base.double(), exact - base.double()) <= tolerance
        rounded = merge(base, experts, method, **given)
        assert rounded.dtype == base.dtype
        info = torch.finfo(base.dtype)
        step = (exact.abs() / 2).clamp(min=info.smallest_normal) * info.eps
        error = tolerance * float((exact - base.double()).abs().max())
        assert bool(((rounded.double() - exact).abs() <= step + error).all())
    for layout in LAYOUTS:
        tensors = laid_out(layout)
        found = merge(tensors[0], tensors[1:], method, **given)
        assert found.is_contiguous()
        assert same_bits(found, merge(tensors[0].contiguous(), [t.contiguous() for t in tensors[1:]], method, **given))


def leaves_its_inputs_alone(method: str, **given: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        base, experts = experts_with_spectra(20, 16, 2, dtype=dtype)
        before = [t.clone() for t in (base, *experts)]
        merge(base, experts, method, **given)
        assert all(same_bits(a, b) for a, b in zip(before, (base, *experts), strict=True))


def has_the_same_bits_for_any_threads(method: str, use_threads: Callable[[int], None], **given: Any) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        base, experts = experts_with_spectra(330, 305, 2, dtype=dtype)
        found = []
        for threads in (1, 2, 3):
            use_threads(threads)
            found.append(merge(base, experts, method, out_dtype=torch.float64, **given))
        assert same_bits(found[1], found[0]) and same_bits(found[2], found[0])


def keeps_the_contract(method: str, tolerance: float, **given: Any) -> None:
    """All of the above but for what takes a fixture, or holds for some methods only."""
    refuses_what_no_merge_takes(method, **given)
    gives_the_base_for_zero_task_vectors(method, **given)
    averages_what_is_no_matrix(method, **given)
    leaves_its_inputs_alone(method, **given)
    takes_all_dtypes_and_layouts(method, tolerance, **given)
