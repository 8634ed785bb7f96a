"""The documentation names commands, options and pages that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from resm_kernels import cli, flags
from resm_kernels.checkpoint import format
from resm_kernels.files import CONFIG_BYTES, LIST_BYTES, patterns, regular, structure, yaml_text

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
OTHERS = {"--max-lora-rank", "--strace", "--count", "--every-call"}
"""Options of other programs: vLLM's, and those of tests/kills.py."""


def options() -> dict[str, set[str]]:
    """The options of each command."""
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    return {
        name: {"--help", *(option for p in command.params for option in (*p.opts, *p.secondary_opts))}
        for name, command in group.commands.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_commands_options_and_pages_that_are_named_exist(page: Path) -> None:
    text, known = page.read_text(), options()
    mergekits = {name for flag in flags.FLAGS for name in flag.names}
    # Commands are on lines of code, by themselves or as a command that another one runs.
    code = "\n".join([*re.findall(r"^```[^`]*^```", text, re.MULTILINE), *re.findall(r"`[^`\n]+`", text)])
    for command, rest in re.findall(r"(?:^|`)resm-kernels ([a-z-]+)([^`\n#]*)", code, re.MULTILINE):
        named = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest))
        assert named <= known[command] | (mergekits if command in ("merge", "mergekit") else set()), command
    every = set().union(*known.values(), mergekits, OTHERS)
    if page.name != "migrating.md":  # whose flags of mergekit's test_docs_api.py compares with mergekit
        assert set(re.findall(r"`(--[a-z][a-z-]*)", text)) <= every
    if page.name in ("adapters_table.md", "architectures.md", "extractions.md"):
        return  # large tables without links
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


def test_every_page_is_linked() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    pages = {page.name for page in PAGES if page.parent.name == "docs"} - {"index.md"}  # the site's home
    assert not {name for name in pages if not re.search(rf"\([^)\s]*{name}", text)}


def test_targets_of_make_are_declared_and_described() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (declared,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    targets = re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE)
    assert sorted(set(targets)) == sorted(declared.split())
    named = "\n".join(page.read_text() for page in PAGES)
    described = re.findall(r"^# .*\n(?:[A-Z]+ \?= .*\n|ifdef .*\n)*([a-z][a-z-]*):", makefile, re.MULTILINE)
    assert not {t for t in targets if f"make {t}" not in named} - {*described, "clean"}


def test_limits_of_files_are_those_of_the_code() -> None:
    text = (ROOT / "docs/recipes.md").read_text().partition("\n## Limits\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    nesting = f"{yaml_text.MAX_DOCUMENTS} documents; {yaml_text.MAX_DEPTH} levels of nesting"
    assert f"{yaml_text.MAX_BYTES >> 10} KiB in UTF-8; {nesting}; {yaml_text.MAX_VALUES:,} values" in rows["recipe"]
    values = f"{structure.MAX_DEPTH} levels; {structure.MAX_VALUES // 10**6} million values"
    assert f"{CONFIG_BYTES >> 20} MiB in UTF-8; {values}" in rows["`config.json` and other configurations"]
    header = rows["headers and indices of safetensors"]
    assert header.startswith(f"{LIST_BYTES // 10**6} MB,") and f"names of {format.MAX_NAME} letters" in header
    assert f"; {format.MAX_DIMENSIONS} dimensions;" in header
    assert rows["files that are copied, such as tokenizers"] == f"{regular.COPY_BYTES >> 20} MiB each"
    assert rows["numbers"].startswith(f"{structure.MAX_DIGITS} digits")
    assert rows["paths"].startswith(f"names of {regular.MAX_NAME} bytes, paths of {regular.MAX_PATH} bytes")
    assert f"of {patterns.MAX_LENGTH} letters" in rows["`rank_pattern`, `alpha_pattern`"]
