"""Records of benchmarks: their figures, and where these come from.

Every benchmark writes one JSON file through `Recording`, at its end and as a whole. Beside the figures it has the key
`provenance`: the commit, the date, the command, how long it took, the versions of what was compared, and the machine
with its measured rates of memory and of matrix products. `benchmarks.overview` lists the records.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import torch

import resm_kernels
from benchmarks.timing import gemm_rates, memory_rates
from resm_kernels.engine.run_record import machine_facts

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
PROVENANCE: Final = "provenance"
CHANGED: Final = "+changes"
"""Follows the commit's hash if tracked files differed from it, those of `WRITTEN` aside."""
WRITTEN: Final = ("benchmarks/results", "docs")
"""What benchmarks write: records and pictures, and tables in the documentation. No figure depends on it."""
PEERS: Final = {
    "fusion_bench": "fusion-bench",
    "mergekit": "mergekit",
    "peft": "peft",
    "ray": "ray",
    "sklearn": "scikit-learn",
    "transformers": "transformers",
    "triton": "triton",
}
"""Modules and the distributions that they come in."""


class Recording:
    """The record of one run of a benchmark, made when the run begins: what is changed or committed later is not in it.

    Args:
        file: Where the record goes; None if none is asked for.
        peers: The distributions that the run compares with in other processes. What is imported here counts anyway.

    Raises:
        SystemExit: The folder of the file cannot be made or written, or a peer is not installed.
    """

    def __init__(self, file: Path | None, *peers: str) -> None:
        self._file, self._peers = file, peers
        self._began, self._date = time.perf_counter(), datetime.now(timezone.utc)
        self._commit = commit(ROOT)
        versions(peers)  # a peer that is not installed shows now, not at the end
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SystemExit(f"{file}: the record's folder cannot be made: {error.strerror}") from error
            if not os.access(file.parent, os.W_OK):
                raise SystemExit(f"{file}: the record's folder is not writable")

    def save(self, figures: Mapping[str, Any]) -> None:
        """Write the record, aside and renamed, if a file is asked for."""
        if self._file is not None:
            content = {PROVENANCE: self.provenance(), **figures}
            write_aside(self._file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            print(f"{self._file}: written after {time.perf_counter() - self._began:.0f} s", file=sys.stderr, flush=True)

    def provenance(self) -> dict[str, Any]:
        """What the record says beside the figures."""
        return {
            "commit": self._commit,
            "date": self._date.isoformat(timespec="seconds"),
            "command": command(),
            "seconds": round(time.perf_counter() - self._began, 1),
            "versions": versions(self._peers),
            "machine": machine(),
        }


def write_aside(file: Path, text: str) -> None:
    """Write aside and rename: the file is the old one or the new one, whatever happens."""
    aside = file.with_name(f"{file.name}.{os.getpid()}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where there is no git, no repository, or no such revision."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit(root: Path) -> str | None:
    """The full hash of the commit that is checked out, with `CHANGED` where it applies; None outside git."""
    top = git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():  # a copy of the sources within another repository
        return None
    head = git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    excluded = (f":(exclude){folder}" for folder in WRITTEN)
    changed = git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *excluded)
    return head + CHANGED if changed else head


def command() -> str:
    """The command line that runs, with paths as from the repository's root."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    program = sys.argv[:1] if main is None else ["-m", main.name.removesuffix(".__main__")]
    return shlex.join(["python", *program, *sys.argv[1:]]).replace(f"{ROOT}{os.sep}", "")


def versions(peers: Sequence[str] = ()) -> dict[str, str]:
    """Of this library, Python, torch, and the peers that are imported or named."""
    used = sorted({name for module, name in PEERS.items() if module in sys.modules} | set(peers))
    return {
        "resm_kernels": resm_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in used},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"{name} is not installed: this benchmark compares with it") from error


def machine() -> dict[str, Any]:
    """What the figures depend on. Rates are those of memory and of `torch.mm`, with these threads."""
    facts, threads = resm_kernels.backends(), torch.get_num_threads()
    native = facts["native"]
    return {
        "cpu": machine_facts()["processor"],
        "isa": native.get("isa"),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "compiler": native.get("compiler"),
        # The kernel's version without what a distribution appends.
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])} {platform.machine()}",
        **({"gpu": facts["gpu"]} if facts["gpu"] else {}),
        **rates(threads),
    }


@functools.cache
def rates(threads: int) -> dict[str, Any]:
    """This machine's rates with so many threads, measured in each run: they differ from hour to hour."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    measured = {"memory_bytes_per_second": memory_rates(), "gemm_flops_per_second": gemm_rates()}
    torch.set_num_threads(before)
    return measured
