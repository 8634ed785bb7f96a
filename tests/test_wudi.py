"""wudi: against fusion-bench's WUDI and against the same optimisation in float64, through autograd.

`STEPS` is the largest accepted error of fp32 steps, relative to the merged task vector's norm.
"""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from inputs import experts_with_spectra, merged_delta, relative, same_bits
from oracles import fusion_bench
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 2e-6


def fusion_bench_wudi(deltas: list[Tensor], steps: int = 300) -> Tensor:
    module = fusion_bench("wudi.wudi")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        merged: Tensor = module.wudi_merging([{"w": d.clone()} for d in deltas], accelerator="cpu", iter_num=steps)["w"]
    return merged.detach()


def by_autograd(deltas: list[Tensor], steps: int, lr: float = 1e-5) -> Tensor:
    """The authors' loss as they write it, in float64."""
    stacked = torch.stack([d.double() for d in deltas])
    merged = torch.nn.Parameter(stacked.sum(0))
    adam = torch.optim.Adam([merged], lr=lr)
    norms = stacked.flatten(1).norm(dim=1).square()
    for _ in range(steps):
        products = (merged - stacked) @ stacked.mT
        adam.zero_grad()
        (products.square().sum((1, 2)) / norms).sum().backward()
        adam.step()
    return merged.detach()


@pytest.mark.parametrize("n_experts", [2, 3, 5])
@pytest.mark.parametrize("shape", [(48, 48), (64, 40), (33, 50), (3, 40)], ids=str)
def test_equals_fusion_bench(shape: tuple[int, int], n_experts: int) -> None:
    base, experts = experts_with_spectra(*shape, n_experts, 0.7, seed=3)
    expected = fusion_bench_wudi([e - base for e in experts])
    assert relative(merged_delta(base, experts, "wudi"), expected) <= STEPS
    assert relative(sum(e.double() - base.double() for e in experts), expected) > 0.1


@pytest.mark.parametrize("size", [1.0, 0.03])
def test_float64_takes_the_steps_of_autograd(size: float) -> None:
    base, experts = experts_with_spectra(40, 31, 3, 0.7, seed=1, dtype=torch.float64)
    experts = [base + size * (e - base) for e in experts]
    deltas = [e - base for e in experts]
    for steps, lr in ((0, 1e-5), (1, 1e-3), (60, 3e-5)):
        expected = by_autograd(deltas, steps, lr)
        assert relative(merged_delta(base, experts, "wudi", steps=steps, lr=lr), expected) <= 1e-11
        halves = merge(base, experts, "wudi", steps=steps, lr=lr, lambda_=0.5) - base
        assert relative(halves, expected / 2) <= 1e-11
    halved = [d * w for d, w in zip(deltas, (1.0, 0.5, 2.0), strict=True)]
    merged = merged_delta(base, experts, "wudi", steps=20, weight=[1.0, 0.5, 2.0])
    assert relative(merged, by_autograd(halved, 20)) <= 1e-11


def test_rows_do_not_depend_on_each_other() -> None:
    base, experts = experts_with_spectra(300, 20, 2)  # two panels of rows
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    merged = merge(base, experts, "wudi", steps=30)
    shuffled = merge(base[order], [e[order] for e in experts], "wudi", steps=30)
    assert relative(shuffled - base[order], merged[order] - base[order]) <= 1e-4


def test_task_vectors_that_are_zero_have_no_term() -> None:
    base, experts = experts_with_spectra(30, 20, 2)
    assert same_bits(merge(base, [base, *experts, base], "wudi"), merge(base, experts, "wudi"))
    assert same_bits(merge(base, [base, base.clone()], "wudi"), base)


def test_copies_of_one_expert_shrink_towards_it() -> None:
    base, (expert,) = experts_with_spectra(24, 24, 1, 0.3, dtype=torch.float64)
    # The minimum is the expert itself; Adam starts from three times that.
    far, near = (relative(merged_delta(base, [expert] * 3, "wudi", steps=s, lr=1e-4), expert - base) for s in (0, 3000))
    assert far == pytest.approx(2.0) and near < 1e-3
