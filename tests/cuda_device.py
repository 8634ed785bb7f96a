"""Where CUDA kernels run in tests: on a GPU, or, the same source compiled by a C++ compiler, on the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from resm_kernels import _extension
from resm_kernels.cuda import _launch

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLAGS = ["-std=c++17", "-Og", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Icsrc"]

if DEVICE == "cpu" and os.environ.get("RESM_REQUIRE_GPU"):
    pytest.fail("RESM_REQUIRE_GPU is set, but torch sees no GPU", pytrace=False)


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
