"""Builds resm_kernels._native with CMake. What is built is said, never probed for:

RESM_NATIVE=OFF               leave the compiled kernels out, as is done on Windows unless this is ON; every op then
                              runs its reference
RESM_CUDA=ON                  build the CUDA kernels too (nvcc needed)
RESM_CUDA_ARCHITECTURES=...   for which architectures, in CMake's spelling
RESM_LOCAL_VERSION=...        a wheel's local version label, such as cu130: __version__ is then 0.2.0+cu130
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# From 3.12 on, nanobind builds for the stable ABI: one extension module, and so one wheel, serves all later versions.
STABLE_ABI = sys.version_info >= (3, 12)
PUBLIC_VERSION: str = runpy.run_path(str(ROOT / "resm_kernels/_version.py"))["__version__"]


def switch(name: str, default: str) -> bool:
    value = os.environ.get(name, default).upper()
    if value not in ("ON", "OFF"):
        raise SystemExit(f"{name}: got {value!r}, need ON or OFF")
    return value == "ON"


def local_version() -> str:
    label = os.environ.get("RESM_LOCAL_VERSION", "")
    if label and not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", label):
        raise SystemExit(f"RESM_LOCAL_VERSION: got {label!r}, need small letters and digits, such as cpu or cu130")
    return f"+{label}" if label else ""


class LabelledBuild(build_py):
    """Writes the local version into the packaged copy of _version.py, so that `__version__` and metadata agree."""

    def run(self) -> None:
        if local_version() and self.editable_mode:
            raise SystemExit(
                "RESM_LOCAL_VERSION: is for wheels; an editable installation has the source tree's version"
            )
        super().run()
        if local_version():
            file = Path(self.build_lib, "resm_kernels/_version.py")
            file.write_text(file.read_text().replace(f'"{PUBLIC_VERSION}"', f'"{PUBLIC_VERSION}{local_version()}"'))


class CMakeBuild(build_ext):
    """Runs CMake in place of the compiler driver of setuptools."""

    def build_extension(self, ext: Extension) -> None:
        import nanobind

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(build),
            "Python_EXECUTABLE": sys.executable,
            "nanobind_DIR": nanobind.cmake_dir(),
            "RESM_CUDA": "ON" if switch("RESM_CUDA", "OFF") else "OFF",
            "RESM_WERROR": "ON" if switch("RESM_WERROR", "OFF") else "OFF",
        }
        if "RESM_CUDA_ARCHITECTURES" in os.environ:
            options["RESM_CUDA_ARCHITECTURES"] = os.environ["RESM_CUDA_ARCHITECTURES"]
        defines = [f"-D{name}={value}" for name, value in options.items()]
        # --fresh: an isolated build's tools are gone the next time, and the cache would still name them.
        subprocess.run(["cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *defines], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        # Put in place in one step: a process that has the old file mapped must not see it change.
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")
        shutil.copy2(build / target.name, fresh)
        fresh.replace(target)
        # Python would prefer a module for its own version only, which an older build may have left beside this one.
        own = target.with_name(f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
        if own != target:
            own.unlink(missing_ok=True)


native = Extension("resm_kernels._native", sources=[], py_limited_api=STABLE_ABI)
setup(
    version=PUBLIC_VERSION + local_version(),
    ext_modules=[native] if switch("RESM_NATIVE", "OFF" if sys.platform == "win32" else "ON") else [],
    options={"bdist_wheel": {"py_limited_api": "cp312"}} if STABLE_ABI else {},
    cmdclass={"build_ext": CMakeBuild, "build_py": LabelledBuild},
)
