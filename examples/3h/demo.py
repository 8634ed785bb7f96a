"""Merge the three experts in four ways and measure all eight models: `make demo`, or `python -m examples.3h.demo`."""

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
KEPT = Path("build/demo/resm")  # relative to the repository's root
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


def main() -> None:
    console = Console()
    folders = {name: HERE / "models" / name for name in ("base", "helpful", "honest", "harmless")}
    kept = ROOT / KEPT
    # A merge never writes over an existing folder.
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, recipe in RECIPES.items():
            out = kept if recipe == "resm" else Path(scratch) / recipe
            merge(recipe, out)
            folders[name] = out
        rows, world = {}, World(SEED)
        for name, folder in folders.items():
            with console.status(f"asking {name}"):
                rows[name] = evaluate(*load(folder), world, "test")
    console.print(table(rows))
    console.print(f"The RESM merge lies in {KEPT}. Try it:", soft_wrap=True)
    command = f'.venv/bin/python -m benchmarks.quality.evaluate {KEPT} --ask "how do i paint the guard ?"'
    console.print(command, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"merging failed: {' '.join(error.cmd)} returned {error.returncode}")
