"""sketch: the random matrix of `random_matrix`, and products within the rounding bound the op states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import ISAS
from hypothesis import given
from hypothesis import strategies as st
from inputs import KINDS, LAYOUTS, dtype_pairs, group, laid_out, power_law, randn, same_bits, with_spectrum
from torch import Tensor

from resm_kernels.ops import sketch
from resm_kernels.reference.random_matrix import random_matrix
from resm_kernels.reference.sketch import delta_fp32
from resm_kernels.reference.sketch import sketch as reference

pytestmark = pytest.mark.usefixtures("one_thread")

# Kernels work on 256 columns of Δ, 24 rows and 48 columns of Ω at a time.
SIZES = [(1, 1, 1), (3, 5, 2), (24, 256, 48), (25, 257, 49), (7, 300, 16), (70, 33, 97), (101, 515, 33), (2, 300, 4096)]
EMPTY = [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0, 0)]


def check(found: Tensor, base: Tensor | None, expert: Tensor, seed: int = 0, first: int = 0) -> None:
    """Fail unless `found` is Δ·Ω within the bound that `sketch` states, and n roundings of subnormal products."""
    n, columns = expert.shape[1], found.shape[1]
    delta, omega = delta_fp32(base, expert).double(), random_matrix(n, columns, seed, first).double()
    steps = (min(n, 256) + math.ceil(n / 256) + 1) * 2.0**-24
    bound = steps / (1 - steps) * (delta.abs() @ omega.abs()) + n * 2.0**-149
    assert found.dtype == torch.float32 and found.shape == (expert.shape[0], columns) and found.is_contiguous()
    assert bool(((found.double() - delta @ omega).abs() <= bound).all())


def test_omega_is_the_random_matrix_every_way(every_way: Callable[[], Iterator[str]]) -> None:
    for n, columns, seed, first in [
        (77, 49, 0, 0),
        (33, 97, 2**63 - 1, 3),
        (301, 2, 5, 2**33 - 2),
        (5, 1, 9, 2**32 + 1),
    ]:
        wanted = random_matrix(n, columns, seed, first)
        for way in every_way():
            assert torch.equal(sketch(None, torch.eye(n), columns, seed=seed, first_column=first), wanted), way


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.5])
def test_range_is_found_as_well_as_theory_promises(alpha: float) -> None:
    """Halko, Martinsson, Tropp 2011, theorem 10.5: the mean error of a normal sketch of k + p columns."""
    k, p, spectrum = 10, 10, power_law(80, alpha)
    delta = with_spectrum(100, 80, spectrum, seed=1)
    errors = []
    for seed in range(10):
        q = torch.linalg.qr(sketch(None, delta, k + p, seed=seed).double()).Q
        errors.append(float((delta - q @ (q.mT @ delta)).norm()))
    assert sum(errors) / len(errors) <= (1 + k / (p - 1)) ** 0.5 * float(spectrum[k:].norm())


@pytest.mark.parametrize("m, n, columns", SIZES + EMPTY, ids=str)
def test_every_size_is_within_the_bound(m: int, n: int, columns: int) -> None:
    base, (expert,) = group((m, n), 1, base_dtype=torch.bfloat16)
    check(sketch(base, expert, columns, seed=7), base, expert, seed=7)
    check(sketch(None, expert, columns, first_column=11), None, expert, first=11)


@pytest.mark.parametrize("base_dtype, expert_dtype", dtype_pairs(), ids=str)
def test_every_pair_of_dtypes_is_within_the_bound(base_dtype: torch.dtype, expert_dtype: torch.dtype) -> None:
    base, (expert,) = group((31, 270), 1, base_dtype=base_dtype, expert_dtypes=[expert_dtype])
    check(sketch(base, expert, 50), base, expert)
    check(sketch(None, expert, 50), None, expert)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_kind_of_values_is_within_the_bound(kind: str, dtype: torch.dtype) -> None:
    base, (expert,) = group((30, 300), 1, kind, base_dtype=dtype)
    check(sketch(base, expert, 20), base, expert)


def test_float64_is_subtracted_before_it_is_rounded() -> None:
    base = 1 + randn(9, 40, seed=0, dtype=torch.float64) * 1e-9
    expert = base + randn(9, 40, seed=1, dtype=torch.float64) * 1e-9
    found = sketch(base, expert, 12).double()
    exact = (expert - base) @ random_matrix(40, 12, 0).double()
    assert float((found - exact).norm() / exact.norm()) < 1e-6


@given(
    m=st.integers(0, 60),
    n=st.integers(0, 600),
    columns=st.integers(0, 110),
    first=st.integers(0, 60),
    seed=st.integers(0, 99),
)
def test_sums_that_round_nothing_are_exact(m: int, n: int, columns: int, first: int, seed: int) -> None:
    base, (expert,) = group((m, n), 1, "ties", base_dtype=torch.bfloat16, seed=seed)
    found = sketch(base, expert, columns, seed=seed, first_column=first)
    assert torch.equal(found, reference(base, expert, columns, seed, first))


@pytest.mark.parametrize("split", [1, 17, 48, 49])
def test_columns_can_be_added_later(split: int) -> None:
    base, (expert,) = group((40, 300), 1)
    whole = sketch(base, expert, 60, seed=5, first_column=3)
    parts = [
        sketch(base, expert, split, seed=5, first_column=3),
        sketch(base, expert, 60 - split, seed=5, first_column=3 + split),
    ]
    assert same_bits(torch.cat(parts, dim=1), whole)


def test_rows_depend_on_no_other_rows() -> None:
    base, (expert,) = group((60, 300), 1)
    whole = sketch(base, expert, 20)
    assert same_bits(sketch(base[29:], expert[29:], 20), whole[29:].contiguous())


@pytest.mark.parametrize("m, n, columns", [(150, 700, 100), (1, 300, 4096)], ids=str)
def test_bits_depend_on_no_thread_count_and_on_no_fused_instruction_set(
    every_way: Callable[[], Iterator[str]], m: int, n: int, columns: int
) -> None:
    base, (expert,) = group((m, n), 1, base_dtype=torch.bfloat16)
    found = {way: sketch(base, expert, columns) for way in every_way()}
    for way, y in found.items():
        isa = way.split(",")[0]
        alike = f"{ISAS[0]}, 1 threads" if isa != "baseline" else "baseline, 1 threads"
        assert same_bits(y, found[alike]), way
    check(found["baseline, 1 threads"], base, expert)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_what_contiguous_copies_give(layout: str) -> None:
    base, expert, _ = laid_out(layout)
    assert same_bits(sketch(base, expert, 10), sketch(base.contiguous(), expert.contiguous(), 10))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_its_row(bad: float) -> None:
    base, (expert,) = group((30, 300), 1)
    expert[13, 270] = bad
    finite = torch.isfinite(sketch(base, expert, 60))
    assert not bool(finite[13].any()) and int(finite.sum()) == 29 * 60


def test_wrong_arguments_are_refused_by_name() -> None:
    base, (expert,) = group((4, 3), 1)
    for name, value in [("columns", -1), ("columns", 2.0), ("seed", 2**63), ("seed", True), ("first_column", -2)]:
        arguments = {"columns": 2, "seed": 0, "first_column": 0} | {name: value}
        with pytest.raises(ValueError, match=rf"^{name}: got {value}, need a whole number from 0 to"):
            sketch(base, expert, **arguments)
    with pytest.raises(ValueError, match=r"^columns: got 3, need a whole number from 0 to 2"):
        sketch(base, expert, 3, first_column=2**33 - 2)
    with pytest.raises(ValueError, match=r"^expert: got shape \[3, 4\], need \[4, 3\] like base"):
        sketch(base, expert.mT, 2)
    with pytest.raises(ValueError, match=r"^expert: got shape \[3\], need a matrix"):
        sketch(None, expert[0], 2)
    with pytest.raises(TypeError, match=r"^expert: got dtype int64"):
        sketch(base, expert.long(), 2)
    with pytest.raises(ValueError, match=r"^expert: requires grad"):
        sketch(base, expert.clone().requires_grad_(), 2)


@pytest.mark.parametrize("m, n, columns", [(5, 7, 3), (0, 7, 3), (5, 7, 0)], ids=str)
def test_operator_is_registered_soundly(m: int, n: int, columns: int) -> None:
    base, (expert,) = group((m, n), 1, base_dtype=torch.bfloat16)
    operator = torch.ops.resm_kernels.sketch.default
    torch.library.opcheck(operator, (base, expert, columns, 3, 1))
    torch.library.opcheck(operator, (None, expert, columns, 3, 0))


def test_operator_compiles_into_one_graph() -> None:
    def energy(base: Tensor, expert: Tensor) -> Tensor:
        return torch.ops.resm_kernels.sketch(base, expert, 6, 0, 0).square().sum()

    base, (expert,) = group((40, 30), 1)
    compiled = torch.compile(energy, fullgraph=True, backend="eager")
    assert float(compiled(base, expert)) == float(energy(base, expert))
