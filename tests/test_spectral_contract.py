"""The contract of every method that merges matrices by their singular vectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import SameOnThreads
from inputs import (
    LAYOUTS,
    MATRICES,
    experts_with_spectra,
    laid_out,
    merged_delta,
    orthonormal,
    randn,
    relative,
    same_bits,
)

from resm_kernels import NonFiniteError, merge

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """A method, its parameters, and the relative tolerances to which it keeps the contract.

    Attributes:
        rounding: Tolerance of a merge of half-precision inputs against the merge of their float64 copies.
        order: Tolerance of a merge of the same experts in another order.
        turned: Tolerance of a merge whose inputs are multiplied by orthogonal matrices; 0: it does not turn with them.
        scaled: Tolerance of a merge of scaled task vectors; 0: the merge does not scale with them.
        sides: The sides on which `turned` multiplies.
        in_fp32: Whether the method computes task vectors of fp32 inputs in fp32, where they may overflow.
    """

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    rounding: float = 2e-6
    order: float = 1e-9
    turned: float = 1e-9
    scaled: float = 1e-10
    sides: str = "left right"
    in_fp32: bool = True

    def __str__(self) -> str:
        return f"{self.method} {self.parameters or ''}"


CASES = [
    Case("dc_merge", {"density": 0.05}),
    Case("dc_merge", {"density": 0.05, "smoothing": "average"}),
    Case("iso_c"),
    Case("iso_cts", rounding=1e-5, order=1e-8, turned=1e-8, scaled=1e-8),
    # Trimming and electing jump where rounding moves a coordinate across a threshold.
    Case("knots", rounding=3e-3, order=1e-8, turned=0, scaled=1e-8),
    Case("knots", {"density": 0.5}, rounding=3e-3, order=1e-8, turned=1e-8, scaled=1e-8, sides="left"),
    Case("knots", {"inner": "sum"}, rounding=1e-6, order=1e-8, turned=0, scaled=1e-8, in_fp32=False),
    Case("resm", {"accuracy": 0.0, "beta": 1.0}, rounding=1e-5, order=1e-8, turned=0, scaled=1e-8),
    Case("resm", {"accuracy": 0.0, "gamma": 0.0}, rounding=1e-5, order=1e-8, turned=1e-8, scaled=1e-8),
    Case("resmerge", {"decomposition": "gram"}, rounding=5e-6, order=1e-11),
    Case("star", order=1e-12, turned=1e-10),
    Case("svc", in_fp32=False),
    Case("swudi", order=1e-12),
    Case("tsvm", rounding=1e-5, order=1e-8, turned=1e-8, scaled=1e-8),
    *(Case("tsv_compress", p, order=1e-12, turned=1e-10) for p in ({}, {"rank": 4}, {"share": 0.2})),
    # Adam scales each coordinate by itself, and its steps are as long for short task vectors as for long ones.
    Case("wudi", order=1e-10, turned=0, scaled=0),
]
METHODS = sorted({case.method for case in CASES})
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_case
def test_refuses_inputs_that_no_merge_takes(case: Case) -> None:
    base, experts = experts_with_spectra(9, 7, 2)
    for shaped in (lambda x: x.clone(), lambda x: x[0].clone()):
        for bad in (torch.nan, torch.inf, -torch.inf):
            for position, name in ((0, "base"), (2, r"experts\[1\]")):
                tensors = [shaped(t) for t in (base, *experts)]
                tensors[position].view(-1)[3] = bad
                with pytest.raises(NonFiniteError, match=name + ": got 1 NaN or infinite values"):
                    merge(tensors[0], tensors[1:], case.method, **case.parameters)
    with pytest.raises(ValueError, match=r"experts\[1\]: got shape \[9, 6\], need \[9, 7\]"):
        merge(base, [experts[0], experts[1][:, :6]], case.method, **case.parameters)
    with pytest.raises(TypeError, match=r"experts\[0\]: got dtype int64"):
        merge(base, [experts[0].long(), experts[1]], case.method, **case.parameters)
    with pytest.raises(TypeError, match=r"out_dtype: got torch\.int32"):
        merge(base, experts, case.method, **case.parameters, out_dtype=torch.int32)
    with pytest.raises(ValueError, match=f"{case.method} has no parameter 'weights', did you mean 'weight'"):
        merge(base, experts, case.method, **case.parameters, weights=1.0)
    with pytest.raises(ValueError, match="base: got None"):
        merge(None, experts, case.method, **case.parameters)


@pytest.mark.parametrize("case", [case for case in CASES if case.in_fp32], ids=str)
def test_refuses_differences_beyond_fp32(case: Case) -> None:
    base, far = torch.full((9, 7), -3e38), torch.full((9, 7), 3e38)
    with pytest.raises(ValueError, match="exceeds the range of fp32"):
        merge(base, [far, far], case.method, **case.parameters)


@each_case
def test_zero_task_vectors_give_the_base(case: Case) -> None:
    for shape in [*MATRICES, (1, 1), (1, 5), (5, 1), (0, 4), (4, 0)]:
        for dtype in (torch.float32, torch.bfloat16):
            base = randn(*shape, seed=0, dtype=dtype)
            assert same_bits(merge(base, [base.clone() for _ in range(3)], case.method, **case.parameters), base)


@pytest.mark.parametrize("case", [case for case in CASES if case.method != "svc"], ids=str)
def test_tensors_that_are_no_matrices_are_averaged(case: Case) -> None:
    weight = [1.0, 0.5, 2.0]
    average = {"method": "task_arithmetic", "weight": [w / 3 for w in weight], "lambda_": 0.7}
    spectral = {"method": case.method, "weight": weight, "lambda_": 0.7, **case.parameters}
    for shape in [(), (0,), (17,), (3, 4, 5), (0, 6)]:
        base, experts = randn(*shape, seed=0), [randn(*shape, seed=t) for t in (1, 2, 3)]
        # Vectors in float64, rounded once.
        dtype = torch.float64 if len(shape) < 2 else torch.float32
        expected = merge(base.to(dtype), [expert.to(dtype) for expert in experts], **average).float()
        assert same_bits(merge(base, experts, **spectral), expected)
    base, experts = experts_with_spectra(12, 10, 3)
    assert same_bits(merge(base, experts, spectral=False, **spectral), merge(base, experts, **average))


@each_case
def test_inputs_are_not_changed(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        base, experts = experts_with_spectra(20, 16, 2, dtype=dtype)
        before = [t.clone() for t in (base, *experts)]
        merge(base, experts, case.method, **case.parameters)
        assert all(same_bits(a, b) for a, b in zip(before, (base, *experts), strict=True))


@each_case
@pytest.mark.parametrize("names", ["bfloat16 bfloat16 bfloat16", "float16 float16 float16", "bfloat16 float32 float16"])
def test_takes_all_dtypes(case: Case, names: str) -> None:
    """Δ of half-precision inputs is exact in fp32, so that float64 copies of them give the same but for rounding."""
    dtypes = [getattr(torch, name) for name in names.split()]
    base, experts = experts_with_spectra(40, 31, 2, dtype=torch.float64)
    base, experts = base.to(dtypes[0]), [e.to(dtype) for e, dtype in zip(experts, dtypes[1:], strict=True)]
    exact = merge(base.double(), [e.double() for e in experts], case.method, **case.parameters)
    single = merge(base, experts, case.method, out_dtype=torch.float32, **case.parameters)
    assert single.dtype == torch.float32 and single.is_contiguous()
    assert relative(single.double() - base.double(), exact - base.double()) <= case.rounding
    rounded = merge(base, experts, case.method, **case.parameters)
    assert rounded.dtype == base.dtype
    info = torch.finfo(base.dtype)
    step = (exact.abs() / 2).clamp(min=info.smallest_normal) * info.eps
    error = case.rounding * float((exact - base.double()).abs().max())
    assert bool(((rounded.double() - exact).abs() <= step + error).all())


# RESM computes half-precision inputs only as exactly as they are.
@pytest.mark.parametrize("method", [method for method in METHODS if method != "resm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(method: str, dtype: torch.dtype) -> None:
    base, experts = experts_with_spectra(40, 30, 3, dtype=dtype)
    exact = merge(base.float(), [e.float() for e in experts], method, out_dtype=torch.float64)
    assert same_bits(merge(base, experts, method), exact.to(dtype))
    mixed = merge(base.float(), [experts[0], experts[1].double(), experts[2].float()], method, out_dtype=dtype)
    assert mixed.dtype == dtype and relative(mixed, exact) <= 2 * torch.finfo(dtype).eps
    assert method != "svc" or same_bits(mixed, exact.to(dtype))


@each_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_any_layout(case: Case, layout: str) -> None:
    base, *experts = laid_out(layout)
    merged = merge(base, experts, case.method, **case.parameters)
    assert merged.is_contiguous()
    copies = [e.contiguous() for e in experts]
    assert same_bits(merged, merge(base.contiguous(), copies, case.method, **case.parameters))


@each_case
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_order_of_experts_does_not_matter(case: Case, shape: tuple[int, int]) -> None:
    base, experts = experts_with_spectra(*shape, 3, dtype=torch.float64)
    expected = merged_delta(base, experts, case.method, weight=[1.0, 0.5, 2.0], **case.parameters)
    for order, weight in (([1, 2, 0], [0.5, 2.0, 1.0]), ([2, 1, 0], [2.0, 0.5, 1.0])):
        reordered = merged_delta(base, [experts[t] for t in order], case.method, weight=weight, **case.parameters)
        assert relative(reordered, expected) <= case.order


@pytest.mark.parametrize("case", [case for case in CASES if case.turned], ids=str)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_turns_with_its_inputs(case: Case, shape: tuple[int, int]) -> None:
    """M(Q·Δ·Pᵀ) = Q·M(Δ)·Pᵀ for orthogonal Q and P."""
    base, experts = experts_with_spectra(*shape, 3, dtype=torch.float64)
    q, p = (
        orthonormal(k, k, seed) if side in case.sides else torch.eye(k, dtype=torch.float64)
        for k, side, seed in zip(shape, ("left", "right"), (5, 6), strict=True)
    )
    turned = merged_delta(q @ base @ p.mT, [q @ e @ p.mT for e in experts], case.method, **case.parameters)
    assert relative(turned, q @ merged_delta(base, experts, case.method, **case.parameters) @ p.mT) <= case.turned


@pytest.mark.parametrize("case", [case for case in CASES if case.scaled], ids=str)
def test_scales_with_its_inputs(case: Case) -> None:
    base, experts = experts_with_spectra(31, 24, 3, dtype=torch.float64)
    zero, deltas = torch.zeros_like(base), [e - base for e in experts]
    expected = merged_delta(zero, deltas, case.method, **case.parameters)
    for factor in (2.0**-60, 1e-9, 0.1, 0.5, 1e9, 2.0**60):
        scaled = merged_delta(zero, [factor * d for d in deltas], case.method, **case.parameters)
        assert relative(scaled, factor * expected) <= case.scaled
    reversed_ = merged_delta(zero, deltas, case.method, lambda_=-0.3, **case.parameters)
    assert relative(reversed_, -0.3 * expected) <= 1e-12
    assert same_bits(merge(base, experts, case.method, lambda_=0.0, **case.parameters), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("svc", {}), ("swudi", {}), ("swudi", {"rank_rule": "participation_sqrt", "filter": "none"}), ("wudi", {})],
    ids=str,
)
def test_one_expert_gives_itself(method: str, parameters: dict[str, Any], dtype: torch.dtype) -> None:
    base, (expert,) = experts_with_spectra(30, 20, 1, dtype=dtype)
    merged = merge(base, [expert], method, **parameters)
    assert relative(merged, expert) <= 1e-7 and (dtype == torch.float32 or same_bits(merged, expert))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        *((method, {}) for method in METHODS if method != "wudi"),
        ("dc_merge", {"smoothing": "linear"}),
        ("resmerge", {"decomposition": "gram"}),
        ("wudi", {"steps": 8}),
    ],
    ids=str,
)
def test_same_bits_on_any_threads(method: str, parameters: dict[str, Any], same_on_threads: SameOnThreads) -> None:
    groups = [
        experts_with_spectra(330, 305, 2, dtype=torch.bfloat16),
        experts_with_spectra(330, 305, 2),
        experts_with_spectra(523, 301, 3),
        experts_with_spectra(310, 401, 2),
    ]
    same_on_threads(lambda: [merge(*group, method, out_dtype=torch.float64, **parameters) for group in groups])
