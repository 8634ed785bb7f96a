"""The record of a run: where a merge's time went, its memory, and the machine, in a file of the merged folder."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from resm_kernels import _extension
from resm_kernels._version import __version__
from resm_kernels.checkpoint import json_bytes

if TYPE_CHECKING:
    from resm_kernels.engine.pipeline import Timings
    from resm_kernels.engine.plan import MergePlan

_FORMAT: Final = 1
_PEAK: Final = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)
_MODEL: Final = re.compile(r"^model name\s*:\s*(.+)", re.MULTILINE)


def run_record(
    plan: MergePlan, timings: Timings, names: Collection[str], *, planned: float, prepared: float, flushed: float
) -> bytes:
    """Return the content of `RUN_FILE`.

    Its stages are planning (the recipe and headers, checks, documents that are kept), preparing the output (its space
    on the disk, hashes of what an earlier run wrote), reading, computing, writing, and flushing to disk. Reading,
    computing and writing go on at the same time, in threads of their own: each has the seconds that it was busy.
    Methods that merge tensors in blocks after passes over them read in these passes too, which counts as computing. In
    a Ray cluster the seconds are the sums over all workers.

    Args:
        plan: The merge.
        timings: The times of its pipeline.
        names: The tensors that this run merged; an earlier run had written the others.
        planned, prepared, flushed: Seconds that these stages took.
    """
    jobs = [job for job in plan.jobs if job.name in names]
    stages = [
        {"name": "plan", "seconds": planned},
        {"name": "prepare", "seconds": prepared},
        {"name": "read", "seconds": timings.read, "bytes": sum(job.input_bytes for job in jobs)},
        {"name": "compute", "seconds": timings.compute},
        {"name": "write", "seconds": timings.write, "bytes": sum(job.output_bytes for job in jobs)},
        {"name": "flush", "seconds": flushed},
    ]
    on_ray = plan.options.engine == "ray"
    return json_bytes(
        {
            "format": _FORMAT,
            "version": __version__,
            "tensors": len(plan.jobs),
            "tensors_resumed": len(plan.jobs) - len(jobs),
            "stages": stages,
            "memory": {
                "peak": None if on_ray else peak_resident(),
                "limit": plan.options.window_bytes,
                "bound": plan.window.bound,
                "in_flight": timings.memory_peak,
            },
            "machine": {
                **machine_facts(),
                "threads": str(plan.options.threads or torch.get_num_threads()),
                "device": "a Ray cluster" if on_ray else ", ".join(d.name for d in plan.devices) or "cpu",
            },
        }
    )


def peak_resident() -> int | None:
    """Return the most bytes that were resident in this process so far; None if the system does not say."""
    if (found := _PEAK.search(_system_file("/proc/self/status"))) is not None:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows has no such module
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _system_file(path: str) -> str:
    """The text of a file of the kernel; empty where the system has none, such as macOS."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def machine_facts() -> dict[str, str]:
    """Return what a time depends on: processor, cores, system, and the versions of Python, torch and the kernels."""
    found = _MODEL.search(_system_file("/proc/cpuinfo"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": found[1].strip() if found is not None else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(cores),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": "reference" if _extension.native is None else "native",
    }
