"""Where CUDA kernels run in tests: on a GPU, or, the same source compiled by a C++ compiler, on the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from inputs import group
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.cuda import _launch
from resm_kernels.cuda.aggregate import CHUNK

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLAGS = ["-std=c++17", "-Og", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Icsrc"]

if DEVICE == "cpu" and os.environ.get("RESM_REQUIRE_GPU"):
    pytest.fail("RESM_REQUIRE_GPU is set, but torch sees no GPU", pytrace=False)

LENGTHS = (0, 1, 7, 8, 257, 2048, CHUNK - 1, CHUNK + 8, 2 * CHUNK + 5, 0)
GUARD = 64

Groups = tuple[list[Tensor], list[Tensor]]


def groups(dtype: torch.dtype, n_experts: int, lengths: tuple[int, ...] = LENGTHS, kind: str = "weights") -> Groups:
    """Bases and all experts of tensors of these lengths."""
    made = [group((n,), n_experts, kind, base_dtype=dtype, seed=10 * i) for i, n in enumerate(lengths)]
    return [base.to(DEVICE) for base, _ in made], [e.to(DEVICE) for _, own in made for e in own]


def shifted(tensor: Tensor) -> Tensor:
    """A copy that is contiguous and one element off any alignment."""
    room = tensor.new_empty(tensor.numel() + 1)
    room[1:] = tensor.flatten()
    return room[1:].view(tensor.shape)


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Every tensor that the hosts allocate within it lies between guards, which no kernel may touch."""
    kept: list[Tensor] = []

    def guarded(shape: object, *, dtype: torch.dtype, device: object) -> Tensor:
        size = torch.Size([shape] if isinstance(shape, int) else shape)  # type: ignore[arg-type]
        room = torch.full((size.numel() + 2 * GUARD,), 77, dtype=dtype, device=device)  # type: ignore[call-overload]
        kept.append(room)
        return room[GUARD:-GUARD].view(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        patch.setattr(torch, "zeros", lambda *a, **k: guarded(*a, **k).zero_())
        yield
    assert kept
    assert all(bool((room[:GUARD] == 77).all()) and bool((room[-GUARD:] == 77).all()) for room in kept)


class OnHost:
    """The functions of csrc/cuda/ops.h, and `run_backwards`: integers and floats in, an error as an exception."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)
        if name != "run_backwards":
            function.restype = ctypes.c_char_p

        def call(*arguments: int | float) -> None:
            plain = [(ctypes.c_double if isinstance(a, float) else ctypes.c_int64)(a) for a in arguments]
            error = function(*plain)
            if isinstance(error, bytes):
                raise RuntimeError(error.decode())

        return call


def built() -> Path:
    """The kernels compiled for this machine, in build/, again only where their source has changed."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here: the CUDA kernels are not compiled for the host")
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "tests/cuda_on_host.cpp"]
    headers = [*sorted((ROOT / "csrc/cuda").glob("*.h")), *sorted((ROOT / "csrc/common").glob("*.h"))]
    content = b"".join(p.read_bytes() for p in (*sources, *headers))
    key = hashlib.sha256(content + " ".join([compiler, *FLAGS]).encode()).hexdigest()[:16]
    library = ROOT / f"build/cuda_on_host/{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *FLAGS, "-x", "c++", *map(str, sources), "-o", str(fresh)], cwd=ROOT, check=True)
        fresh.replace(library)  # in one step: another session may be here too
    return library


@pytest.fixture(scope="module", params=["forwards", "backwards"] if DEVICE == "cpu" else ["on the GPU"])
def cuda_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """resm_kernels.cuda calls the kernels on DEVICE; on the host with threads and blocks in either order."""
    if DEVICE == "cuda":
        if not hasattr(_extension.native, "aggregate_cuda"):
            pytest.fail("the extension was built without CUDA", pytrace=False)
        yield
        return
    on_host = OnHost(built())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "native", on_host)
        on_host.run_backwards(int(request.param == "backwards"))
        yield
        on_host.run_backwards(0)
