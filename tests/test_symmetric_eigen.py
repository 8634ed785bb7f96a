"""symmetric_eigen: orthonormal eigenvectors with small residuals of every kind of spectrum, LAPACK's eigenvalues."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ISAS, SameOnThreads
from hypothesis import given
from hypothesis import strategies as st
from inputs import generator, same_bits
from torch import Tensor

from resm_kernels import NonFiniteError, _extension
from resm_kernels.ops import symmetric_eigen
from resm_kernels.reference.symmetric_eigen import SymmetricEigenOptions
from resm_kernels.reference.symmetric_eigen import symmetric_eigen as reference

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float64]
# The kernel works on tiles of 8 (fp32: 16), strips of 24 and 48 vectors, 32 shifts and 32 reflectors at a time.
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 23, 24, 25, 31, 33, 34, 35, 48, 49, 64, 66, 67, 100]


@pytest.fixture(params=DTYPES, ids=["fp32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    result: torch.dtype = request.param
    return result


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def symmetric(n: int, seed: int = 0) -> Tensor:
    x = normal(n, n, seed=seed)
    return x + x.mT


def with_values(values: Tensor, seed: int = 0) -> Tensor:
    """A dense matrix of these eigenvalues, up to rounding."""
    n = values.numel()
    q = torch.linalg.qr(normal(n, n, seed=seed)).Q
    return (q * values.double()) @ q.mT


def gram(singular_values: Tensor, seed: int = 0) -> Tensor:
    n = singular_values.numel()
    q, p = torch.linalg.qr(normal(2 * n, n, seed=seed)).Q, torch.linalg.qr(normal(n, n, seed=seed + 1)).Q
    x = (q * singular_values.double()) @ p.mT
    return x.mT @ x


def tridiagonal(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    off = off_diagonal.double().expand(diagonal.numel() - 1)
    return torch.diag(diagonal.double()) + torch.diag(off, 1) + torch.diag(off, -1)


def glued_wilkinson(glue: float, copies: int) -> Tensor:
    """Pairs of eigenvalues that agree to rounding without a small element off the diagonal, in several copies."""
    one = torch.arange(-10, 11).abs()
    off = torch.cat([torch.cat([torch.ones(20).double(), torch.tensor([glue]).double()])] * copies)[:-1]
    return tridiagonal(one.repeat(copies), off)


@functools.cache
def spectra(n: int) -> dict[str, Tensor]:
    i = torch.arange(n, dtype=torch.float64)
    ring = tridiagonal(2 * torch.ones(n), torch.tensor(-1.0))
    ring[0, -1] = ring[-1, 0] = -1
    return {
        "zero": torch.zeros(n, n, dtype=torch.float64),
        "identity": torch.eye(n, dtype=torch.float64),
        "ones": torch.ones(n, n, dtype=torch.float64),
        "diagonal": torch.diag(normal(n)),
        "diagonal, repeated": torch.diag(i % 3),
        "gram": gram(1 + i),
        "gram, power decay": gram(1 / (1 + i)),
        "gram, exponential decay": gram(torch.exp(-i / 5)),
        "gram, rank deficient": gram((i < n // 5) * (1 + i)),
        "gram, projection": gram(i < n // 5),
        "gram of few rows": normal(n // 4, n).mT @ normal(n // 4, n),
        "negative definite": -gram(1 + i),
        "tiny": gram(1 / (1 + i)) * 1e-305,
        "tiny in fp32": gram(1 / (1 + i)) * 1e-30,
        "huge": gram(1 / (1 + i)) * 1e300,
        "huge in fp32": gram(1 / (1 + i)) * 1e30,
        "two values": with_values(i % 2 + 1),
        "three values": with_values(i % 3 - 1),
        "one value and one": with_values(torch.where(i == 0, 1, 1e-16)),
        "cluster 1e-14": with_values(1 + 1e-14 * i / n),
        "cluster 1e-6": with_values(1 + 1e-6 * i / n),
        "pairs 1e-14": with_values((i // 2) / n + 1e-14 * i),
        "pairs 1e-10": with_values((i // 2) / n + 1e-10 * i),
        "tens 1e-12": with_values((i // 10) / n + 1e-12 * i),
        "tens 1e-8": with_values((i // 10) / n + 1e-8 * i),
        "geometric to 1e-16": with_values(10 ** (-16 * i / n)),
        "geometric to 1e-300": with_values(10 ** (-300 * i / n)),
        "low rank and identity": torch.eye(n, dtype=torch.float64) + normal(n, 5) @ normal(n, 5).mT,
        "same blocks": torch.block_diag(*[symmetric(n // 5)] * 5),
        "same blocks, spread": torch.kron(symmetric(10), torch.eye(n // 10, dtype=torch.float64)),
        "rank one blocks": torch.kron(symmetric(10), torch.ones(n // 10, n // 10, dtype=torch.float64)),
        "1-2-1": tridiagonal(2 * torch.ones(n), torch.tensor(1.0)),
        "ring": ring,
        "almost diagonal": tridiagonal(torch.ones(n), torch.tensor(1e-10)),
        "clement": tridiagonal(torch.zeros(n), (i[1:] * (n - i[1:])).sqrt()),
        "wilkinson": tridiagonal((i - n // 2).abs(), torch.tensor(1.0)),
        "graded": (10 ** (-12 * i / n))[:, None] * symmetric(n) * 10 ** (-12 * i / n),
        "graded upwards": ((10 ** (-12 * i / n))[:, None] * symmetric(n) * 10 ** (-12 * i / n)).flip(0, 1),
        "smooth kernel": torch.exp(-((i[:, None] - i) ** 2) / 50),
        "hilbert": 1 / (1 + i[:, None] + i),
        **{f"glued wilkinson {glue:g}": glued_wilkinson(glue, n // 21) for glue in (1e-14, 1e-11, 1e-8, 1e-5)},
    }


def check(a: Tensor, k: int | None = None, *, may_fall_back: bool = False) -> None:
    """Fail unless the op finds the k largest eigenpairs of a, by itself."""
    n, dtype = a.shape[0], a.dtype
    result = symmetric_eigen(a, k)
    count = n if k is None else k
    assert result.values.shape == (count,) and result.vectors.shape == (n, count) and result.vectors.is_contiguous()
    assert result.values.dtype == result.vectors.dtype == dtype
    assert may_fall_back or not result.fallback
    a = a.double()
    scale = a.abs().max().clamp(min=2.0**-1022)  # so that no norm overflows
    whole = (a / scale).triu() + (a / scale).triu(1).mT
    values, vectors = result.values.double() / scale, result.vectors.double()
    exact = torch.linalg.eigvalsh(whole).flip(0)
    norm = float(exact.abs().max()) if n else 0.0
    eps = torch.finfo(dtype).eps
    angle, error = (32 * eps, 16 * eps) if dtype == torch.float32 else (450 * eps, max(n, 10) * 2 * eps)
    assert bool((values.diff() <= 0).all())
    assert _largest(vectors.mT @ vectors - torch.eye(count, dtype=torch.float64)) <= angle
    assert _largest(whole @ vectors - vectors * values) <= error * norm
    assert _largest(values - exact[:count]) <= error * norm


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


@pytest.mark.parametrize("n", SIZES)
def test_every_size(n: int, dtype: torch.dtype) -> None:
    for k in sorted({0, 1, n // 3, n - 1, n}):
        check(symmetric(n).to(dtype), k)
        check(gram(torch.arange(n) + 1.0).to(dtype), k)


@pytest.mark.parametrize("name", spectra(21))
def test_every_kind_of_spectrum(name: str, dtype: torch.dtype) -> None:
    for n in (30, 63, 100):
        a = spectra(n)[name].to(dtype)
        if bool(torch.isfinite(a).all()):  # not beyond fp32's range
            check(a)
            check(a, n // 3)


@pytest.mark.parametrize("name", ["gram, power decay", "two values", "three values", "wilkinson", "tens 1e-12"])
def test_every_kind_of_spectrum_in_more_strips(name: str, dtype: torch.dtype) -> None:
    a = spectra(300)[name].to(dtype)
    check(a, may_fall_back=True)
    check(a, 100, may_fall_back=True)


@given(
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.lists(st.floats(-1, 1), min_size=1, max_size=6),
    st.sampled_from(DTYPES),
)
def test_any_repeated_values(n: int, seed: int, values: list[float], dtype: torch.dtype) -> None:
    of = torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (n,), generator=generator(seed))]
    check(with_values(of, seed).to(dtype), may_fall_back=True)


def test_hand_computed_example(dtype: torch.dtype) -> None:
    result = symmetric_eigen(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=dtype))
    assert (result.values - torch.tensor([3.0, 1.0])).abs().max() <= 4 * torch.finfo(dtype).eps
    assert (result.vectors.abs() - 0.5**0.5).abs().max() <= 4 * torch.finfo(dtype).eps


def test_only_the_upper_triangle_is_read(dtype: torch.dtype) -> None:
    a = symmetric(50).to(dtype)
    spoilt = a.triu() + torch.full_like(a, float("nan")).tril(-1)
    assert same_bits(symmetric_eigen(spoilt).vectors, symmetric_eigen(a).vectors)
    assert same_bits(symmetric_eigen(a.mT, 7).vectors, symmetric_eigen(a, 7).vectors)  # not contiguous


def test_fewer_are_the_first_of_more(dtype: torch.dtype) -> None:
    a, eps = symmetric(60).to(dtype), torch.finfo(dtype).eps
    more, fewer = symmetric_eigen(a), symmetric_eigen(a, 20)
    assert (more.values[:20] - fewer.values).abs().max() <= 450 * eps
    assert ((more.vectors[:, :20] * fewer.vectors).sum(0).abs() - 1).abs().max() <= 4500 * eps


def test_sums_of_like_terms_keep_fp32s_digits() -> None:
    # Rounding errors of like signs: sums over 1000 rows in one go lose two digits.
    result = symmetric_eigen(torch.ones(1000, 1000), 100)
    assert abs(float(result.values[0]) - 1000) <= 16 * 2.0**-24 * 1000
    wide = result.vectors.double()
    assert _largest(wide.mT @ wide - torch.eye(100, dtype=torch.float64)) <= 48 * 2.0**-24


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str, use_isa: Callable[[str], None], dtype: torch.dtype) -> None:
    use_isa(isa)
    for n in (1, 2, 9, 33, 70):
        check(symmetric(n).to(dtype))
        check(symmetric(n).to(dtype), n // 3)
    for name in ("gram, power decay", "two values", "wilkinson", "zero"):
        check(spectra(63)[name].to(dtype))


@pytest.fixture
def use_isa() -> Iterator[Callable[[str], None]]:
    native = _extension.native
    assert native is not None
    before = native.build_facts()["isa"]
    yield native.use_isa
    native.use_isa(before)


def test_same_bits_for_any_number_of_threads(same_on_threads: SameOnThreads, dtype: torch.dtype) -> None:
    a = gram(torch.arange(310) + 1.0).to(dtype)
    _, vectors = same_on_threads(lambda: symmetric_eigen(a, 100)[:2])
    with ThreadPoolExecutor(3) as pool:  # side by side
        for result in pool.map(lambda _: symmetric_eigen(a, 100), range(6)):
            assert same_bits(result.vectors, vectors)


def test_reference_agrees(dtype: torch.dtype) -> None:
    a, eps = symmetric(40).to(dtype), torch.finfo(dtype).eps
    values, vectors, status = reference(a, SymmetricEigenOptions(k=9))
    result = symmetric_eigen(a, 9)
    assert values.dtype == vectors.dtype == dtype
    assert int(status) == 0 and (values - result.values).abs().max() <= 450 * eps
    assert ((vectors * result.vectors).sum(0).abs() - 1).abs().max() <= 4500 * eps


@pytest.mark.skipif(_extension.native is None, reason="the native kernels are not built")
def test_fallback_is_said(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    class GivesUp:
        @staticmethod
        def symmetric_eigen(*_: object) -> int:
            return 1

    a = symmetric(20).to(dtype)
    monkeypatch.setattr(_extension, "native", GivesUp)
    result = symmetric_eigen(a, 5)
    assert result.fallback and same_bits(result.vectors, reference(a, SymmetricEigenOptions(k=5))[1])
    in_float64 = reference(a.double(), SymmetricEigenOptions(k=5))[1]
    assert same_bits(result.vectors, in_float64.to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("n, i, j", [(1, 0, 0), (20, 3, 3), (20, 0, 19), (17, 2, 16)])
def test_values_that_are_not_finite_are_refused(value: float, n: int, i: int, j: int, dtype: torch.dtype) -> None:
    a = symmetric(n).to(dtype)
    a[i, j] = value
    with pytest.raises(NonFiniteError, match=r"^a: got 1 NaN or infinite values, need finite ones"):
        symmetric_eigen(a, 1)
    assert int(reference(a, SymmetricEigenOptions(k=1))[2]) == 2


def test_wrong_arguments_are_named() -> None:
    a = symmetric(4)
    with pytest.raises(TypeError, match=r"^a: got list, need a tensor"):
        symmetric_eigen(a.tolist())
    message = r"^a: got a torch.strided tensor of torch.float16, need .*torch.float32 or torch.float64"
    with pytest.raises(TypeError, match=message):
        symmetric_eigen(a.half())
    with pytest.raises(ValueError, match=r"^a: got shape \[4, 3\], need a square matrix"):
        symmetric_eigen(a[:, :3])
    with pytest.raises(ValueError, match=r"^a: requires grad"):
        symmetric_eigen(a.clone().requires_grad_())
    for k in (-1, 5, 1.0, True):
        with pytest.raises(ValueError, match=r"^k: got .*, need a whole number from 0 to 4"):
            symmetric_eigen(a, k)
