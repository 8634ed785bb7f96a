"""Merges that are killed, run out of space or cannot read: the output stays whole, and the next run has the same bits.

`tests/kills.py` runs more of them than there is time for here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from checkpoints import Family
from kills import MODES, contents, random_fault

from resm_kernels import merge_checkpoints

ROOT = Path(__file__).resolve().parent.parent

# Merges are forked from a process whose torch has not started threads yet.
_SCRIPT = """
import sys
from pathlib import Path
from random import Random
sys.path.insert(0, sys.argv[1])
from kills import Fault, Kills, random_fault

kills, random = Kills(Path(sys.argv[2])), Random(int(sys.argv[3]))
if sys.argv[4] == "random":
    milliseconds = 1000 * kills.seconds()
    for i in range(10):
        kills.check(random_fault(random, milliseconds), overwrite=bool(i % 2))
else:
    overwrite, exchange = sys.argv[4] != "new", sys.argv[4] != "renamed"
    step = random.randint(1, 3)
    for fault in kills.every_call(exchange=exchange):
        if fault.number % 4 == step and kills.check(fault, overwrite=overwrite) == 0:
            break
print(sum(kills.outcomes.values()))
"""


@pytest.mark.parametrize("kind", ["random", "new", "replaced", "renamed"])
def test_killed_anywhere_the_output_is_whole_and_the_next_run_has_the_same_bits(tmp_path: Path, kind: str) -> None:
    """In the commit, before a quarter of the system calls: of a new output, and of one that replaces an older model, by
    an exchange of names, and by two renames as where the system has no exchange."""
    arguments = [str(ROOT / "tests"), str(tmp_path), "5", kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", _SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10


@pytest.mark.parametrize(("call", "number"), [("renameat2", 1), ("fsync", 6)])
def test_killed_by_the_kernel_at_a_system_call(tmp_path: Path, call: str, number: int) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    family = Family(tmp_path, experts=2)
    recipe = family.recipe_file("linear")
    command = [sys.executable, "-m", "resm_kernels", "merge", str(recipe), str(family.out), "--quiet", "--overwrite"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=environment).returncode == 0
    new = contents(family.out)
    tracing = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}"]
    tracing += ["-e", f"inject={call}:signal=SIGKILL:when={number}"]
    killed = subprocess.run([*tracing, *command], capture_output=True, text=True, env=environment)
    if "ptrace" in killed.stderr.lower():
        pytest.skip(f"strace may not trace here: {killed.stderr.strip()}")
    assert killed.returncode != 0, "no such call"
    assert contents(family.out) == new
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert contents(family.out) == new and family.leftovers() == ["out"]


def test_a_full_file_system(tmp_path: Path) -> None:
    """The disk fills up while the merge runs: tensors have their space, and the same command later writes the rest."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.decode().strip()}")
    script = (
        "import sys\n"
        "from resm_kernels import cli\n"
        "from resm_kernels.checkpoint import CheckpointWriter\n"
        "(fill, filler), seen, write = sys.argv[1:3], [], CheckpointWriter.write\n"
        "def filling(self, name, tensor, start):\n"
        "    write(self, name, tensor, start)\n"
        "    seen.append(name)\n"
        "    if len(seen) == 10:\n"
        "        with open(filler, 'wb', buffering=0) as file:\n"
        "            try:\n"
        "                while file.write(bytes(4096)): pass\n"
        "            except OSError: pass\n"
        "if fill == 'fill': CheckpointWriter.write = filling\n"
        "del sys.argv[1:3]\n"
        "cli.main()\n"
    )
    try:
        family = Family(tmp_path, experts=2)
        recipe, out = family.recipe_file(), disk / "out"
        full = subprocess.run(
            [sys.executable, "-c", script, "fill", str(disk / "filler"), "merge", str(recipe), str(out), "--quiet"],
            capture_output=True,
            text=True,
        )
        assert full.returncode == 1 and full.stderr.count("\n") == 1, full.stderr
        assert "No space left on device; 30 of 30 tensors are done; the same command goes on" in full.stderr
        assert not out.exists()
        (disk / "filler").unlink()
        again = subprocess.run(
            [sys.executable, "-c", script, "-", "-", "merge", str(recipe), str(out)], capture_output=True, text=True
        )
        assert again.returncode == 0 and "resumed: 30 of 30 tensors were done" in again.stdout, again.stderr
        assert sorted(p.name for p in disk.iterdir()) == ["out"]
        merge_checkpoints(family.recipe_file(), tmp_path / "o" / "out")
        assert contents(out) == contents(tmp_path / "o" / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_random_faults_cover_all_modes() -> None:
    random = Random(0)
    assert {random_fault(random, 100).mode for _ in range(60)} == set(MODES)
