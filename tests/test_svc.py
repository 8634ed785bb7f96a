"""svc: against fusion-bench's two implementations, and by hand where they give no result."""

from __future__ import annotations

import pytest
import torch
from inputs import experts_with_spectra, randn, relative, same_bits
from oracles import fusion_bench
from torch import Tensor

from resm_kernels import merge
from resm_kernels.methods import get
from resm_kernels.methods.svc import calibrate

pytestmark = pytest.mark.usefixtures("one_thread")


def fusion_bench_svc(base: Tensor, experts: list[Tensor], merged: Tensor, alpha: float, fast: bool = True) -> Tensor:
    module = fusion_bench("singular_value_calibration.utils")
    name = "subspace_consistency_spectral_calibration" + ("_accelerated" if fast else "")
    calibrated: Tensor = getattr(module, name)(base, experts, merged, alpha, accelerator=torch.device("cpu"))
    return calibrated


@pytest.mark.parametrize("alpha", [0.1, 1 / 3, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(48, 48), (64, 40), (33, 50), (3, 40), (40, 1)], ids=str)
def test_equals_fusion_bench(shape: tuple[int, int], alpha: float) -> None:
    base, experts = experts_with_spectra(*shape, 3, 0.7, seed=3, dtype=torch.float64)
    deltas = [e - base for e in experts]
    for merged in (deltas[0] + deltas[1] + deltas[2], deltas[0] - 0.5 * deltas[1], randn(*shape, seed=5).double()):
        calibrated = calibrate(merged, deltas, alpha)
        for fast in (True, False):
            expected = fusion_bench_svc(base, experts, base + merged, alpha, fast) - base
            assert relative(calibrated, expected) <= 1e-10


@pytest.mark.parametrize("inner", ["task_arithmetic", "linear", "ties", "tsvm", "resm", "swudi"])
def test_calibrates_the_merge_of_the_inner_method(inner: str) -> None:
    base, experts = experts_with_spectra(30, 24, 3, 0.7, seed=1, dtype=torch.float64)
    merged = merge(base, experts, inner)
    expected = calibrate(merged - base, [e - base for e in experts], 0.5)
    calibrated = merge(base, experts, "svc", inner=inner, alpha=0.5)
    assert relative(calibrated - base, expected) <= 1e-9
    assert relative(merge(base, experts, "svc", inner=inner, alpha=0.5, lambda_=0.3) - base, 0.3 * expected) <= 1e-9
    # fp32 inputs lose nothing on the way but in the inner method's float64 run of them.
    single = [e.float() for e in experts]
    exact = merge(base.float().double(), [e.double() for e in single], "svc", inner=inner)
    assert relative(merge(base.float(), single, "svc", inner=inner, out_dtype=torch.float64), exact) <= 1e-12


def test_inner_parameters() -> None:
    base, experts = experts_with_spectra(30, 24, 2, dtype=torch.float64)
    deltas = [e - base for e in experts]
    merged = merge(base, experts, "svc", inner="ties", inner_density=[0.3, 0.5], inner_normalize=False)
    expected = calibrate(merge(base, experts, "ties", density=[0.3, 0.5], normalize=False) - base, deltas)
    assert relative(merged - base, expected) <= 1e-12
    # A recipe that says it for some experts leaves the others None: they have the inner method's default.
    merged = merge(base, experts, "svc", inner="ties", inner_density=[None, 0.5])
    assert relative(merged - base, calibrate(merge(base, experts, "ties", density=[1.0, 0.5]) - base, deltas)) <= 1e-12
    merged = merge(base, experts, "svc", inner_lambda=0.3, weight=2.0)
    assert relative(merged - base, calibrate(0.6 * (deltas[0] + deltas[1]), deltas)) <= 1e-12
    # dc_merge has one density for all experts, ties one each.
    merged = merge(base, experts, "svc", inner="dc_merge", inner_density=[0.1, 0.1])
    assert relative(merged - base, calibrate(merge(base, experts, "dc_merge", density=0.1) - base, deltas)) <= 1e-12


def test_every_parameter_of_every_inner_method_can_be_set() -> None:
    outer = {p.name for p in get("svc").parameters}
    for name in get("svc").parameter("inner").kind:
        missing = {p.name for p in get(name).parameters if not p.ignored and not {p.name, "inner_" + p.name} & outer}
        assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize("shape", [(30,), (), (0, 4), (2, 3, 5)], ids=str)
def test_tensors_that_are_no_matrices_are_merged_by_the_inner_method(shape: tuple[int, ...]) -> None:
    base, experts = randn(*shape, seed=0), [randn(*shape, seed=t) for t in (1, 2, 3)]
    expected = merge(base, experts, "task_arithmetic")
    assert same_bits(merge(base, experts, "svc"), expected)
    torch.testing.assert_close(merge(base, experts, "svc", lambda_=0.5), base + 0.5 * (expected - base))
    matrix, others = experts_with_spectra(12, 9, 2)
    assert same_bits(merge(matrix, others, "svc", inner="tsvm", spectral=False), merge(matrix, others, "tsvm"))


def test_shared_directions_are_counted_once() -> None:
    base, (expert,) = experts_with_spectra(30, 20, 1, dtype=torch.float64)
    delta = expert - base
    # Copies add up T-fold, and calibration takes that back; task vectors that share nothing it leaves alone.
    assert relative(calibrate(3 * delta, [delta] * 3), delta) <= 1e-9
    assert relative(merge(base, [expert] * 3, "svc"), expert) <= 1e-9
    apart = [torch.zeros_like(delta), torch.zeros_like(delta)]
    apart[0][:15, :10], apart[1][15:, 10:] = delta[:15, :10], delta[15:, 10:]
    assert relative(calibrate(apart[0] + apart[1], apart), apart[0] + apart[1]) <= 1e-9


def test_an_answer_that_is_rounding_is_none() -> None:
    # Expert 1 answers to expert 0's directions with 1e-17 of its size: divided by that, s would be 1e17 or so.
    left, right = (torch.linalg.qr(randn(30, 30, seed=s, dtype=torch.float64)).Q for s in (1, 2))
    values = torch.linspace(2, 1, 30, dtype=torch.float64)
    first, second = values.clone(), values.flip(0) * 0.9
    first[15:], second[:15] = 0, 0
    deltas = [(left * s) @ right.mT for s in (first, second)]
    assert relative(calibrate(deltas[0] + deltas[1], deltas), deltas[0] + deltas[1]) <= 1e-9
    wide = [d[:, :20].mT.contiguous() @ left[:, :20] @ left[:, :20].mT for d in deltas]
    assert bool(torch.isfinite(calibrate(wide[0], wide)).all())


def test_an_expert_that_changed_nothing_answers_to_no_direction() -> None:
    """Its α, here 1, is that of an expert without interference."""
    base, experts = experts_with_spectra(40, 30, 3, dtype=torch.float64)
    assert torch.isfinite(merge(base, [base, *experts], "svc")).all()


def test_errors() -> None:
    base, experts = experts_with_spectra(6, 5, 2)
    with pytest.raises(ValueError, match=r"alpha: got -1, need a number above 0"):
        calibrate(base, experts, -1)
    with pytest.raises(ValueError, match=r"deltas: got shapes \[\[5, 6\]\], need .*shape \[6, 5\]"):
        calibrate(base, [experts[0].mT])


@pytest.mark.parametrize(("inner", "name"), [("resm", "model.embed_tokens.weight"), ("dare_ties", "model.layers.0.w")])
def test_inner_method_gets_the_tensors_name(inner: str, name: str) -> None:
    """The inner method has the same defaults and random numbers inside svc as alone."""
    base, experts = randn(24, 16, seed=0), [randn(24, 16, seed=t) for t in (1, 2, 3)]
    parameters = {"density": 0.5} if inner == "dare_ties" else {}
    passed = {f"inner_{key}": value for key, value in parameters.items()}
    merged = merge(base, experts, "svc", name=name, seed=7, inner=inner, spectral=False, **passed)
    assert torch.equal(merged, merge(base, experts, inner, name=name, seed=7, **parameters))
    assert not torch.equal(merged, merge(base, experts, inner, name="model.layers.1.w", seed=7, **parameters))
