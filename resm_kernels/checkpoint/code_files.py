"""Finds the Python modules of a model's folder that its custom code imports, wherever in the folder they are."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

_SUFFIX: Final = ".py"
_PACKAGE: Final = "__init__.py"


def imported_modules(folder: Path, sources: Iterable[tuple[Path, bytes]]) -> Iterator[Path]:
    """Yield the modules in a folder that Python code there imports relatively, but for the code itself.

    Both `from .layers.rope import f` and `from . import layers` count, and so do the packages on the way to a module.
    What the yielded modules import is found by asking again with their content. Code that Python cannot parse has no
    imports. No code is run.

    Args:
        folder: The model's folder.
        sources: Files of code in it, with their content.
    """
    for file, content in sources:
        for level, parts, names in _relative_imports(content):
            start = file.parent
            for _ in range(level - 1):
                start = start.parent
            if not start.is_relative_to(folder):
                continue
            place = start
            for part in parts:
                yield from _existing(place / _PACKAGE)
                place /= part
            yield from _existing(place / _PACKAGE, place.with_suffix(_SUFFIX) if parts else place / _PACKAGE)
            for name in names:
                yield from _existing(place / f"{name}{_SUFFIX}", place / name / _PACKAGE)


def _existing(*files: Path) -> Iterator[Path]:
    return (file for file in files if file.is_file())


def _relative_imports(content: bytes) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield for each relative import its number of dots, the parts of the module's name, and the names imported."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a NUL byte
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = node.module.split(".") if node.module else []
            yield node.level, parts, [alias.name for alias in node.names if alias.name != "*"]
