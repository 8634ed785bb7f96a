"""The device of the tests of CUDA kernels: a GPU, or the CPU, for which a C++ compiler compiles the same source."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from inputs import group
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.cuda import launch

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLAGS = ["-std=c++20", "-Og", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-Icsrc", "-Ipython"]
FLAGS += ["-Wall", "-Wextra", "-Werror"]
MODULE = "cuda_on_host"

if DEVICE == "cpu" and os.environ.get("RESM_REQUIRE_GPU"):
    pytest.fail("RESM_REQUIRE_GPU is set, but torch sees no GPU", pytrace=False)

GUARD = 64
"""Elements of a guard, before and after a tensor."""


def device_group(
    n: int, dtype: torch.dtype, n_experts: int, kind: str = "weights", seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base of n elements and its experts, of one dtype, on DEVICE."""
    base, experts = group((n,), n_experts, kind, base_dtype=dtype, seed=seed)
    return base.to(DEVICE), [e.to(DEVICE) for e in experts]


def shifted(tensor: Tensor) -> Tensor:
    """A copy that is contiguous and one element off any alignment."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    buffer[1:] = tensor.flatten()
    return buffer[1:].view(tensor.shape)


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Every tensor that the launchers allocate within it lies between guards, which no kernel may touch."""
    buffers: list[Tensor] = []

    def guarded(shape: object, *, dtype: torch.dtype, device: object) -> Tensor:
        size = torch.Size([shape] if isinstance(shape, int) else shape)
        buffer = torch.full((size.numel() + 2 * GUARD,), 77, dtype=dtype, device=device)
        buffers.append(buffer)
        return buffer[GUARD:-GUARD].view(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        patch.setattr(torch, "zeros", lambda *a, **k: guarded(*a, **k).zero_())
        yield
    assert buffers
    assert all(bool((guard == 77).all()) for buffer in buffers for guard in (buffer[:GUARD], buffer[-GUARD:]))


def kernels_on_host() -> ModuleType:
    """python/cuda.cpp with kernels that run on the CPU, and `run_backwards`, as a module.

    The library lies in build/. It is compiled again only where its sources, its compiler or its flags have changed.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here: the CUDA kernels are not compiled for the host")
    nanobind = pytest.importorskip("nanobind")
    folders = (nanobind.include_dir(), f"{nanobind.__path__[0]}/ext/robin_map/include", sysconfig.get_path("include"))
    includes = [f"-isystem{folder}" for folder in folders]
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "python/cuda.cpp", ROOT / f"tests/{MODULE}.cpp"]
    sources.append(Path(nanobind.source_dir(), "nb_combined.cpp"))
    headers = [path for folder in ("csrc/cuda", "csrc/common", "python") for path in (ROOT / folder).glob("*.h")]
    content = b"".join(path.read_bytes() for path in (*sources, *sorted(headers)))
    command = [compiler, *FLAGS, *includes]
    key = hashlib.sha256(content + " ".join(command).encode()).hexdigest()[:16]
    library = ROOT / f"build/{MODULE}/{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        new = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-x", "c++", *map(str, sources), "-o", str(new)], cwd=ROOT, check=True)
        new.replace(library)  # in one step, as another session may do the same
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(library))
    spec = importlib.util.spec_from_file_location(MODULE, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["forwards", "backwards"] if DEVICE == "cpu" else ["on the GPU"])
def cuda_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """resm_kernels.cuda calls the kernels on DEVICE; on the host with threads and blocks in either order."""
    if DEVICE == "cuda":
        if not hasattr(_extension.native, "aggregate_cuda"):
            pytest.fail("the extension was built without CUDA", pytrace=False)
        yield
        return
    on_host = kernels_on_host()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "native", on_host)
        on_host.run_backwards(request.param == "backwards")
        yield
        on_host.run_backwards(False)
