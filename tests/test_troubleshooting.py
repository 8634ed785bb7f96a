"""The messages that docs/troubleshooting.md quotes are those of the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/troubleshooting.md").read_text()


def texts() -> Iterator[str]:
    """Every string of the sources, with "…" in place of each value that is formatted."""
    for file in (ROOT / "resm_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)


def test_every_message_that_is_quoted_is_in_the_sources() -> None:
    quoted = re.findall(r"^### `(.+)`$", PAGE, re.M)
    assert len(quoted) >= 30
    known = "\n".join(texts())
    assert [message for message in quoted if message not in known] == []


def test_every_message_has_a_cause_and_a_remedy() -> None:
    for section in PAGE.split("\n### ")[1:]:
        _, *answer = [part for part in section.partition("\n## ")[0].split("\n\n") if part.strip()]
        assert answer, section
