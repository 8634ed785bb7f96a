"""The script that merges a tiny model of every family of transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "families.py"


def test_a_family_and_a_layout_of_the_hub_are_merged_and_loaded(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    page = tmp_path / "architectures.md"
    command = [sys.executable, str(SCRIPT), "--only", "vit", "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ties, dare_ties, resm, with one rounding and the right roles" in done.stdout
    assert "## Image models\n" in page.read_text() and "\n| vit |" in page.read_text()
    assert "\n| vit: no prefix |" in page.read_text()
