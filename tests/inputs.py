"""Random tensors that the tests share. Each is a function of its arguments and a seed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resm_kernels import merge
from resm_kernels.methods import REQUIRED, get

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Kernels work in blocks of 512 elements and chunks of 65536, with 16 lanes.
BLOCK, CHUNK = 512, 65536

SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (0,),
    (3, 0, 2),
    (1,),
    (15,),
    (17,),
    (BLOCK - 1,),
    (BLOCK,),
    (BLOCK + 1,),
    (7, 11, 13),
    (CHUNK - 1,),
    (CHUNK,),
    (CHUNK + 1,),
    (2 * CHUNK + BLOCK + 3,),
)

KINDS = ("weights", "ties", "subnormal", "huge", "tiny", "zeros")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def values(shape: Sequence[int], kind: str, dtype: torch.dtype, seed: int, step: float = 1.0) -> Tensor:
    """A tensor of the given kind of values; `step` is their size relative to the kind's usual one."""
    g = generator(seed)
    size = tuple(shape)
    if kind == "zeros":
        return torch.where(torch.rand(size, generator=g) < 0.5, 0.0, -0.0).to(dtype)
    if kind == "ties":  # few distinct values, all exact in every dtype
        return (torch.randint(-2, 3, size, generator=g).double() * 2.0**-6).to(dtype)
    if kind == "subnormal":
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        return (torch.randint(-50, 51, size, generator=g).double() * smallest).to(dtype)
    half = dtype == torch.float16
    scale = {"weights": 0.02, "huge": 1e3 if half else 1e30, "tiny": 1e-6 if half else 1e-30}[kind]
    return (torch.randn(size, generator=g, dtype=torch.float64) * scale * step).to(dtype)


def group(
    shape: Sequence[int],
    n_experts: int,
    kind: str = "weights",
    *,
    base_dtype: torch.dtype = torch.float32,
    expert_dtypes: Sequence[torch.dtype] | None = None,
    seed: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """A base and experts that differ from it slightly in 80 % of the weights and not at all in the others."""
    dtypes = list(expert_dtypes or [base_dtype])
    base = values(shape, kind, base_dtype, seed)
    experts = []
    for t, dtype in zip(range(n_experts), itertools.cycle(dtypes), strict=False):
        change = values(shape, kind, torch.float64, 1000 * (seed + 1) + t, step=0.05)
        if kind == "subnormal":
            change = values(shape, kind, dtype, 1000 * (seed + 1) + t).double()
        if kind in ("huge", "tiny") and torch.float16 in (dtype, base_dtype):
            change = values(shape, kind, torch.float16, 1000 * (seed + 1) + t, step=0.05).double()
        moved = torch.rand(tuple(shape), generator=generator(seed + 77 * (t + 1))) < 0.8
        start = base.double() if dtype == base_dtype or kind in ("weights", "ties") else 0.0
        experts.append((start + torch.where(moved, change, 0.0)).to(dtype))
    return base, experts


def dtype_pairs() -> list[tuple[torch.dtype, torch.dtype]]:
    return list(itertools.product(FLOATS, FLOATS))


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, as integers: equal where values are equal including the sign of zero."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64; 0 where both are 0."""
    difference, size = (a.double() - b.double()).norm(), b.double().norm()
    return float(difference / size) if size > 0 else float(difference)


def orthonormal(m: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(m, k, seed=seed, dtype=torch.float64)).Q


def with_spectrum(m: int, n: int, spectrum: Tensor, seed: int) -> Tensor:
    """An m×n float64 matrix with these singular values and random singular vectors."""
    k = spectrum.numel()
    return (orthonormal(m, k, seed) * spectrum.double()) @ orthonormal(n, k, seed + 1).mT


def power_law(r: int, alpha: float) -> Tensor:
    """σ_i = i^−α, the usual model of a task vector's spectrum."""
    return torch.arange(1, r + 1, dtype=torch.float64) ** -alpha


def experts_with_spectra(
    m: int, n: int, n_experts: int, alpha: float = 0.7, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    """A base and experts whose task vectors have power-law spectra of different sizes."""
    base = 0.05 * randn(m, n, seed=seed, dtype=torch.float64)
    spectrum = power_law(min(m, n), alpha)
    experts = [
        (base + 0.02 * (1 + t / 2) * with_spectrum(m, n, spectrum, seed + 10 * (t + 1))).to(dtype)
        for t in range(n_experts)
    ]
    return base.to(dtype), experts


MATRICES = [(40, 40), (52, 31), (31, 52)]


def merged_delta(base: Tensor, experts: list[Tensor], method: str, **parameters: Any) -> Tensor:
    """λ·M in float64. With float64 inputs it is exact but for the rounding of the sum with the base."""
    return merge(base, experts, method, out_dtype=torch.float64, **parameters) - base.double()


def call_of(method: str) -> tuple[int, dict[str, Any]]:
    """A number of experts that the method takes, two if possible, and values for arguments without a default.

    A method that needs statistics gets none for the tensor, which it then averages.
    """
    chosen = get(method)
    required: dict[str, Any] = {p.keyword: 0.5 for p in chosen.parameters if p.default is REQUIRED}
    n_experts = min(max(2, chosen.min_experts), chosen.max_experts or 2)
    return n_experts, required | ({"statistics": [None] * n_experts} if chosen.statistics else {})


def random_statistics(method: str, shape: Sequence[int], n_experts: int, seed: int = 0) -> list[Tensor | None]:
    """Statistics of the kind that the method needs, for a tensor of that shape: None where it has none of the kind."""
    if get(method).statistics == "fisher":
        return [randn(*shape, seed=seed + t).square() for t in range(n_experts)]
    if len(shape) != 2:
        return [None] * n_experts
    inputs = [randn(2 * shape[1] + 3, shape[1], seed=seed + t, dtype=torch.float64) for t in range(n_experts)]
    return [(x.mT @ x / len(x)).float() for x in inputs]


def at_byte(tensor: Tensor, offset: int) -> Tensor:
    """A contiguous copy that begins `offset` bytes after a multiple of 64, as in a file, and ends its allocation."""
    if tensor.numel() == 0:
        return tensor.clone()
    buffer = torch.empty(offset + tensor.nbytes, dtype=torch.uint8)  # torch's memory begins at a multiple of 64
    copy = torch.frombuffer(buffer.numpy(), dtype=tensor.dtype, offset=offset, count=tensor.numel()).view(tensor.shape)
    return copy.copy_(tensor)


LAYOUTS = ["transposed", "strided", "expanded"]


def laid_out(layout: str) -> list[Tensor]:
    """A base and two experts as views that are not contiguous."""
    base, experts = group((48, 40), 2)
    if layout == "transposed":
        return [t.mT for t in (base, *experts)]
    if layout == "strided":
        return [t[::2, 1::3] for t in (base, *experts)]
    return [base[:1].expand(48, 40), experts[0], experts[1][:, :1].expand(48, 40)]
