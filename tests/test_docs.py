"""The documentation names commands, options and pages that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from resm_kernels import cli, flags

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
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


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_options_and_pages_that_are_named_exist(page: Path) -> None:
    text, known = page.read_text(), options()
    mergekits = {name for flag in flags.FLAGS for name in flag.names}
    # Commands are on lines of code, by themselves or as a command that another one runs.
    code = "\n".join([*re.findall(r"^```[^`]*^```", text, re.MULTILINE), *re.findall(r"`[^`\n]+`", text)])
    for command, rest in re.findall(r"(?:^|`)resm-kernels ([a-z-]+)([^`\n#]*)", code, re.MULTILINE):
        named = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest))
        assert named <= known[command] | (mergekits if command in ("merge", "mergekit") else set()), command
    every = set().union(*known.values(), mergekits, OTHERS)
    assert set(re.findall(r"`(--[a-z][a-z-]*)", text)) <= every
    if page.name in ("adapters_table.md", "architectures.md", "extractions.md"):
        return  # large tables without links
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


def test_every_page_is_linked() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    unlinked = [
        page.name for page in PAGES if page.parent.name == "docs" and not re.search(rf"\([^)\s]*{page.name}", text)
    ]
    assert not unlinked


def test_targets_of_make_are_declared_and_described() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (declared,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    targets = re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE)
    assert sorted(set(targets)) == sorted(declared.split())
    named = "\n".join(page.read_text() for page in PAGES)
    described = re.findall(r"^# .*\n(?:[A-Z]+ \?= .*\n|ifdef .*\n)*([a-z][a-z-]*):", makefile, re.MULTILINE)
    assert not {t for t in targets if f"make {t}" not in named} - {*described, "clean"}
