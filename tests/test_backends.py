"""What is live, and that the package works, and says so, where no native kernels can be loaded.

Tolerance: statistics of the reference and of the native kernels add in different orders, so that weights differ by
about 1e-7 (fp32 sums of |δ| inside a block); all else has the same bits.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import call_of, group, same_bits

from resm_kernels import _extension, backends, merge
from resm_kernels.methods import names
from resm_kernels.ops import delta_stats, dispatch_table

SUMS = 1e-6

ROOT = Path(__file__).parent.parent
OPS = {path.stem for path in (ROOT / "resm_kernels/ops").glob("[a-z]*.py")}
IN_TRITON = {path.stem for path in (ROOT / "resm_kernels/triton").glob("[a-z]*.py")}


def on_gpu(op: str) -> str:
    """What serves an op on GPUs where there are no native kernels."""
    return "triton" if op in IN_TRITON and importlib.util.find_spec("triton") is not None else "reference"


# Runs in a new process, because the package decides at its first import whether its kernels load.
WITHOUT_NATIVE = """
import json, sys
sys.modules["resm_kernels._native"] = None
import torch
import resm_kernels
from resm_kernels.ops import delta_stats
inputs = torch.load(sys.argv[1])
merged = {
    name: resm_kernels.merge(inputs["base"], inputs["experts"][:count], name, **inputs["parameters"][name])
    for name, count in inputs["counts"].items()
}
stats = vars(delta_stats(inputs["base"], inputs["experts"], eps_rel=0.1, histogram=True))
torch.save({"merged": merged, "stats": stats}, sys.argv[2])
print(json.dumps(resm_kernels.backends()))
"""

PARAMETERS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3, "weight": [1.0, 0.5]},
    "task_arithmetic": {"lambda_": 0.7},
    "della": {"density": 0.5},
    "sce": {"select_topk": 0.3},
}


def test_backends_describes_this_installation() -> None:
    result = backends()
    json.dumps(result)  # plain values only
    assert result["torch"] == torch.__version__ and result["threads"] == torch.get_num_threads()
    assert set(result["ops"]) == OPS and result["ops"] == dispatch_table()
    native = result["native"]
    assert native["available"] == (_extension.native is not None)
    assert all(row["CPU"] == ("native" if native["available"] else "reference") for row in result["ops"].values())
    if not native.get("cuda"):
        assert all(row["CUDA"] == on_gpu(op) for op, row in result["ops"].items())
    if native["available"]:
        assert native["reason"] == "" and native["isa"] in native["isas"] and "baseline" in native["isas"]
    else:
        assert "reference" in native["reason"]


# A build with CUDA kernels, as far as choosing among kernels is concerned.
WITH_CUDA = """
import importlib.util, json, sys, types
native = types.ModuleType("resm_kernels._native")
for op in ("aggregate", "delta_stats", "magnitude_threshold"):
    setattr(native, op + "_cuda", None)
sys.modules["resm_kernels._native"] = native
find = importlib.util.find_spec
with_triton = json.loads(sys.argv[1])
importlib.util.find_spec = lambda name, *a: with_triton or None if name == "triton" else find(name, *a)
from resm_kernels.ops import dispatch_table
print(json.dumps({op: row["CUDA"] for op, row in dispatch_table().items()}))
"""


@pytest.mark.parametrize("with_triton", [True, False])
def test_gpus_run_the_first_kernels_that_are_there(with_triton: bool) -> None:
    command = [sys.executable, "-c", WITH_CUDA, json.dumps(with_triton)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    first = "triton" if with_triton else "cuda"
    assert (result["aggregate"], result["delta_stats"], result["magnitude_threshold"]) == (first, first, "cuda")
    assert result["project"] == ("triton" if with_triton else "reference")


def test_dispatch_table_is_a_copy() -> None:
    dispatch_table()["aggregate"]["CPU"] = "changed"
    assert dispatch_table()["aggregate"]["CPU"] != "changed"


def test_unknown_instruction_set_is_refused_and_changes_nothing() -> None:
    native = _extension.native
    if native is None:
        pytest.skip("the native kernels are not built")
    before = native.build_facts()["isa"]
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        native.use_isa("mmx")
    assert native.build_facts()["isa"] == before


def test_package_merges_by_every_method_without_native_kernels_and_says_so(tmp_path: Path) -> None:
    base, experts = group((40, 28), 2, base_dtype=torch.bfloat16, seed=3)
    inputs, outputs = tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    counts = {name: call_of(name)[0] for name in names()}
    parameters = {name: call_of(name)[1] | PARAMETERS.get(name, {}) for name in names()}
    torch.save({"base": base, "experts": experts, "counts": counts, "parameters": parameters}, inputs)
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_NATIVE, str(inputs), str(outputs)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["native"]["available"] is False
    assert "without the compiled kernels" in said["native"]["reason"]
    assert "Install a wheel, or build from source" in said["native"]["reason"]
    assert said["ops"] == {op: {"CPU": "reference", "CUDA": on_gpu(op)} for op in OPS}

    result = torch.load(outputs)
    assert set(result["merged"]) == set(names())
    for name, merged in result["merged"].items():
        expected = merge(base, experts[: counts[name]], name, **parameters[name])
        if name in ("resm", "tsvm"):
            torch.testing.assert_close(merged, expected, rtol=2.0**-7, atol=SUMS)  # a bf16 unit where fp32 lies between
            assert int((merged != expected).sum()) <= merged.numel() // 100
        else:
            assert same_bits(merged, expected)
    for name, value in vars(delta_stats(base, experts, eps_rel=0.1, histogram=True)).items():
        other = result["stats"][name]
        assert other.dtype == value.dtype
        torch.testing.assert_close(other, value, rtol=SUMS if value.is_floating_point() else 0, atol=0)


def test_kernels_that_are_there_but_do_not_load_say_why() -> None:
    script = """
import importlib, json
real = importlib.import_module
def broken(name, package=None):
    if name == "resm_kernels._native":
        raise ImportError("libstdc++.so.6: cannot open shared object file")
    return real(name, package)
importlib.import_module = broken
import resm_kernels
print(json.dumps(resm_kernels.backends()))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    native = json.loads(ran.stdout)["native"]
    assert native["available"] is False
    assert "they do not load: libstdc++.so.6: cannot open shared object file" in native["reason"]
