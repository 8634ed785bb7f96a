"""inner_products of three task vectors, and of two models, against reading the same bytes once."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import inner_products

pytestmark = pytest.mark.benchmark(group="inner_products")


def bench_read_bytes(timed, checkpoint):
    """The floor: torch's vectorised, threaded sum of the same bytes as integers."""
    base, experts = checkpoint
    views = [t.view(torch.int64) for t in (base, *experts)]
    timed(lambda: [v.sum() for v in views], yardstick=True)


@pytest.mark.parametrize("rows", [False, True], ids=["whole", "rows"])
@pytest.mark.parametrize("count", ["three task vectors", "two models"])
def bench_inner_products(timed, checkpoint, benchmark, count, rows):
    base, experts = checkpoint
    origin, vectors = (base, experts) if count == "three task vectors" else (None, [base, experts[0]])
    result = inner_products(origin, vectors, rows=rows).reshape(-1, len(vectors), len(vectors)).sum(0)
    wide = torch.stack(
        [(e.float() - (0.0 if origin is None else origin.float())).double().reshape(-1) for e in vectors]
    )
    error = float(((result - wide @ wide.mT).abs() / (wide.abs() @ wide.abs().mT)).max())
    benchmark.extra_info["error against float64"] = error
    assert error <= 1e-12
    pairs = len(vectors) * (len(vectors) + 1) // 2
    differences = 0 if origin is None else len(vectors)
    work = ((differences + 2 * pairs) * base.numel(), (len(vectors) + (origin is not None)) * base.nbytes)
    timed(lambda: inner_products(origin, vectors, rows=rows), work=work)
