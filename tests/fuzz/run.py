"""Fuzzes the readers of files and the command line, and prints a summary; `make fuzz` runs it.

    python tests/fuzz/run.py [--cases 100000] [--seed 0] [--targets header recipe …] [--keep FOLDER]

Exit codes: 0 no findings, 1 findings.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # names of models that a case makes up are not looked for on the hub

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# What reads others' files; coverage is counted of these.
READERS = (
    "files/*",
    "recipe/*",
    "checkpoint/*",
    "hub/*",
    "lora/config.py",
    "lora/adapter.py",
    "calibrate/prompts.py",
    "flags.py",
)
ADDRESS_SPACE = 4 << 30
"""How much more address space than at the start the process may take, in bytes."""


@contextmanager
def measured() -> Iterator[Any]:
    """Count the lines of the readers that run, if the package `coverage` is installed."""
    try:
        import coverage
    except ImportError:
        yield None
        return
    measure = coverage.Coverage(data_file=None, include=[str(ROOT / "resm_kernels" / pattern) for pattern in READERS])
    measure.start()
    try:
        yield measure
    finally:
        measure.stop()


def limit_memory() -> None:
    """Let an allocation fail that is far beyond what the readers need."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        limit = pages * resource.getpagesize() + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def fuzz(name: str, cases: int, seed: int, root: Path) -> tuple[int, dict[str, bytes]]:
    """Read so many cases of a target; return their number, and for each kind of finding the first case of it."""
    import hypothesis
    from guard import Finding
    from targets import TARGETS

    target = TARGETS[name]
    findings: dict[str, bytes] = {}
    count = 0

    # Hypothesis draws no more than some thousand cases well in one run.
    def run(part: int, examples: int) -> None:
        @hypothesis.seed(f"{seed} {name} {part}")
        @hypothesis.settings(
            max_examples=examples,
            database=None,
            deadline=None,
            derandomize=False,
            phases=(hypothesis.Phase.generate,),
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(target.cases)
        def read(case: bytes) -> None:
            nonlocal count
            count += 1
            try:
                target.read(root, case)
            except Finding as finding:
                findings.setdefault(str(finding).replace(str(root), "")[:120], case)

        read()

    size = 2000
    for part in range(-(-cases // size)):
        run(part, min(size, cases - part * size))
    return count, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="how many in all, shared by the targets")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other cases")
    parser.add_argument("--targets", nargs="*", help="some of the targets; all by default")
    parser.add_argument("--keep", type=Path, help="a folder to write the cases of findings to")
    options = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]
    total, found = 0, 0
    memory_disk = Path("/dev/shm")
    began = time.perf_counter()
    with measured() as coverage, mock.patch("os.fsync"):
        import torch
        from targets import TARGETS, import_packages, make_world

        import_packages()
        torch.set_num_threads(1)
        names = options.targets or list(TARGETS)
        limit_memory()
        with tempfile.TemporaryDirectory(dir=memory_disk if memory_disk.is_dir() else None) as folder:
            os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = folder  # what it keeps would else go into the repository
            for name in names:
                (root := Path(folder) / name).mkdir()
                start = time.process_time()
                count, findings = fuzz(name, -(-options.cases // len(names)), options.seed, make_world(root))
                total, found = total + count, found + len(findings)
                print(
                    f"{name}: {count} cases in {time.process_time() - start:.0f} s, {len(findings)} kinds of findings"
                )
                for message, case in findings.items():
                    print(f"  {message}\n    {case[:200]!r}")
                    if options.keep is not None:
                        (options.keep / name).mkdir(parents=True, exist_ok=True)
                        (options.keep / name / hashlib.sha256(case).hexdigest()[:16]).write_bytes(case)
                sys.stdout.flush()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"in all {total} cases in {time.perf_counter() - began:.0f} s, {found} kinds of findings, peak memory {peak} MB"
    )
    if coverage is not None:
        print("lines of the readers that ran:")
        coverage.report(file=sys.stdout, show_missing=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
