"""Run by scripts/build_wheels.py in a fresh environment that holds a wheel and its dependencies, but not torch.

It checks what needs no torch: that every module compiles under this Python, that the extension loads, and that the
command line starts.

    python -I tests/wheel_smoke_light.py VERSION
"""

from __future__ import annotations

import compileall
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import resm_kernels
from resm_kernels import _native


def main() -> None:
    version = sys.argv[1]
    assert importlib.util.find_spec("torch") is None, "torch is installed: run tests/wheel_smoke.py instead"
    assert resm_kernels.__version__ == version == importlib.metadata.version("resm-kernels")
    package = Path(resm_kernels.__file__).parent
    assert package.is_relative_to(sys.prefix) and (package / "py.typed").is_file()
    assert compileall.compile_dir(package, quiet=1, force=True), "a module does not compile under this Python"
    isa = _native.build_facts()["isa"]
    program = Path(sys.executable).with_name("resm-kernels")
    assert "merge" in subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    python = ".".join(map(str, sys.version_info[:2]))
    print(f"resm_kernels {version} installs on Python {python}; CPU kernels: {isa}; nothing that needs torch was run")


if __name__ == "__main__":
    main()
