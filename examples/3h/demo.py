"""Merge the three experts in four ways, calibrate one of the merges, and measure all nine models.

`make demo`, or `python -m examples.3h.demo`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.quality.evaluate import evaluate, load, table
from benchmarks.quality.world import World

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SEED = 0  # of the world in which the models were trained
KEPT = Path("build/demo/calibrated")  # relative to the repository's root
EXPERTS = ("helpful", "honest", "harmless")
RECIPES = {
    "task arithmetic": "task_arithmetic",
    "TSV-M": "tsvm",
    "RESM, beta: 1 (the abstract)": "resm_beta_1",
    "RESM (defaults)": "resm",
}


def merge(recipe: str, out: Path) -> None:
    """Run the command line as a user would; paths in a recipe are relative to the repository's root."""
    path = (HERE / "recipes" / f"{recipe}.yaml").relative_to(ROOT)
    subprocess.run([sys.executable, "-m", "resm_kernels", "merge", str(path), str(out)], cwd=ROOT, check=True)


def calibrate(recipe: str, out: Path) -> None:
    """Run the command line: least squares and a polish on the prompts beside the models."""
    path = (HERE / "recipes" / f"{recipe}.yaml").relative_to(ROOT)
    prompts = [str((HERE / "prompts" / f"{expert}.jsonl").relative_to(ROOT)) for expert in EXPERTS]
    command = [sys.executable, "-m", "resm_kernels", "calibrate", str(path), str(out), "--prompts", *prompts]
    # The longest answer of these models has six words and an end. They are so small that one thread is faster than two.
    options = ["--max-new-tokens", "8", "--polish-steps", "40", "--threads", "1"]
    subprocess.run([*command, *options], cwd=ROOT, check=True)


def count_prompts() -> int:
    """Prompts of each expert."""
    return len((HERE / "prompts" / f"{EXPERTS[0]}.jsonl").read_text().splitlines())


def main() -> None:
    console = Console()
    folders = {name: HERE / "models" / name for name in ("base", *EXPERTS)}
    kept = ROOT / KEPT
    # A merge never writes over an existing folder.
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, recipe in RECIPES.items():
            folders[name] = Path(scratch) / recipe
            merge(recipe, folders[name])
        calibrate("resm", kept)
        folders[f"RESM, calibrated with {count_prompts()} prompts an expert"] = kept
        rows, world = {}, World(SEED)
        for name, folder in folders.items():
            with console.status(f"asking {name}"):
                rows[name] = evaluate(*load(folder), world, "test")
    console.print(table(rows))
    console.print(f"The calibrated RESM merge lies in {KEPT}. Try it:", soft_wrap=True)
    command = f'.venv/bin/python -m benchmarks.quality.evaluate {KEPT} --ask "how do i paint the guard ?"'
    console.print(command, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"merging failed: {' '.join(error.cmd)} returned {error.returncode}")
