"""The rules of the source tree: an op has one name everywhere, imports point downward, importing is cheap."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from resm_kernels.ops import dispatch_table

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "resm_kernels"
OPS = sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_"))
METHODS = sorted(p.stem for p in (PACKAGE / "methods").glob("*.py") if not p.stem.startswith("_"))
LINALG = sorted(p.stem for p in (PACKAGE / "linalg").glob("*.py") if not p.stem.startswith("_"))

# A module may import from its layer and from those before it.
LAYERS = [
    {"_version", "_extension", "suggestions", "tensor_names", "roles", "dtypes", "files"},
    {"streams"},
    {"checks", "masks", "memory", "philox", "stages"},
    {"reference"},
    {"_launch"},
    {"triton", "cuda"},
    {"ops"},
    {"_backends", "linalg"},
    {"elementwise"},
    {"spectral"},
    {"methods"},
    {"_merge", "mergekit"},
    {"checkpoint"},
    {"hub"},
    {"recipe"},
    {"options"},
    {"lora"},
    {"peft"},
    {"engine"},
    {"calibrate", "live"},
    {"console", "plot"},
    {"search", "report"},
    {"flags", "arguments", "command"},
    {"lora_commands", "extract_command", "search_command"},
    {"cli", "__main__"},
]
HEAVY = (
    *("transformers", "peft", "mergekit", "triton", "matplotlib", "scipy", "sklearn", "ray"),
    *("gguf", "huggingface_hub"),
)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "path",
    [
        "resm_kernels/reference/{}.py",
        "csrc/cpu/{}.cpp",
        "csrc/cpu/{}.simd.h",
        "tests/test_{}.py",
        "benchmarks/bench_{}.py",
    ],
)
def test_op_has_its_name_everywhere(op: str, path: str) -> None:
    assert (ROOT / path.format(op)).is_file()


@pytest.mark.parametrize("stem", METHODS + LINALG)
def test_method_and_linalg_have_tests(stem: str) -> None:
    assert (ROOT / "tests" / f"test_{stem}.py").is_file()


# Files that several ops share.
SHARED = {
    "csrc/cpu": {"kernels", "block", "lanes", "chunks", "threads", "memory", "ops", "gemm", "tiles", "tridiagonal"}
    | {"sparsity", "sample", "poison"},
    "csrc/cuda": {"block", "elements", "ops", "select"},
    "resm_kernels/reference": {"__init__", "deltas"},
    "resm_kernels/triton": {"__init__", "delta_product"},
    "resm_kernels/cuda": {"__init__", "launch"},
}


@pytest.mark.parametrize("folder", SHARED)
def test_no_kernel_without_an_op(folder: str) -> None:
    for path in (ROOT / folder).iterdir():
        stem = path.name.split(".")[0]
        is_private = stem.startswith("_")
        assert path.is_dir() or is_private or stem in SHARED[folder] | set(OPS), f"{path}: no op has this name"


def test_every_op_has_a_reference_that_its_declaration_takes() -> None:
    for op in OPS:
        module = importlib.import_module(f"resm_kernels.reference.{op}")
        assert callable(getattr(module, op)) and op in dispatch_table()


def test_cuda_kernels_have_launchers_and_are_listed() -> None:
    kernels = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert kernels == {path.stem for path in (PACKAGE / "cuda").glob("[a-z]*.py")} - SHARED["resm_kernels/cuda"]
    listed = (ROOT / "python/cuda.cpp").read_text()
    for stem in kernels:
        assert f"&{stem}_cuda" in listed


def test_triton_launches_say_whether_products_are_contracted() -> None:
    """The default differs from one version of Triton to the next, and with it the bits."""
    launches = 0
    for path in (PACKAGE / "triton").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and "num_warps" in (options := {k.arg for k in node.keywords}):
                launches += 1
                assert "enable_fp_fusion" in options, (path, node.lineno)
    assert launches >= 10


def test_underscore_modules_are_imported_within_their_package_alone() -> None:
    for folder in ("resm_kernels", "tests", "benchmarks", "scripts", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).parts
            package = parts[1] if parts[0] == "resm_kernels" else ""
            for owner, module in _private_imports(path):
                assert owner == package, f"{path}: {module} belongs to the package {owner}"


def _private_imports(path: Path) -> list[tuple[str, str]]:
    """The packages of resm_kernels whose underscore modules a file imports, each with the module."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    split = [module.split(".") for module in modules]
    return [
        (parts[1], ".".join(parts[:3]))
        for parts in split
        if parts[0] == "resm_kernels" and len(parts) > 2 and _is_private(parts[2]) and (PACKAGE / parts[1]).is_dir()
    ]


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_imports_point_downward() -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name == "__init__":
            continue  # the package itself names everything
        for imported in _package_imports(path):
            assert imported in level, f"{path}: {imported} has no layer; add it to LAYERS"
            assert level[imported] <= level[name], f"{path} imports {imported}, a layer above it"


def _package_imports(path: Path) -> set[str]:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "resm_kernels":
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("resm_kernels."):
            imported.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            imported |= {a.name.split(".")[1] for a in node.names if a.name.startswith("resm_kernels.")}
    return imported - {"__version__"}


@pytest.mark.parametrize(
    "module", ["resm_kernels", "resm_kernels.cli", "resm_kernels.engine", "resm_kernels.calibrate"]
)
def test_import_stays_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_loads_names_when_they_are_asked_for() -> None:
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
