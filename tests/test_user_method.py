"""A merge method that a user wrote: the example is installed with pip and runs from a folder outside this tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import Family, load_model
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "user_method"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which Python has the example installed."""
    source, site = tmp_path_factory.mktemp("source") / "example", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    done = subprocess.run([*pip, *options, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (site / "median_merge.py").is_file()
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))}


def run(arguments: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=folder)


def median(base: Tensor, experts: list[Tensor], largest: float, lambda_: float) -> Tensor:
    change = torch.stack([e.float() - base.float() for e in experts]).median(0).values.clamp(-largest, largest)
    return (base.float() + lambda_ * change).to(base.dtype)


def test_tensors_and_state_dictionaries(environment: dict[str, str], tmp_path: Path) -> None:
    code = """
import torch, resm_kernels
from resm_kernels import methods
base, experts = torch.zeros(4), [torch.tensor([t, -t, 1.0, 10.0]) for t in (1.0, 2.0, 3.0)]
print(resm_kernels.merge(base, experts, "median", lambda_=0.5, largest=4).tolist())
print(resm_kernels.merge(base, experts, "median", weight=[3, 1, 0]).tolist())
print(resm_kernels.merge_state_dicts({"a": base}, [{"a": e} for e in experts], "median")["a"].tolist())
print("median" in methods.names(), [p.name for p in methods.get("median").parameters])
for wrong in ({"largest": -1}, {"larges": 1}):
    try:
        resm_kernels.merge(base, experts, "median", **wrong)
    except ValueError as error:
        print(error)
"""
    done = run(["-c", code], environment, tmp_path)
    assert done.stdout.splitlines() == [
        "[1.0, -1.0, 0.5, 2.0]",
        "[2.0, -2.0, 1.0, 10.0]",
        "[2.0, -2.0, 1.0, 10.0]",
        "True ['weight', 'largest', 'lambda']",
        "largest: got -1, need a number of at least 0",
        "median has no parameter 'larges', did you mean 'largest'?; it has weight, largest, lambda",
    ], done.stderr


def test_recipes(environment: dict[str, str], tmp_path: Path) -> None:
    family = Family(tmp_path, experts=3)
    recipe = family.recipe_file("median", parameters={"lambda": 0.5, "largest": 0.01})
    done = run(["-m", "resm_kernels", "merge", str(recipe), str(family.out), "--quiet"], environment, tmp_path)
    assert done.returncode == 0, done.stderr
    base, merged = load_model(family.base_folder), load_model(family.out)
    experts = [load_model(folder) for folder in family.folders]
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, median(base[name], [e[name] for e in experts], 0.01, 0.5)), name

    wrong = family.recipe_file("median", parameters={"largest": "many"})
    done = run(["-m", "resm_kernels", "merge", str(wrong), str(tmp_path / "never")], environment, tmp_path)
    assert done.returncode == 1 and "largest: got 'many', need a number of at least 0" in done.stderr


@pytest.mark.skipif(find_spec("mergekit") is None, reason="needs mergekit")
def test_mergekit(environment: dict[str, str], tmp_path: Path) -> None:
    family = Family(tmp_path, experts=3, dtype=torch.float32)
    recipe = tmp_path / "recipe.yml"
    parameters = {"lambda": 0.5, "largest": 0.01}
    recipe.write_text(yaml.safe_dump(family.recipe("median", parameters=parameters, dtype="float32")))
    command = ["-m", "resm_kernels", "mergekit", str(recipe), str(family.out), "--no-copy-tokenizer"]
    done = run(command, environment, tmp_path)
    assert done.returncode == 0, done.stderr
    base, experts = load_model(family.base_folder), [load_model(folder) for folder in family.folders]
    for name, tensor in load_model(family.out).items():
        assert torch.equal(tensor, median(base[name], [e[name] for e in experts], 0.01, 0.5)), name
