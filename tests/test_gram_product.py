"""gram_product: products within the rounding bound the op states, the same for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import ISAS
from hypothesis import given
from hypothesis import strategies as st
from inputs import KINDS, LAYOUTS, dtype_pairs, generator, group, laid_out, power_law, randn, same_bits, with_spectrum
from torch import Tensor

from resm_kernels.ops import GramProduct, gram_product
from resm_kernels.reference.deltas import task_matrix_fp32
from resm_kernels.reference.gram_product import gram_product as reference

pytestmark = pytest.mark.usefixtures("one_thread")

# Kernels work on 48 rows and 96 columns of Δ, on units of 8 columns of x, up to 6 of them together, up to 24 a task.
SIZES = [(1, 1, 1), (1, 200, 5), (200, 1, 5), (48, 96, 48), (49, 97, 49), (47, 95, 7), (300, 130, 24), (210, 300, 341)]
WIDTHS = [*range(1, 10), 16, 17, 24, 32, 33, 40, 41, 48, 56, 128, 160, 193]
EMPTY = [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0, 0)]


def check(result: GramProduct, base: Tensor | None, expert: Tensor, x: Tensor) -> None:
    """Fail unless y, z and the energy are within the bounds that `gram_product` states, and subnormals' roundings."""
    (m, n), c = expert.shape, x.shape[1]
    delta = task_matrix_fp32(base, expert).double()

    def within(product: Tensor, left: Tensor, right: Tensor, block: int) -> bool:
        depth = left.shape[1]
        steps = (min(depth, block) + math.ceil(depth / block) + 1) * 2.0**-24
        bound = steps / (1 - steps) * (left.abs() @ right.abs()) + depth * 2.0**-149
        return bool(((product.double() - left @ right).abs() <= bound).all())

    assert [t.dtype for t in result] == [torch.float32, torch.float32, torch.float64]
    assert [list(t.shape) for t in result] == [[m, c], [n, c], []] and all(t.is_contiguous() for t in result)
    assert within(result.y, delta, x.double(), 96)
    assert within(result.z, delta.mT, result.y.double(), 48)
    energy = float(delta.square().sum())
    assert abs(float(result.energy) - energy) <= 1e-6 * energy


@pytest.mark.parametrize("m, n, c", SIZES + EMPTY, ids=str)
def test_every_size_is_within_the_bound(m: int, n: int, c: int) -> None:
    base, (expert,) = group((m, n), 1, base_dtype=torch.bfloat16)
    x = randn(n, c, seed=1)
    check(gram_product(base, expert, x), base, expert, x)
    check(gram_product(None, expert, x), None, expert, x)


@pytest.mark.parametrize("c", WIDTHS)
def test_every_width_is_within_the_bound_on_every_instruction_set(
    c: int, every_way: Callable[[], Iterator[str]]
) -> None:
    base, (expert,) = group((101, 205), 1)
    x = randn(205, c, seed=1)
    for way in every_way():
        if way.endswith(" 1 threads"):
            check(gram_product(base, expert, x), base, expert, x)


@pytest.mark.parametrize("base_dtype, expert_dtype", dtype_pairs(), ids=str)
def test_every_pair_of_dtypes_is_within_the_bound(base_dtype: torch.dtype, expert_dtype: torch.dtype) -> None:
    base, (expert,) = group((110, 151), 1, base_dtype=base_dtype, expert_dtypes=[expert_dtype])
    x = randn(151, 30, seed=1)
    check(gram_product(base, expert, x), base, expert, x)
    check(gram_product(None, expert, x), None, expert, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_kind_of_values_is_within_the_bound(kind: str, dtype: torch.dtype) -> None:
    base, (expert,) = group((100, 130), 1, kind, base_dtype=dtype)
    # Small enough that z, of the order of the values' squares, stays within fp32.
    x = randn(130, 20, seed=1) * (1e-30 if kind == "huge" else 1.0)
    check(gram_product(base, expert, x), base, expert, x)


@given(m=st.integers(0, 400), n=st.integers(0, 210), columns=st.integers(0, 60), seed=st.integers(0, 99))
def test_sums_that_round_nothing_are_exact(m: int, n: int, columns: int, seed: int) -> None:
    base, (expert,) = group((m, n), 1, "ties", base_dtype=torch.bfloat16, seed=seed)
    x = torch.randint(-3, 4, (n, columns), generator=generator(seed)).float()
    for result, expected in zip(gram_product(base, expert, x), reference(base, expert, x), strict=True):
        assert torch.equal(result, expected)


def test_power_iterations_find_the_dominant_subspace() -> None:
    spectrum = power_law(60, 1.0)
    delta = with_spectrum(200, 150, spectrum, 0).float()
    p = torch.linalg.qr(randn(150, 12, seed=5)).Q
    for _ in range(20):
        p = torch.linalg.qr(gram_product(None, delta, p).z).Q
    result = torch.linalg.svdvals(gram_product(None, delta, p).y.double())
    torch.testing.assert_close(result[:5], spectrum[:5], rtol=1e-5, atol=0)


def test_columns_depend_on_no_other_columns_and_the_energy_on_none() -> None:
    base, (expert,) = group((300, 130), 1)
    x = randn(130, 341, seed=1)
    whole = gram_product(base, expert, x)
    for columns in (slice(0), slice(11, 12), slice(61, None)):
        part = gram_product(base, expert, x[:, columns])
        assert same_bits(part.y, whole.y[:, columns]) and same_bits(part.z, whole.z[:, columns])
        assert same_bits(part.energy, whole.energy)


@pytest.mark.parametrize("m, n, c", [(700, 250, 60), (1000, 50, 9), (100, 400, 341)], ids=str)
def test_bits_depend_on_no_thread_count_and_on_no_fused_instruction_set(
    every_way: Callable[[], Iterator[str]], m: int, n: int, c: int
) -> None:
    base, (expert,) = group((m, n), 1, base_dtype=torch.bfloat16)
    x = randn(n, c, seed=1)
    result = {way: gram_product(base, expert, x) for way in every_way()}
    for way, product in result.items():
        isa = way.split(",")[0]
        alike = f"{ISAS[0]}, 1 threads" if isa != "baseline" else "baseline, 1 threads"
        assert all(same_bits(a, b) for a, b in zip(product, result[alike], strict=True)), way
    check(result["baseline, 1 threads"], base, expert, x)


def test_bits_are_the_same_on_more_threads_than_there_are_groups(use_threads: Callable[[int], None]) -> None:
    base, (expert,) = group((500, 120), 1)
    x = randn(120, 20, seed=1)
    expected = gram_product(base, expert, x)
    for threads in (2, 3, 5):
        use_threads(threads)
        assert all(same_bits(a, b) for a, b in zip(gram_product(base, expert, x), expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_what_contiguous_copies_give(layout: str) -> None:
    base, expert, _ = laid_out(layout)
    x = randn(9, expert.shape[1], seed=1).mT
    result = gram_product(base, expert, x)
    expected = gram_product(base.contiguous(), expert.contiguous(), x.contiguous())
    assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_its_row_in_z_and_in_the_energy(bad: float) -> None:
    base, (expert,) = group((300, 160), 1)
    x = randn(160, 30, seed=1)
    x[113, 7] = 0.0
    expert[270, 113] = bad
    result = gram_product(base, expert, x)
    finite = torch.isfinite(result.y)
    assert not bool(finite[270].any()) and int(finite.sum()) == 299 * 30
    assert not bool(torch.isfinite(result.z).any()) and not math.isfinite(float(result.energy))


def test_wrong_arguments_are_refused_by_name() -> None:
    base, (expert,) = group((4, 3), 1)
    x = randn(3, 2, seed=1)
    with pytest.raises(ValueError, match=r"^x: got shape \[2, 3\], need \(n, c\) with n = 3"):
        gram_product(base, expert, x.mT)
    with pytest.raises(ValueError, match=r"^x: got shape \[3\]"):
        gram_product(base, expert, x[:, 0])
    with pytest.raises(TypeError, match=r"^x: got a torch.strided tensor of torch.float64"):
        gram_product(base, expert, x.double())
    with pytest.raises(TypeError, match=r"^x: got list, need a tensor"):
        gram_product(base, expert, x.tolist())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^x: requires grad"):
        gram_product(base, expert, x.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"^expert: got shape \[3, 4\], need \[4, 3\] like base"):
        gram_product(base, expert.mT, x)
    with pytest.raises(ValueError, match=r"^expert: got shape \[4, 3, 1\], need a matrix"):
        gram_product(None, expert[..., None], x)


@pytest.mark.parametrize("m, n, c", [(5, 7, 3), (0, 7, 3), (5, 7, 0)], ids=str)
def test_operator_is_registered_soundly(m: int, n: int, c: int) -> None:
    base, (expert,) = group((m, n), 1, base_dtype=torch.bfloat16)
    operator = torch.ops.resm_kernels.gram_product.default
    torch.library.opcheck(operator, (base, expert, randn(n, c, seed=1)))
    torch.library.opcheck(operator, (None, expert, randn(c, n, seed=1).mT))


def test_operator_compiles_into_one_graph() -> None:
    def size(base: Tensor, expert: Tensor, x: Tensor) -> Tensor:
        y, z, energy = torch.ops.resm_kernels.gram_product(base, expert, x)
        return y.square().sum() + z.square().sum() + energy

    base, (expert,) = group((40, 30), 1)
    x = randn(30, 6, seed=1)
    compiled = torch.compile(size, fullgraph=True, backend="eager")
    assert float(compiled(base, expert, x)) == float(size(base, expert, x))
