"""Every op at the edges of its loops: sizes, dtypes, places in memory, instruction sets and thread counts, all drawn.

The result has the bits of the same call on contiguous tensors, with one thread and without vector instructions, which
the ops' own tests compare with their definitions. `make sanitize` runs these tests under the sanitizers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ISAS, THREADS, UseThreads
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import FLOATS, at_byte, group, randn, values
from product_contract import same
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.masks import packed
from resm_kernels.ops import (
    aggregate,
    delta_stats,
    gram_matrix,
    gram_product,
    inner_products,
    kept_moments,
    low_rank_update,
    magnitude_threshold,
    project,
    random_mask,
    random_matrix,
    symmetric_eigen,
    variance_mask,
)

native: Any = _extension.native
pytestmark = pytest.mark.skipif(native is None, reason="the native kernels are not built")

# At and around nothing, the widths of vectors, tiles, panels and blocks.
EDGES = sorted({0, 1, 2, 3} | {n + d for n in (8, 16, 24, 32, 48, 64, 96, 128, 512) for d in (-1, 0, 1)})
edges = st.sampled_from(EDGES)
small_edges = st.sampled_from([n for n in EDGES if n < 100])
PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "after one byte": lambda x: at_byte(x, 1),
    "after one element": lambda x: at_byte(x, x.element_size()),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every third": lambda x: x.repeat_interleave(3, dim=-1)[..., ::3],
    "far apart": lambda x: torch.empty(len(x), 2003, dtype=x.dtype)[:, 5 : 5 + x.shape[1]].copy_(x),
}
places = st.sampled_from(list(PLACES))


def check(call: Callable[..., Any], tensors: list[Tensor], data: st.DataObject, use_threads: UseThreads) -> None:
    """Fail unless `call` gives the same bits however it runs and wherever the tensors lie, and leaves these alone."""
    native.use_isa("baseline")
    use_threads(1)
    expected = call(*tensors)
    native.use_isa(data.draw(st.sampled_from(ISAS), "instruction set"))
    use_threads(data.draw(st.sampled_from(THREADS), "threads"))
    placed = [PLACES[data.draw(places, "place")](x) for x in tensors]
    assert same(call(*placed), expected)
    assert same([x.contiguous() for x in placed], tensors)


def masks_of(n: int, count: int) -> list[Tensor]:
    return [packed(randn(n, seed=t) > 0) for t in range(count)]


def sparse(base: Tensor, *experts: Tensor) -> Any:
    weights, lower = [0.5 + t for t in range(len(experts))], [2.0**-6] * len(experts)
    options: dict[str, Any] = {"rule": "ties", "thresholds": lower, "masks": masks_of(base.numel(), len(experts))}
    return aggregate(base, experts, weights, normalize=True, **options)


# Sums of the values that are drawn round nothing, so that they are the same in any order.
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "aggregate": lambda base, *experts: aggregate(base, experts, [0.7 - t for t in range(len(experts))], scale=0.9),
    "aggregate, no base": lambda *experts: aggregate(None, experts, [0.7 - t for t in range(len(experts))]),
    "aggregate, sparse": sparse,
    "delta_stats": lambda base, *experts: delta_stats(base, experts, eps_rel=0.3, histogram=True),
    "delta_stats, rows": lambda base, *experts: delta_stats(base, experts, histogram=True, rows=True),
    "inner_products": lambda base, *experts: inner_products(base, experts),
    "inner_products, rows": lambda *experts: inner_products(None, experts, rows=True),
    "kept_moments": lambda base, *experts: kept_moments(base, experts, masks=masks_of(base.numel(), len(experts))),
    "magnitude_threshold": lambda base, *experts: magnitude_threshold(base, experts, base.numel() // 3),
    "random_mask": lambda base, *experts: random_mask(base, experts, [0.4] * len(experts), seed=5),
    "random_mask, ranks": lambda base, *experts: random_mask(base, experts, [0.4] * len(experts), 0.15, seed=5),
    "variance_mask": lambda base, *experts: variance_mask(base, experts, 0.3),
}


@pytest.mark.usefixtures("every_way")  # which restores the instruction set
@pytest.mark.parametrize("op", ELEMENTWISE)
def test_elementwise_ops(op: str, use_threads: UseThreads) -> None:
    @given(rows=st.integers(0, 5), length=edges, dtypes=st.lists(st.sampled_from(FLOATS), min_size=2), data=st.data())
    @settings(max_examples=60)
    def holds(rows: int, length: int, dtypes: list[torch.dtype], data: st.DataObject) -> None:
        base, experts = group((rows, length), len(dtypes) - 1, "ties", base_dtype=dtypes[0], expert_dtypes=dtypes[1:])
        check(ELEMENTWISE[op], [base, *experts], data, use_threads)

    holds()


def integers(m: int, n: int, seed: int) -> Tensor:
    return values((m, n), "ties", torch.float32, seed) * 64


PRODUCTS: dict[str, tuple[Callable[..., Any], Callable[[int, int, int], list[Tensor]]]] = {
    "project": (lambda base, expert, q: project(base, expert, q), lambda m, n, k: [integers(m, k, 2)]),
    "gram_product": (lambda base, expert, x: gram_product(base, expert, x), lambda m, n, k: [integers(n, k, 2)]),
    "gram_matrix": (lambda _, __, x, y: gram_matrix(x, y), lambda m, n, k: [integers(m, n, 2), integers(m, k, 3)]),
    "gram_matrix of one": (lambda _, __, x: gram_matrix(x), lambda m, n, k: [integers(m, k, 2)]),
    "low_rank_update": (
        lambda base, _, left, right: low_rank_update(base, left, right, scale=0.5),
        lambda m, n, k: [integers(m, k, 2), integers(n, k, 3)],
    ),
    "low_rank_update in double": (
        lambda base, _, left, right: low_rank_update(base, left.double(), right.mT.double().contiguous().mT),
        lambda m, n, k: [integers(m, k, 2), integers(n, k, 3)],
    ),
}


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize("op", PRODUCTS)
def test_products(op: str, use_threads: UseThreads) -> None:
    call, operands = PRODUCTS[op]
    dtype = st.sampled_from(FLOATS)

    @given(m=edges, n=small_edges, k=small_edges, of_base=dtype, of_expert=dtype, data=st.data())
    @settings(max_examples=60)
    def holds(m: int, n: int, k: int, of_base: torch.dtype, of_expert: torch.dtype, data: st.DataObject) -> None:
        base, (expert,) = group((m, n), 1, "ties", base_dtype=of_base, expert_dtypes=[of_expert])
        check(call, [base, expert, *operands(m, n, k)], data, use_threads)

    holds()


@pytest.mark.usefixtures("every_way")
def test_random_matrix(use_threads: UseThreads) -> None:
    @given(n=edges, columns=small_edges, first=small_edges, seed=st.integers(0, 2**64 - 1), data=st.data())
    def holds(n: int, columns: int, first: int, seed: int, data: st.DataObject) -> None:
        check(lambda: random_matrix(n, columns, seed=seed, first_column=first), [], data, use_threads)

    holds()


@pytest.mark.usefixtures("every_way")
def test_symmetric_eigen(use_threads: UseThreads) -> None:
    """Its bits depend on whether instructions are fused: the eigenvectors are tested by what they are."""

    @given(n=small_edges, share=st.sampled_from([0.0, 0.3, 1.0]), double=st.booleans(), place=places, data=st.data())
    @settings(max_examples=60)
    def holds(n: int, share: float, double: bool, place: str, data: st.DataObject) -> None:
        native.use_isa(data.draw(st.sampled_from(ISAS), "instruction set"))
        use_threads(data.draw(st.sampled_from(THREADS), "threads"))
        x = randn(n, n, seed=n, dtype=torch.float64 if double else torch.float32)
        a = PLACES[place](x + x.mT)
        found, vectors = symmetric_eigen(a, k=round(share * n))[:2]
        error = (a.double() @ vectors.double() - vectors.double() * found.double()).norm()
        assert vectors.shape == (n, round(share * n))
        assert error <= 10 * max(n, 1) * torch.finfo(a.dtype).eps * a.double().norm()

    holds()
