"""Estimates how long a merge takes on one machine or on many, from the rates of a machine."""

from __future__ import annotations

import heapq
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import torch

from resm_kernels.engine.costs import REFERENCE, Machine, Work
from resm_kernels.engine.models import MergeError
from resm_kernels.linalg.threads import thread_count
from resm_kernels.methods import get

MACHINES: Final = (1, 8, 64)
"""The numbers of machines for which `--dry-run` shows an estimate."""
_FILE_BYTES: Final = 256 * 2**20
_ROUNDS: Final = 5


@dataclass(frozen=True)
class Estimate:
    """How long a merge takes, in seconds, and what limits it.

    Attributes:
        machines: The number of machines.
        seconds: The estimate, without the start of processes.
        limit: What takes longest: "arithmetic", "disk", "network", "shared storage" or "largest tensor".
    """

    machines: int
    seconds: float
    limit: str


def estimate(works: Iterable[Work], machine: Machine, machines: int) -> Estimate:
    """Return the estimate for that many equal machines.

    Tensors are dealt out like batches: the longest first, each to the machine that has least to do. On each machine
    reading, arithmetic and writing overlap, so that the slower of disk and arithmetic counts, or the network between
    several machines and their shared storage; and the slowest machine counts.
    """
    works = list(works)
    link = machine.network if machines > 1 else math.inf

    def parts(work: Work) -> dict[str, float]:
        return {
            "arithmetic": machine.compute_seconds(work),
            "disk": machine.disk_seconds(work),
            "network": (work.read + work.written) / link,
        }

    costs = [max(parts(work).values()) for work in works]
    loads = [(0.0, i, Work()) for i in range(machines)]
    for cost, work in sorted(zip(costs, works, strict=True), key=lambda pair: -pair[0]):
        seconds, i, load = loads[0]
        heapq.heapreplace(loads, (seconds + cost, i, load + work))
    slowest = max((parts(load) for *_, load in loads), key=lambda p: max(p.values()))
    if machines > 1:
        total = sum(work.read + work.written for work in works)
        slowest["shared storage"] = total / machine.storage
    limit = max(slowest, key=lambda name: slowest[name])
    seconds = slowest[limit]
    largest = max(costs, default=0.0)
    return Estimate(machines, seconds, "largest tensor" if machines > 1 and largest > 0.9 * seconds else limit)


def chosen_machine(name: str | None, out: str | os.PathLike[str], threads: int | None) -> tuple[Machine, str]:
    """Return the machine that `--machine` names, and in a few words where its rates are from.

    Args:
        name: "measure", the path of a JSON file, or None for the reference machine.
        out: The output folder, beside which the disk is measured.
        threads: The threads to measure with; None for torch's setting.

    Raises:
        MergeError: The file is not one of rates, or the disk cannot be measured.
    """
    if name is None:
        return REFERENCE, "an assumed server with 16 cores; --machine measure takes this one"
    if name == "measure":
        return measure_machine(Path(out), threads), "this machine, measured now"
    return read_machine(Path(name)), name


def read_machine(file: Path) -> Machine:
    """Read the rates of a machine from a JSON object with the attributes of `Machine` as keys."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MergeError(
            f"machine {file}: cannot be read as JSON: {getattr(error, 'strerror', None) or error}"
        ) from error
    known = [f.name for f in fields(Machine)]
    needed = [f.name for f in fields(Machine) if f.name not in ("network", "storage")]
    if not isinstance(data, dict) or not set(needed) <= data.keys() or not data.keys() <= set(known):
        raise MergeError(f"machine {file}: need a JSON object with {', '.join(needed)}, and maybe network and storage")
    for key, value in data.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise MergeError(f"machine {file}: {key}: got {value!r}, need a rate a second, a number above 0")
    return Machine(**data)


def measure_machine(out: Path, threads: int | None) -> Machine:
    """Measure this machine's rates, in seconds: of a file of 256 MiB beside `out`, a product, a merge in memory."""
    read, written = _disk_rates(out)
    with thread_count(threads):
        a = torch.randn(2048, 2048)
        gemm = 2 * 2048**3 / _least(lambda: torch.mm(a, a))
        models = [torch.randn(2048, 4096).bfloat16() for _ in range(3)]
        linear = get("linear")
        seconds = _least(lambda: linear(None, models))
    return Machine(gemm, 4 * models[0].nbytes / seconds, read, written)


def _disk_rates(out: Path) -> tuple[float, float]:
    """Bytes a second of reading and of writing a new file in the folder that `out` will be in."""
    folder = Path(os.path.abspath(out)).parent
    while not folder.exists():
        folder = folder.parent
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            began = time.perf_counter()
            for _ in range(_FILE_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())
            written = time.perf_counter() - began
            if hasattr(os, "posix_fadvise"):  # else the page cache is measured
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            buffer = bytearray(8 * 2**20)
            began = time.perf_counter()
            while file.readinto(buffer):
                pass
            read = time.perf_counter() - began
    except OSError as error:
        raise MergeError(f"machine: the disk of {folder} cannot be measured: {error.strerror}") from error
    return _FILE_BYTES / read, _FILE_BYTES / written


def _least(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def machine_line(machine: Machine) -> str:
    """Return the rates of a machine in words."""
    rates = [
        f"products {machine.gemm / 1e9:.0f} GFLOP/s",
        f"element-wise {machine.elementwise / 1e9:.1f} GB/s",
        f"disk {machine.disk_read / 1e9:.1f} GB/s read, {machine.disk_write / 1e9:.1f} GB/s written",
    ]
    for name, rate in (("network", machine.network), ("shared storage", machine.storage)):
        rates.append(f"{name} {'no limit' if math.isinf(rate) else f'{rate / 1e9:.1f} GB/s'}")
    return ", ".join(rates)


def duration(seconds: float) -> str:
    """Return a duration in two significant figures: 0.42 s, 35 s, 12 min, 3.1 h."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{_two_digits(seconds / size)} {unit}"
    return f"{_two_digits(seconds)} s"


def _two_digits(value: float) -> str:
    digits = max(1 - math.floor(math.log10(value)), 0) if value > 0 else 0
    return f"{value:.{digits}f}"
