"""Builds resm_kernels._native with CMake. What is built is said, never probed for:

RESM_NATIVE=OFF               leave the compiled kernels out; every op then runs its reference
RESM_CUDA=ON                  build the CUDA kernels too (nvcc needed)
RESM_CUDA_ARCHITECTURES=...   for which architectures, in CMake's spelling
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def switch(name: str, default: str) -> bool:
    value = os.environ.get(name, default).upper()
    if value not in ("ON", "OFF"):
        raise SystemExit(f"{name}: got {value!r}, need ON or OFF")
    return value == "ON"


class CMakeBuild(build_ext):
    """Runs CMake in place of the compiler driver of setuptools."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(build),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
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


setup(
    ext_modules=[Extension("resm_kernels._native", sources=[])] if switch("RESM_NATIVE", "ON") else [],
    cmdclass={"build_ext": CMakeBuild},
)
