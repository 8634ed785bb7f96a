"""Versions that stand in two files are the same in both."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import resm_kernels

ROOT = Path(__file__).resolve().parent.parent
HOOKS = {"ruff": "ruff-pre-commit", "clang-format": "mirrors-clang-format"}


@pytest.mark.parametrize("tool", HOOKS)
def test_commit_hooks_run_the_versions_of_make_lint(tool: str) -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (revision,) = (r["rev"] for r in repositories if r["repo"].endswith(HOOKS[tool]))
    assert f'"{tool}=={revision.removeprefix("v")}"' in (ROOT / "pyproject.toml").read_text()


def test_changelog_begins_with_this_version() -> None:
    newest = re.search(r"^## (\S+) - ", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest and newest[1] == resm_kernels.__version__.partition("+")[0]


def test_oldest_supported_torch_is_the_tested_one() -> None:
    (tested,) = re.findall(r"^torch==(\d+\.\d+)\.", (ROOT / "constraints.txt").read_text(), re.M)
    assert f'"torch>={tested}"' in (ROOT / "pyproject.toml").read_text()
