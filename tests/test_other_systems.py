"""What only Linux has is not needed on macOS, and Windows gets ops in memory and a clear error about checkpoints.

Each test takes away, in a process of its own, what the other system lacks, before the package is imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MACOS = """
import mmap, os, sys
for name in ("sched_getaffinity", "posix_fadvise", "posix_fallocate", "O_DIRECT"):
    delattr(os, name)
for name in [name for name in vars(mmap) if name.startswith("MADV_HUGE")]:
    delattr(mmap, name)
import ctypes
class Library:  # macOS's C library has no renameat2
    pass
ctypes.CDLL = lambda *_, **__: Library()
import pathlib
read_text = pathlib.Path.read_text
def no_proc(path, *arguments, **options):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(path)
    return read_text(path, *arguments, **options)
pathlib.Path.read_text = no_proc
"""
WINDOWS = """
import mmap, os, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios", "resm_kernels._native"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "preadv", "pread", "pwrite", "posix_fadvise", "posix_fallocate", "O_DIRECT",
             "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "register_at_fork", "geteuid"):
    delattr(os, name)
for name in ("MAP_PRIVATE", "MAP_ANONYMOUS"):
    delattr(mmap, name)
del signal.SIGHUP
"""


def run(without: str, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    # torch comes first: its own modules are made for the system that runs the test.
    program = f"import torch, typer, rich, pydantic, safetensors.torch, numpy, subprocess\n{without}\n{code}"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def recipe(folder: Path) -> Path:
    for i in range(2):
        (folder / str(i)).mkdir()
        weight = torch.full((8, 4), 1.0 + 2 * i, dtype=torch.bfloat16)
        save_file({"weight": weight}, folder / str(i) / "model.safetensors", {"format": "pt"})
        (folder / str(i) / "config.json").write_text('{"model_type": "llama"}')
    models = [{"model": str(folder / str(i)), "parameters": {"weight": 1.0}} for i in range(2)]
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"merge_method": "linear", "models": models}))  # JSON is YAML
    return file


COMMAND = "import sys\nfrom resm_kernels.cli import main\nsys.argv[0] = 'resm-kernels'\nmain()"


def test_without_what_macos_lacks_an_output_is_written_and_replaced(tmp_path: Path) -> None:
    file = recipe(tmp_path)
    for options in ((), ("--overwrite",)):
        done = run(MACOS, COMMAND, "merge", file, tmp_path / "out", "--quiet", *options)
        assert done.returncode == 0, done.stderr
        assert load_file(tmp_path / "out/model.safetensors")["weight"].eq(2).all()


def test_without_what_windows_lacks_tensors_merge_and_checkpoints_are_refused(tmp_path: Path) -> None:
    merge = """
import resm_kernels
base, experts = torch.zeros(8, 4), [torch.full((8, 4), x) for x in (1.0, 3.0)]
assert resm_kernels.merge(base, experts, "task_arithmetic", weight=0.5).eq(2).all()
assert not resm_kernels.backends()["native"]["available"]
"""
    done = run(WINDOWS, merge)
    assert done.returncode == 0, done.stderr
    done = run(WINDOWS, COMMAND, "merge", recipe(tmp_path), tmp_path / "out")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert "checkpoints need Linux or macOS" in line and "preadv" in line and "flock" in line
    done = run(WINDOWS, COMMAND, "info")
    assert done.returncode == 0 and "without the compiled kernels" in done.stdout, done.stderr
