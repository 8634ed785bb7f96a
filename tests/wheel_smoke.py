"""Run by scripts/build_wheels.py in a fresh environment that holds a wheel and its dependencies alone.

python -I tests/wheel_smoke.py VERSION
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import resm_kernels

BASE = torch.zeros(8, 4, dtype=torch.bfloat16)
EXPERTS = [torch.full((8, 4), x, dtype=torch.bfloat16) for x in (1.0, 3.0)]


def command(*arguments: object) -> str:
    """What `resm-kernels` prints."""
    program = Path(sys.executable).parent / "resm-kernels"
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def check_merges() -> None:
    for name in resm_kernels.methods.names():
        method = resm_kernels.methods.get(name)
        required: dict[str, Any] = {
            p.keyword: 0.5 for p in method.parameters if p.default is resm_kernels.methods.REQUIRED
        }
        experts = EXPERTS[: method.max_experts]
        if method.statistics:
            required["statistics"] = [None] * len(experts)
        assert resm_kernels.merge(BASE, experts, name, **required).isfinite().all(), name
    assert resm_kernels.merge(BASE, EXPERTS, "linear").eq(2).all()


def check_checkpoints() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for i, expert in enumerate(EXPERTS):
            (root / str(i)).mkdir()
            safetensors.torch.save_file({"weight": expert}, root / str(i) / "model.safetensors", {"format": "pt"})
            (root / str(i) / "config.json").write_text('{"model_type": "llama"}')
        models = [{"model": str(root / str(i)), "parameters": {"weight": 1.0}} for i in range(len(EXPERTS))]
        (root / "recipe.yaml").write_text(json.dumps({"merge_method": "linear", "models": models}))  # JSON is YAML
        command("merge", root / "recipe.yaml", root / "out", "--quiet")
        assert safetensors.torch.load_file(root / "out/model.safetensors")["weight"].eq(2).all()


class OnCuda(TorchDispatchMode):
    """Calls what an op has registered for CUDA, whatever the tensors' device."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if op.namespace != "resm_kernels":
            return op(*args, **(kwargs or {}))
        return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))


def check_cuda_without_driver() -> str:
    """A call of the CUDA kernels says in plain words that there is no driver, and the CPU's go on."""
    with (
        mock.patch("torch.cuda.device", mock.MagicMock()),
        mock.patch("torch.cuda.current_stream", return_value=mock.Mock(cuda_stream=0)),
        OnCuda(),
    ):
        try:
            resm_kernels.ops.aggregate(BASE, EXPERTS, [1.0, 1.0])
        except RuntimeError as error:
            return str(error)
    raise AssertionError("a CUDA kernel ran without a driver")


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def main() -> None:
    version = sys.argv[1]
    assert resm_kernels.__version__ == version == importlib.metadata.version("resm-kernels")
    package = Path(resm_kernels.__file__).parent
    assert package.is_relative_to(sys.prefix) and (package / "py.typed").is_file()
    facts = resm_kernels.backends()
    assert facts["native"]["available"], facts["native"]["reason"]
    assert all(row["CPU"] == "native" for row in facts["ops"].values())
    check_merges()
    check_checkpoints()
    assert "transformers" not in sys.modules
    said = command("info")
    assert f"resm_kernels  {version}\n" in said

    cuda = facts["native"]["cuda"]
    assert bool(cuda) == version.partition("+")[2].startswith("cu")
    if cuda:
        assert cuda in said
        if facts["ops"]["aggregate"]["CUDA"] == "native" and not has_driver():
            print(f"without a driver: {check_cuda_without_driver()!r}")
            check_merges()
    print(f"resm_kernels {version} works from its wheel; CPU kernels: {facts['native']['isa']}, CUDA: {cuda or 'none'}")


if __name__ == "__main__":
    main()
