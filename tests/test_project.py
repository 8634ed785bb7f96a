"""project: products within the rounding bound the op states, the same for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import ISAS
from hypothesis import given
from hypothesis import strategies as st
from inputs import KINDS, LAYOUTS, dtype_pairs, generator, group, laid_out, orthonormal, randn, same_bits
from torch import Tensor

from resm_kernels.ops import gram_product, project, random_matrix
from resm_kernels.reference.deltas import task_matrix_fp32
from resm_kernels.reference.project import project as reference

pytestmark = pytest.mark.usefixtures("one_thread")

# Kernels work on 256 rows, 48 columns of Δ and 24 of q at a time; (300, 5, 4096) packs q in two parts.
SIZES = [(1, 1, 1), (5, 3, 2), (256, 48, 24), (257, 49, 25), (300, 7, 6), (33, 205, 70), (515, 101, 33), (300, 5, 4096)]
EMPTY = [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0, 0)]


def check(result: Tensor, base: Tensor | None, expert: Tensor, q: Tensor) -> None:
    """Fail unless `result` is qᵀΔ within the bound that `project` states, and m roundings of subnormal products."""
    m = expert.shape[0]
    delta, left = task_matrix_fp32(base, expert).double(), q.double().mT
    steps = (min(m, 256) + math.ceil(m / 256) + 1) * 2.0**-24
    bound = steps / (1 - steps) * (left.abs() @ delta.abs()) + m * 2.0**-149
    assert result.dtype == torch.float32 and result.shape == (q.shape[1], expert.shape[1]) and result.is_contiguous()
    assert bool(((result.double() - left @ delta).abs() <= bound).all())


@pytest.mark.parametrize("m, n, l", SIZES + EMPTY, ids=str)
def test_every_size_is_within_the_bound(m: int, n: int, l: int) -> None:  # noqa: E741
    base, (expert,) = group((m, n), 1, base_dtype=torch.bfloat16)
    q = randn(m, l, seed=1)
    check(project(base, expert, q), base, expert, q)
    check(project(None, expert, q), None, expert, q)


@pytest.mark.parametrize("base_dtype, expert_dtype", dtype_pairs(), ids=str)
def test_every_pair_of_dtypes_is_within_the_bound(base_dtype: torch.dtype, expert_dtype: torch.dtype) -> None:
    base, (expert,) = group((270, 51), 1, base_dtype=base_dtype, expert_dtypes=[expert_dtype])
    q = randn(270, 30, seed=1)
    check(project(base, expert, q), base, expert, q)
    check(project(None, expert, q), None, expert, q)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_kind_of_values_is_within_the_bound(kind: str, dtype: torch.dtype) -> None:
    base, (expert,) = group((300, 30), 1, kind, base_dtype=dtype)
    q = randn(300, 20, seed=1)
    check(project(base, expert, q), base, expert, q)


@given(m=st.integers(0, 600), n=st.integers(0, 210), columns=st.integers(0, 60), seed=st.integers(0, 99))
def test_sums_that_round_nothing_are_exact(m: int, n: int, columns: int, seed: int) -> None:
    base, (expert,) = group((m, n), 1, "ties", base_dtype=torch.bfloat16, seed=seed)
    q = torch.randint(-9, 10, (m, columns), generator=generator(seed)).float()
    assert torch.equal(project(base, expert, q), reference(base, expert, q))


def test_an_orthonormal_range_of_a_low_rank_delta_gives_it_back() -> None:
    delta = (orthonormal(90, 6, 0) @ randn(6, 70, seed=1, dtype=torch.float64)).float()
    q = torch.linalg.qr(gram_product(None, delta, random_matrix(70, 10)).y).Q
    assert float((q @ project(None, delta, q) - delta).norm() / delta.norm()) < 1e-6


def test_columns_depend_on_no_other_columns() -> None:
    base, (expert,) = group((300, 130), 1)
    q = randn(300, 30, seed=1)
    whole = project(base, expert, q)
    assert same_bits(project(base[:, 61:], expert[:, 61:], q), whole[:, 61:].contiguous())
    assert same_bits(project(base, expert, q[:, 11:]), whole[11:])


@pytest.mark.parametrize("m, n, l", [(700, 250, 60), (300, 3, 4096)], ids=str)
def test_bits_depend_on_no_thread_count_and_on_no_fused_instruction_set(
    every_way: Callable[[], Iterator[str]],
    m: int,
    n: int,
    l: int,  # noqa: E741
) -> None:
    base, (expert,) = group((m, n), 1, base_dtype=torch.bfloat16)
    q = randn(m, l, seed=1)
    result = {way: project(base, expert, q) for way in every_way()}
    for way, b in result.items():
        isa = way.split(",")[0]
        alike = f"{ISAS[0]}, 1 threads" if isa != "baseline" else "baseline, 1 threads"
        assert same_bits(b, result[alike]), way
    check(result["baseline, 1 threads"], base, expert, q)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_what_contiguous_copies_give(layout: str) -> None:
    base, expert, _ = laid_out(layout)
    q = randn(9, expert.shape[0], seed=1).mT
    assert same_bits(project(base, expert, q), project(base.contiguous(), expert.contiguous(), q.contiguous()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_its_column(bad: float) -> None:
    base, (expert,) = group((300, 60), 1)
    q = randn(300, 30, seed=1)
    q[270, 5] = 0.0
    expert[270, 13] = bad
    finite = torch.isfinite(project(base, expert, q))
    assert not bool(finite[:, 13].any()) and int(finite.sum()) == 59 * 30


def test_wrong_arguments_are_refused_by_name() -> None:
    base, (expert,) = group((4, 3), 1)
    q = randn(4, 2, seed=1)
    with pytest.raises(ValueError, match=r"^q: got shape \[2, 4\], need \(m, l\) with m = 4"):
        project(base, expert, q.mT)
    with pytest.raises(ValueError, match=r"^q: got shape \[4\]"):
        project(base, expert, q[:, 0])
    with pytest.raises(TypeError, match=r"^q: got a torch.strided tensor of torch.float64"):
        project(base, expert, q.double())
    with pytest.raises(TypeError, match=r"^q: got list, need a tensor"):
        project(base, expert, q.tolist())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^q: requires grad"):
        project(base, expert, q.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"^expert: got shape \[3, 4\], need \[4, 3\] like base"):
        project(base, expert.mT, q)
    with pytest.raises(ValueError, match=r"^expert: got shape \[4, 3, 1\], need a matrix"):
        project(None, expert[..., None], q)


@pytest.mark.parametrize("m, n, l", [(5, 7, 3), (0, 7, 3), (5, 7, 0)], ids=str)
def test_operator_is_registered_soundly(m: int, n: int, l: int) -> None:  # noqa: E741
    base, (expert,) = group((m, n), 1, base_dtype=torch.bfloat16)
    operator = torch.ops.resm_kernels.project.default
    torch.library.opcheck(operator, (base, expert, randn(m, l, seed=1)))
    torch.library.opcheck(operator, (None, expert, randn(l, m, seed=1).mT))


def test_operator_compiles_into_one_graph() -> None:
    def energy(base: Tensor, expert: Tensor, q: Tensor) -> Tensor:
        return torch.ops.resm_kernels.project(base, expert, q).square().sum()

    base, (expert,) = group((40, 30), 1)
    q = randn(40, 6, seed=1)
    compiled = torch.compile(energy, fullgraph=True, backend="eager")
    assert float(compiled(base, expert, q)) == float(energy(base, expert, q))
