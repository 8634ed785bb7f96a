"""The command line: what it prints, how it exits, and that it stays light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import Family, load_model
from conftest import RunCommand
from safetensors.torch import save_file
from typer.testing import CliRunner

from resm_kernels import cli, merge_state_dicts


def test_merge_writes_the_model_and_says_so(family: Family, run: RunCommand) -> None:
    code, out, err = run("merge", family.recipe_file(), family.out)
    assert (code, err) == (0, "")
    assert out.startswith("merged 30 tensors with ties in ")
    assert out.rstrip().endswith(str(family.out))
    merged, expected = load_model(family.out), merge_state_dicts(family.base, family.experts, "ties")
    assert all(torch.equal(merged[n], expected[n]) for n in expected)
    assert run("merge", family.recipe_file(), family.out, "--overwrite", "--quiet") == (0, "", "")


def test_random_seed_decides_what_is_dropped(family: Family, run: RunCommand) -> None:
    recipe = str(family.recipe_file("dare_ties", parameters={"density": 0.5}))
    merges = []
    for seed in ("1", "1", "2"):
        assert run("merge", recipe, str(family.out), "--overwrite", "--random-seed", seed)[0] == 0
        merges.append(load_model(family.out))
    same = [all(torch.equal(merges[0][name], other[name]) for name in other) for other in merges]
    assert same == [True, True, False]


def test_module_runs_as_a_process(family: Family) -> None:
    command = [sys.executable, "-m", "resm_kernels", "merge", str(family.recipe_file("linear")), str(family.out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (family.out / "model.safetensors").is_file()


def test_dry_run_says_everything_and_writes_nothing(family: Family, run: RunCommand) -> None:
    models: list[dict[str, Any]] = [{"model": str(f)} for f in family.folders]
    models[1] |= {"parameters": {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 2}]}}
    recipe = family.recipe_file(models=models, parameters={"density": 0.5})
    code, out, err = run(
        "merge", recipe, family.out, "--dry-run", "--max-shard-size", "30kB", "--memory-limit", "16MiB"
    )
    assert (code, err) == (0, "")
    for part in (
        "ties (TIES)",
        "density = 0.5",
        "lambda = 1.0 (default)",
        "weight = mlp: [0, 1]; 2",
        str(family.folders[2]),
        "30 merged, 0 copied",
        "to read",
        "memory bound",
        "files, bfloat16",
        "free disk",
    ):
        assert part in out
    assert family.leftovers() == []


def test_dry_run_says_where_a_default_is_another(family: Family, run: RunCommand) -> None:
    code, out, _ = run("merge", family.recipe_file("resm"), family.out, "--dry-run")
    assert code == 0 and "spectral = True (default, False for embeddings and output heads)" in out


def test_progress_without_a_terminal_is_lines(family: Family, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resm_kernels.console._LINE_EVERY", 0.0)
    code, _, err = run("merge", family.recipe_file(), family.out)
    assert code == 0
    lines = err.splitlines()
    assert len(lines) == 30
    assert lines[-1].startswith("merging: ")
    assert lines[-1].endswith(", 0 s left")
    assert "\x1b" not in err


def test_progress_on_a_terminal_is_a_bar(family: Family) -> None:
    from rich.console import Console

    from resm_kernels.console import progress_display

    with open(os.devnull, "w") as sink:
        console = Console(file=sink, force_terminal=True, record=True, width=100)
        with progress_display(console, "merging [/x]", quiet=False) as progress:
            assert progress is not None
            progress(5, 10)
        assert "merging [/x]" in console.export_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("merge", "nowhere.yml", "out"), "error: nowhere.yml: no such file; need a recipe\n"),
        (("stats", "nowhere.yml"), "error: nowhere.yml: no such file; need a recipe\n"),
    ],
)
def test_errors_are_one_line_and_exit_1(run: RunCommand, arguments: tuple[str, ...], message: str) -> None:
    assert run(*arguments) == (1, "", message)


def test_error_in_a_model_is_one_line_and_leaves_nothing(family: Family, run: RunCommand) -> None:
    family.change(1, model__norm__weight=torch.full((32,), torch.nan))
    code, out, err = run("merge", family.recipe_file(), family.out)
    problem = "tensor 'model.norm.weight' holds 32 NaN or infinite values; the model is damaged"
    assert (code, out, err) == (1, "", f"error: {family.folders[1]}: {problem}\n")
    assert family.leftovers() == []


def test_size_that_is_none(family: Family, run: RunCommand) -> None:
    code, _, err = run("merge", family.recipe_file(), family.out, "--max-shard-size", "big")
    assert code == 1
    assert err == "error: max_shard_size: got 'big', need a size such as 5GB, 512MiB or a number of bytes\n"


def test_unexpected_errors_name_traceback(family: Family, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("resm_kernels.engine.merge.compute_tensor", broken)
    code, _, err = run("merge", family.recipe_file(), family.out)
    assert code == 1
    assert err == "error: RuntimeError: a bug (--traceback before the command shows where)\n"
    with pytest.raises(RuntimeError, match="a bug"):
        run("--traceback", "merge", family.recipe_file(), family.out)
    assert family.leftovers() == []


def test_interrupt_exits_130(family: Family, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("resm_kernels.engine.merge.compute_tensor", interrupted)
    code, _, err = run("merge", family.recipe_file(), family.out)
    assert code == 130
    assert family.leftovers() == []
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge"],
        ["mrege", "a", "b"],
        ["merge", "a", "b", "--threads", "0"],
        ["calibrate", "a", "b"],
        ["calibrate", "a", "b", "--prompts"],
        ["calibrate", "a", "--prompts", "c"],
        ["calibrate", "a", "b", "--prompts", "c", "--polish-steps", "few"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_stats_table_and_json(family: Family, run: RunCommand, tmp_path: Path) -> None:
    family.change(1, model__norm__weight=torch.full((32,), torch.nan))
    file = tmp_path / "stats.json"
    code, out, _ = run("stats", family.recipe_file("resm"), "--json", file)
    assert code == 0
    for part in ("sparsity", "outlier mass", "weight", "rank", "model.layers.0.mlp.up_proj.weight", "48×32", "32 NaN"):
        assert part in out
    data = json.loads(file.read_text())
    assert data["experts"] == [str(f) for f in family.folders]
    (row,) = [t for t in data["tensors"] if t["name"] == "model.layers.0.mlp.up_proj.weight"]
    assert {"sum_sq", "n_outlier", "max_abs", "rms"} <= set(row["statistics"])
    code, out, _ = run("stats", family.recipe_file("ties"), "--json", "-", "--quiet")
    assert code == 0
    assert len(json.loads(out)["tensors"]) == 30


def test_tables_show_brackets_as_they_are(family: Family, run: RunCommand) -> None:
    damaged = torch.full((3,), torch.nan)
    for folder in (family.base_folder, *family.folders):
        save_file({"a[bold]": torch.ones(3), "b[/c]": torch.ones(3)}, folder / "model.safetensors")
    save_file({"a[bold]": torch.ones(3), "b[/c]": damaged}, family.folders[0] / "model.safetensors")
    renamed = family.folders[0].rename(family.root / "expert[")
    recipe = yaml.safe_load(family.recipe_file("resm").read_text())
    recipe["models"][0]["model"] = str(renamed)
    (family.root / "brackets.yaml").write_text(yaml.safe_dump(recipe))
    code, out, err = run("stats", family.root / "brackets.yaml")
    assert code == 0, err
    assert " a[bold] " in out and " b[/c] " in out and "expert[" in out


def test_json_holds_no_value_that_readers_refuse() -> None:
    from resm_kernels.console import to_json

    assert json.loads(to_json({"a": [float("nan"), 1.5, (float("inf"),)]})) == {"a": [None, 1.5, [None]]}


def test_info_as_text_and_json(run: RunCommand) -> None:
    code, out, _ = run("info")
    assert code == 0
    for part in ("resm_kernels", "torch", "native", "threads", "gpu", "cpu", "delta_stats"):
        assert part in out
    code, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert {"version", "native", "ops", "threads", "torch", "gpu", "cpu"} <= set(facts)


def test_help_and_wrong_usage_come_without_torch() -> None:
    script = (
        "import sys\n"
        "from resm_kernels import cli\n"
        "try: cli.main()\n"
        "except SystemExit as exit_: code = exit_.code\n"
        "heavy = [m for m in ('torch', 'numpy', 'yaml', 'resm_kernels.ops') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    for arguments, code in (
        (["--help"], 0),
        (["merge", "--help"], 0),
        (["calibrate", "--help"], 0),
        (["merge"], 2),
        (["calibrate", "recipe.yml", "out"], 2),
        (["mrege"], 2),
        (["stats"], 2),
    ):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.returncode == code, done.stderr


def test_what_was_loaded_is_no_concern_of_the_garbage_collector(family: Family) -> None:
    script = (
        "import gc, sys\n"
        "from resm_kernels import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()\n"
    )
    command = [sys.executable, "-c", script, "merge", str(family.recipe_file("linear")), str(family.out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_command_imports_neither_transformers_nor_more_than_it_needs(family: Family) -> None:
    script = (
        "import sys\n"
        "from resm_kernels import cli\n"
        "early = [m for m in ('rich.progress', 'yaml', 'pydantic', 'resm_kernels.engine') if m in sys.modules]\n"
        "assert not early, early\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = [m for m in ('transformers', 'triton', 'scipy', 'huggingface_hub') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["info"], ["merge", str(family.recipe_file()), str(family.out)]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
