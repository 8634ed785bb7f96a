"""Kills merges, and checks that the output is a whole model all the time and that the next run ends with the same bits.

`python tests/kills.py --count 60` kills 60 merges: by SIGKILL and SIGTERM at random moments, by SIGKILL before random
system calls, by full disks and by read errors, with an older model at the output's place and without. `--every-call`
kills one before each system call of the commit, and `--strace` does that for the whole command with strace.

Merges run in processes that are forked before torch has threads and after what takes seconds to import.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from checkpoints import Family

from resm_kernels.checkpoint import CheckpointWriter, place, tensor_writer, verify_checkpoint
from resm_kernels.checkpoint.record import RUN_FILE
from resm_kernels.engine import merge_checkpoints

CALLS: Final = ("open", "pwrite", "preadv", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "ftruncate")
CALLS_MORE: Final = ("posix_fallocate", "truncate", "scandir", "close")
TRACED: Final = (
    "openat",
    "pwrite64",
    "fsync",
    "rename",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "fallocate",
)
MODES: Final = ("SIGKILL", "SIGTERM", "call", "full", "unreadable")
_KILLED: Final = -signal.SIGKILL


@dataclass(frozen=True)
class Fault:
    """What happens to a merge.

    Attributes:
        mode: One of `MODES`, or "none".
        number: For "call", "full" and "unreadable" before which system call; for signals after how many milliseconds.
        in_commit: Count the system calls from the beginning of the commit on.
        exchange: Whether the system can exchange two names.
    """

    mode: str
    number: float = 0
    in_commit: bool = False
    exchange: bool = True


@dataclass
class Kills:
    """Merges of small models in a folder, and what they must end with.

    Attributes:
        outcomes: How many merges ended how.
    """

    root: Path
    outcomes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.family = Family(self.root, experts=2)
        self.recipe = self.family.recipe("ties", parameters={"density": 0.5})
        self.out = self.family.out
        self.options: dict[str, Any] = {"max_shard_size": "30kB", "threads": 1}
        self.old = self._made(self.family.recipe("linear"), self.root / "old")
        self.new = self._made(self.recipe, self.root / "new")

    def _made(self, recipe: dict[str, Any], kept: Path) -> dict[str, bytes]:
        """Merge to the output's place, so that the model card has its name, and keep the result elsewhere."""
        assert self._run(Fault("none"), recipe) == 0
        self.out.rename(kept)
        return contents(kept)

    def check(self, fault: Fault, *, overwrite: bool) -> int:
        """Run a merge that meets the fault, then one that does not; return the first one's exit status."""
        if overwrite:
            shutil.copytree(self.root / "old", self.out)
        status = self._run(fault, self.recipe, overwrite=overwrite)
        assert status in (0, 1, 143, _KILLED, -signal.SIGTERM), f"{fault}: exit status {status}"
        whole = [self.new, self.old if overwrite else {}]
        if (place.unfinished_folder(self.out) / place.OLD).is_dir():
            assert not fault.exchange, "only without an exchange the old model may be away"
            if fault.number % 2:  # the next run brings it back, and so does this
                assert verify_checkpoint(self.out).findings == []
            else:
                whole.append({})
        assert contents(self.out) in whole, f"{fault}: the output is no whole model"
        is_done = contents(self.out) == self.new and not (place.unfinished_folder(self.out) / place.MANIFEST).exists()
        again = self._run(Fault("none"), self.recipe, overwrite=overwrite)
        if is_done and not overwrite:  # then there is nothing to go on with, as after a merge that was not killed
            assert "exists and is not empty" in (self.root / "stderr").read_text()
            assert verify_checkpoint(self.out).findings == []
        else:
            assert again == 0, f"{fault}: the next run failed: {(self.root / 'stderr').read_text()}"
        assert contents(self.out) == self.new, f"{fault}: the next run ended with other bits"
        assert self.family.leftovers() == ["out"], f"{fault}: left behind {self.family.leftovers()}"
        shutil.rmtree(self.out)
        self.outcomes[f"{fault.mode}: exit {status}"] += 1
        return status

    def _run(self, fault: Fault, recipe: dict[str, Any], *, overwrite: bool = False) -> int:
        """Fork a process that merges; return its exit status, negative for a signal that ended it."""
        pid = os.fork()
        if pid == 0:
            try:
                sys.stderr = open(self.root / "stderr", "w")  # noqa: SIM115
                apply(fault)
                merge_checkpoints(recipe, self.out, overwrite=overwrite, **self.options)
                os._exit(0)
            except SystemExit as error:
                os._exit(int(error.code or 0))
            except ValueError as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            finally:
                os._exit(99)  # an exception of another kind, which no fault may cause
        if fault.mode in ("SIGKILL", "SIGTERM"):
            time.sleep(fault.number / 1000)
            os.kill(pid, signal.Signals[fault.mode])
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def seconds(self) -> float:
        """How long a merge takes."""
        began = time.perf_counter()
        assert self._run(Fault("none"), self.recipe) == 0
        shutil.rmtree(self.out)
        return time.perf_counter() - began

    def every_call(self, **options: Any) -> Iterator[Fault]:
        """Faults for each system call of the commit, up to the last: the caller stops at a merge that survives."""
        number = 1
        while True:
            yield Fault("call", number, in_commit=True, **options)
            number += 1


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the record of the run; none if there is no folder."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != RUN_FILE)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def apply(fault: Fault) -> None:
    """Make this process meet the fault."""
    tensor_writer.FLUSH_BYTES = 4000  # type: ignore[misc]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not fault.exchange:
        place.__dict__["exchange"] = lambda *_: False
    left = [float("inf") if fault.in_commit else fault.number]
    if fault.in_commit:
        commit = CheckpointWriter.commit

        def counted_commit(self: CheckpointWriter) -> None:
            left[0] = fault.number
            commit(self)

        CheckpointWriter.commit = counted_commit  # type: ignore[method-assign]

    def counted(call: Callable[..., Any], happens: Callable[[], None]) -> Callable[..., Any]:
        def patched(*args: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                happens()
            return call(*args, **keywords)

        return patched

    def fail(number: int) -> Callable[[], None]:
        def happens() -> None:
            raise OSError(number, os.strerror(number))

        return happens

    if fault.mode == "call":
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        for name in (*CALLS, *CALLS_MORE):
            setattr(os, name, counted(getattr(os, name), kill))
        place.__dict__["exchange"] = counted(place.__dict__["exchange"], kill)
    if fault.mode == "full":
        for name in ("pwrite", "fsync", "posix_fallocate", "mkdir"):
            setattr(os, name, counted(getattr(os, name), fail(errno.ENOSPC)))
    if fault.mode == "unreadable":
        os.preadv = counted(os.preadv, fail(errno.EIO))


def traced(root: Path) -> Iterator[str]:
    """Kill the command at each of its system calls that change files, with strace; yield what was done."""
    family = Family(root, experts=2)
    recipe, out = family.recipe_file("ties"), family.out
    command = [sys.executable, "-m", "resm_kernels", "merge", str(recipe), str(out), "--quiet", "--threads", "1"]
    subprocess.run(command, check=True)
    new = contents(out)
    for name in TRACED:
        number = 1
        while True:
            options = ["-f", "-qq", "-o", "/dev/null", "-e", f"trace={name}", "-e"]
            options.append(f"inject={name}:signal=SIGKILL:when={number}")
            killed = subprocess.run(["strace", *options, *command, "--overwrite"], capture_output=True).returncode
            assert contents(out) == new, (name, number)
            again = subprocess.run([*command, "--overwrite"], capture_output=True, text=True)
            assert again.returncode == 0 and contents(out) == new, (name, number, again.stderr)
            assert family.leftovers() == ["out"], (name, number)
            if killed == 0:
                break
            yield f"{name} {number}"
            number += 1


def random_fault(random: Random, milliseconds: float) -> Fault:
    """Draw a fault."""
    mode = random.choice(MODES)
    if mode in ("SIGKILL", "SIGTERM"):
        return Fault(mode, random.uniform(0, milliseconds))
    return Fault(mode, random.randint(1, {"call": 250, "full": 90, "unreadable": 80}[mode]))


def main() -> None:
    """Run what the command line asks for, and print how the merges ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="random faults")
    parser.add_argument("--seed", type=int, default=0, help="of the random faults")
    parser.add_argument("--every-call", action="store_true", help="also before each system call of the commit")
    parser.add_argument("--strace", action="store_true", help="also at each system call of the command, with strace")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills, random = Kills(Path(folder)), Random(arguments.seed)
        milliseconds = 1000 * kills.seconds()
        for i in range(arguments.count):
            kills.check(random_fault(random, milliseconds), overwrite=bool(i % 2))
        if arguments.every_call:
            for overwrite, exchange in ((False, True), (True, True), (True, False)):
                for fault in kills.every_call(exchange=exchange):
                    if kills.check(fault, overwrite=overwrite) == 0:
                        break
        for outcome, count in sorted(kills.outcomes.items()):
            print(f"{count:5} merges, {outcome}")
    if arguments.strace:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{sum(1 for _ in traced(Path(folder))):5} kills by strace")


if __name__ == "__main__":
    main()
