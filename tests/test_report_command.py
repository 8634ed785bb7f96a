"""The command `report`: pages of recipes and merged folders, JSON, and mistakes that are named before the long work."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Family
from conftest import RunCommand

from resm_kernels.report import from_json

pytestmark = pytest.mark.usefixtures("one_thread")

for _module in ("jinja2", "vl_convert"):
    pytest.importorskip(_module, reason="a report's page needs the extra `report`")


def test_a_recipe_makes_merge_html(
    family: Family, run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = family.recipe_file("resm")
    before = {*tmp_path.iterdir()}
    code, out, err = run("report", recipe, "--json", "figures.json")
    assert (code, err) == (0, "")
    assert out.startswith("report of recipe.yml: ") and out.rstrip().endswith("merge.html")
    assert {path.name for path in {*tmp_path.iterdir()} - before} == {"merge.html", "figures.json"}
    page, report = Path("merge.html").read_text(), from_json(Path("figures.json").read_text())
    assert report.method == "resm" and report.out is None and any(cell.spectra for cell in report.cells)
    assert page.count('<td role="gridcell" id=') == len(report.cells)
    assert all(name in page for cell in report.cells for name in cell.tensors)


def test_a_merged_folder_makes_a_page_with_its_name(
    family: Family, run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("merge", family.recipe_file(), family.out, "--quiet") == (0, "", "")
    page = Path(f"{family.out.name}.html")
    page.write_text("a page from before")
    assert run("report", family.out, "--no-spectra", "--quiet") == (0, "", "")
    text = page.read_text()
    assert str(family.out) in text and "merge_method: ties" in text and "Change of the merged model" in text
    assert "limit for tensors in flight" in text and '<table class="stages">' in text


def test_json_is_printed_alone(family: Family, run: RunCommand, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = run("report", family.recipe_file(), "-o", page, "--no-spectra", "--json", "-")
    report = from_json(out)
    assert code == 0 and report.method == "ties" and not any(cell.spectra for cell in report.cells)
    assert err.startswith("report of recipe.yml: ") and page.is_file()


def test_mistakes_are_named_before_models_are_read(
    family: Family, run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resm_kernels.report.gather", lambda *_: pytest.fail("models were read"))
    recipe = family.recipe_file()
    page, pipe = tmp_path / "page.html", tmp_path / "pipe"
    os.mkfifo(pipe)
    for options, said in [
        (("-o", tmp_path), f"--out: got {tmp_path}, which is a folder; need the name of a file"),
        (("-o", page, "--json", tmp_path), f"--json: got {tmp_path}, which is a folder; need the name of a file"),
        (("-o", page, "--json", page), f"--json: got {page}, which is the name of the page too; need another file"),
        (("-o", "-"), "--out: got -, need the name of a file"),
        (("-o", recipe), f"--out: got {recipe}, which is the recipe; need another file"),
        (("-o", page, "--json", recipe), f"--json: got {recipe}, which is the recipe; need another file"),
        (("-o", tmp_path / ("x" * 256)), "--out: got '"),
        (("-o", pipe), f"--out: got {pipe}, which is no regular file; need the name of a file"),
        (("-o", page, "--json", pipe), f"--json: got {pipe}, which is no regular file; need the name of a file"),
    ]:
        code, _, err = run("report", recipe, *options)
        assert code == 1 and err.startswith(f"error: {said}") and err.count("\n") == 1
    load = importlib.import_module

    def without_vega(name: str) -> Any:
        if name == "vl_convert":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return load(name)

    monkeypatch.setattr(importlib, "import_module", without_vega)
    code, _, err = run("report", recipe, "-o", tmp_path / "page.html")
    assert code == 1 and err.count("\n") == 1 and "pip install 'resm-kernels[report]'" in err
    assert not (tmp_path / "page.html").exists()


def test_what_is_neither_a_recipe_nor_a_merge_is_refused(family: Family, run: RunCommand, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, _, err = run("report", family.folders[0], "-o", page)
    assert code == 1 and "need a recipe, or a folder that `resm-kernels merge` wrote" in err and not page.exists()


def test_a_name_may_be_as_long_as_files_allow(family: Family, run: RunCommand, tmp_path: Path) -> None:
    page = tmp_path / f"{'é' * 125}.html"
    assert run("report", family.recipe_file(), "-o", page, "--no-spectra", "--quiet") == (0, "", "")
    assert page.is_file()


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no names that are not Unicode")
def test_a_name_may_be_no_unicode(family: Family, run: RunCommand, tmp_path: Path) -> None:
    recipe = tmp_path / os.fsdecode(b"\xff.yml")
    family.recipe_file().rename(recipe)
    code, out, err = run("report", recipe, "-o", tmp_path / "page.html", "--no-spectra", "--json", "-")
    assert code == 0 and from_json(out).title == "\\udcff.yml" and err.startswith("report of \\udcff.yml: ")


def test_a_full_disk_is_named(family: Family, run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("resm_kernels.checkpoint.durable.os.fsync", full)
    page = tmp_path / "page.html"
    code, _, err = run("report", family.recipe_file(), "-o", page, "--no-spectra", "--quiet")
    assert (code, err) == (1, f"error: output {page}: cannot be written: No space left on device\n")
    assert not [path for path in tmp_path.iterdir() if "page" in path.name]
