"""The documents name every method with its parameters, and the example in them is the one that is tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from resm_kernels.methods import get, names

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("methods", "spectral", "resm")}
INHERITED = {"weight", "lambda", "int8_mask"}
"""Parameters that the documents explain once for all methods."""


@pytest.mark.parametrize("name", names())
def test_every_method_and_parameter_is_documented(name: str) -> None:
    text = "\n".join(TEXTS.values())
    assert f"`{name}`" in text
    parameters = {p.name for p in get(name).parameters if not p.name.startswith("inner_")} - INHERITED
    missing = {p for p in parameters if not re.search(rf"`{p}\b", text)}
    assert not missing, f"{name}: {missing}"


def test_the_example_is_the_one_that_is_installed() -> None:
    module = (ROOT / "examples/user_method/median_merge.py").read_text()
    function = module[module.index("@merge_method") :].strip()
    assert function in TEXTS["methods"]
    assert '[project.entry-points."resm_kernels.methods"]\nmedian = "median_merge"\n' in TEXTS["methods"]
