"""The tree's own rules: one stem per op everywhere, imports that point downward, a package that stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "resm_kernels"
OPS = sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_"))
METHODS = sorted(p.stem for p in (PACKAGE / "methods").glob("*.py") if not p.stem.startswith("_"))
LINALG = sorted(p.stem for p in (PACKAGE / "linalg").glob("*.py") if not p.stem.startswith("_"))

# A module may import from its own layer and from those before it.
LAYERS = [
    {"_version", "_extension", "suggestions", "tensor_names", "dtypes"},
    {"checks", "masks", "memory", "philox"},
    {"reference"},
    {"_launch"},
    {"triton", "cuda"},
    {"ops"},
    {"_backends", "linalg"},
    {"elementwise"},
    {"spectral"},
    {"methods"},
    {"_merge", "mergekit", "peft"},
    {"recipe", "checkpoint"},
    {"lora"},
    {"engine"},
    {"report", "plot"},
    {"flags"},
    {"cli", "__main__"},
]
HEAVY = ("transformers", "peft", "mergekit", "triton", "matplotlib", "scipy", "sklearn")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "place",
    [
        "resm_kernels/reference/{}.py",
        "csrc/cpu/{}.cpp",
        "csrc/cpu/{}.simd.h",
        "tests/test_{}.py",
        "benchmarks/bench_{}.py",
    ],
)
def test_op_has_its_stem_everywhere(op: str, place: str) -> None:
    assert (ROOT / place.format(op)).is_file()


@pytest.mark.parametrize("stem", METHODS + LINALG)
def test_method_and_linalg_have_tests(stem: str) -> None:
    assert (ROOT / "tests" / f"test_{stem}.py").is_file()


def test_no_kernel_without_an_op() -> None:
    on_cpu = {"kernels", "block", "lanes", "chunks", "threads", "memory", "ops", "gemm", "tiles", "tridiagonal"}
    on_cpu |= {"sparsity", "sample"}
    shared = on_cpu | {"table", "select"}
    for folder in ("csrc/cpu", "csrc/cuda", "resm_kernels/reference", "resm_kernels/triton", "resm_kernels/cuda"):
        for path in (ROOT / folder).iterdir():
            stem = path.name.split(".")[0]
            assert path.is_dir() or stem.startswith("_") or stem in shared | set(OPS), path


def test_cuda_kernels_have_hosts_are_built_and_listed() -> None:
    kernels = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert kernels == {path.stem for path in (PACKAGE / "cuda").glob("[a-z]*.py")}
    built, listed = (ROOT / "CMakeLists.txt").read_text(), (ROOT / "python/cuda.cpp").read_text()
    for stem in kernels:
        assert f"csrc/cuda/{stem}.cu" in built and f"&{stem}_cuda" in listed


def test_triton_launches_say_whether_products_are_contracted() -> None:
    """The default differs from one version of Triton to the next, and with it the bits."""
    launches = 0
    for path in (PACKAGE / "triton").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            options = {k.arg for k in node.keywords} if isinstance(node, ast.Call) else set()
            launches += "num_warps" in options
            assert "num_warps" not in options or "enable_fp_fusion" in options, (path, node.lineno)
    assert launches >= 10


def test_imports_point_downward() -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue  # the front door names everything
        for imported in _package_imports(path):
            assert imported in level, f"{path}: {imported} has no layer; add it to LAYERS"
            assert level[imported] <= level[own], f"{path} imports {imported}, a layer above it"


def _package_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "resm_kernels":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("resm_kernels."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("resm_kernels.")}
    return found - {"__version__"}


@pytest.mark.parametrize("module", ["resm_kernels", "resm_kernels.cli", "resm_kernels.engine"])
def test_import_stays_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_front_door_loads_what_is_asked_for() -> None:
    code = (
        "import resm_kernels, sys\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(resm_kernels.__all__) <= set(dir(resm_kernels))\n"
        "assert all(getattr(resm_kernels, name) is not None for name in resm_kernels.__all__)\n"
        "assert resm_kernels.merge is sys.modules['resm_kernels._merge'].merge\n"
        "assert callable(resm_kernels.backends) and not hasattr(resm_kernels, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_files_stay_readable() -> None:
    for folder in ("resm_kernels", "csrc", "python", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".cu", ".h"}:
                assert len(path.read_text().splitlines()) <= 450, f"{path}: perhaps two things in one"
