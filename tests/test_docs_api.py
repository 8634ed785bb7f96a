"""The pages of the Python API name everything public once; tables are what the library and the records say."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest
from click import Option

from resm_kernels import flags, methods, ops

ROOT: Final = Path(__file__).resolve().parent.parent
API: Final = sorted((ROOT / "docs" / "api").glob("*.md"))
PUBLIC: Final = (
    "resm_kernels",
    "resm_kernels.calibrate",
    "resm_kernels.engine",
    "resm_kernels.linalg",
    "resm_kernels.live",
    "resm_kernels.methods",
    "resm_kernels.ops",
    "resm_kernels.peft",
    "resm_kernels.report",
    "resm_kernels.search",
)
"""Packages whose names are documented."""
NO_OBJECTS: Final = {"resm_kernels.__version__", *PUBLIC}
"""Names that docs/api/index.md describes in a sentence or in its table."""


def resolve(path: str) -> Any:
    """The object that an identifier on a page stands for."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


def documented() -> list[str]:
    """The identifiers that the pages show."""
    return [path for page in API for path in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)]


def test_every_public_name_is_documented_once() -> None:
    index = (ROOT / "docs" / "api" / "index.md").read_text()
    assert all(f"`{name}`" in index for name in NO_OBJECTS)
    shown = documented()
    assert [path for path, count in Counter(shown).items() if count > 1] == []
    # A name that two packages have is one object, which is shown once; types such as Weight are known by their names.
    objects = Counter(id(resolve(path)) for path in shown)
    assert [path for path in shown if objects[id(resolve(path))] > 1] == []
    for package in PUBLIC:
        for name in resolve(f"{package}.__all__"):
            path = f"{package}.{name}"
            assert path in NO_OBJECTS or id(resolve(path)) in objects, path


def test_packages_that_are_public_are_those_of_the_index() -> None:
    rows = re.findall(r"^\| `(resm_kernels[.\w]*)` \|", (ROOT / "docs" / "api" / "index.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(PUBLIC)


@pytest.mark.parametrize("path", documented())
def test_docstrings_say_what_a_page_needs(path: str) -> None:
    shown = resolve(path)
    if not (inspect.isfunction(shown) or inspect.isclass(shown)):
        return
    text = inspect.getdoc(shown)
    assert text, path
    # Sections that the pages do not know would be shown as a quotation.
    for section in re.findall(r"^([A-Z]\w+):\n +\S", text, re.MULTILINE):
        assert section in ("Args", "Attributes", "Examples", "Raises", "Returns", "Yields"), f"{path}: {section}"
    # The package's docstring says what all methods' arguments have in common.
    if inspect.isfunction(shown) and "Args:" in text and not path.startswith("resm_kernels.methods."):
        arguments = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*): ", text.partition("Args:")[2], re.MULTILINE)
        named = {name.lstrip("*") for line in arguments for name in line.split(", ")}
        missing = inspect.signature(shown).parameters.keys() - named - {"options"}
        assert not missing, f"{path}: {missing}"


def test_every_method_has_its_function_on_the_page() -> None:
    shown = {resolve(path) for path in documented() if path.startswith("resm_kernels.methods.")}
    for name in methods.names():
        function = methods.get(name).function
        function = getattr(function, "func", function)
        assert function in shown or not function.__module__.startswith("resm_kernels."), name


def test_every_op_is_explained() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    parts = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL))
    assert sorted(parts) == sorted(ops.dispatch_table())
    for name, part in parts.items():
        assert "**Computes**" in part and "**Floor**" in part, name
        assert f"benchmarks/bench_{name}.py" in part and (ROOT / f"benchmarks/bench_{name}.py").exists()


@pytest.mark.parametrize("page", [p for p in (ROOT / "docs").rglob("*.md") if "<!-- table: " in p.read_text()])
def test_tables_are_up_to_date(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    tables = importlib.import_module("docs_tables")
    assert page.read_text() == tables.written(page.read_text()), "python scripts/docs_tables.py writes it anew"


def flags_of(script: str) -> set[str]:
    """The flags of one of mergekit's commands."""
    module = pytest.importorskip(f"mergekit.scripts.{script}", reason="mergekit is not installed (peers extra)")
    options = [p for p in module.main.params if isinstance(p, Option)]
    return {flag for option in options for flag in (*option.opts, *option.secondary_opts)}


def explained(section: str) -> set[str]:
    """The flags in the first column of a section's table in docs/migrating.md."""
    text = (ROOT / "docs" / "migrating.md").read_text()
    rows = re.findall(r"^\| (`-[^|]*) \|", text.partition(f"\n## {section}\n")[2].partition("\n## ")[0], re.MULTILINE)
    return {flag for row in rows for flag in re.findall(r"`(--?[\w-]+)", row)}


def test_every_flag_of_mergekit_is_explained() -> None:
    common, table = flags_of("run_yaml"), explained("Flags of mergekit-yaml")
    assert common | flags_of("multimerge") == table
    assert flags_of("extract_lora") - common == explained("Flags of mergekit-extract-lora")
    # What this command line translates is in the table too.
    assert {name for flag in flags.FLAGS for name in flag.names if not re.fullmatch("-v+", name)} <= table
