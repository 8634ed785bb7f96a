"""Every code block of the documentation runs, in the order of its page, with tiny models under the names it uses.

A block has a language: `python` runs in one namespace a page; `yaml` is read as a recipe, and merged if no command
of the page does so; commands of `bash` run in this process; `json`, `jsonl` and `toml` are parsed; `text` and `cpp`
are not for machines. The first line of a block of YAML, Python or JSON may name its file (`# space.yaml`).

A comment before a block says what else holds: `<!-- not run: REASON -->` for what cannot run here, whose syntax is
checked all the same, and `<!-- excerpt of FILE -->` for lines that stand in a file of the repository.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from conftest import RunCommand, UseThreads

from resm_kernels import _version

pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
sybil = pytest.importorskip("sybil", reason="sybil is not installed (test extra)")
pytest.importorskip("peft", reason="peft is not installed (peers extra)")

from docs_place import DEPTHS, ROOT, given, make_shelf, set_up  # noqa: E402
from sybil import Document, Example, Region, Sybil  # noqa: E402
from sybil.evaluators.python import PythonEvaluator  # noqa: E402
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer  # noqa: E402

from resm_kernels.calibrate import read_prompts  # noqa: E402
from resm_kernels.engine import merge_checkpoints  # noqa: E402
from resm_kernels.recipe import load_recipe  # noqa: E402
from resm_kernels.search import load_space  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

PAGES: Final = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").glob("*/README.md"),
    ]
)
LANGUAGES: Final = ("python", "yaml", "bash", "json", "jsonl", "toml", "text", "cpp")
REASONS: Final = (
    "needs the hub",
    "needs a model of 8 billion weights",
    "installs packages",
    "another program",
    "trains for minutes",
)
"""Why a block may not run here."""
MOST_NOT_RUN: Final = 10
LESS: Final = {
    **{"--trials": "2", "--questions": "4", "--prefix": "2", "--polish-steps": "2"},
    **{"-j": "1", "--threads": "1"},
}
"""Smaller numbers that options get here, to save time; several threads would only wait for each other."""
MADE: Final = {"merge": 2, "calibrate": 2, "merge-lora": 2, "extract-lora": 2}
"""Commands that make a folder, and the number of the word that names it."""
FENCE: Final = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
NOTE: Final = re.compile(r"<!-- (not run: |excerpt of )([^>]*?) -->\s*\Z")
FILE: Final = re.compile(r"(?:#|//) ([\w./-]+\.(?:yaml|py|jsonl?))\b")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with what the comment before it says."""

    language: str
    source: str
    reason: str = ""
    excerpt: str = ""

    @property
    def file(self) -> str:
        """The name of the file that the block is, or "" if it says none."""
        named = FILE.match(self.source)
        return named[1] if named else ""


class Parser:
    """sybil's parser of all fenced blocks, whatever their language."""

    def __init__(self, evaluate: Callable[[Example], str | None]) -> None:
        self._lexer = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[\w+]*)(?P<rest>[^\n]*)\n"))
        self._evaluate = evaluate

    def __call__(self, document: Document) -> Iterable[Region]:
        for region in self._lexer(document):
            lexemes = region.lexemes
            note = NOTE.search(document.text[: region.start])
            said = {} if note is None else {"reason" if note[1].startswith("not") else "excerpt": note[2]}
            block = Block(lexemes["language"], str(lexemes["source"]), **said)
            yield Region(region.start, region.end, (block, lexemes["source"]), self._evaluate)


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    document = Sybil([Parser(lambda _: None)], encoding="utf-8").parse(page)
    return [example.parsed[0] for example in document.examples()]


class Page:
    """Runs the blocks of a page in a folder of its own, which is the current one."""

    def __init__(self, page: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
        self.page, self.run, self.monkeypatch = page, run, monkeypatch
        self.recipes: dict[str, bool] = {}
        self.made: list[Path] = []
        self.python = PythonEvaluator()
        self.started = False

    def evaluate(self, example: Example) -> str | None:
        block, lexeme = example.parsed
        if block.excerpt:
            self.compare(block)
        elif block.reason:
            check_syntax(block)
        elif block.language == "python":
            self.run_python(block, lexeme, example)
        else:
            {"yaml": self.read_recipe, "bash": self.run_commands}.get(block.language, self.write)(block)
        return None

    def finish(self) -> None:
        """Merge by the recipes that no command has used."""
        for file, used in self.recipes.items():
            if not used:
                self.clear(Path("unused"))
                merge_checkpoints(file, "unused")

    def clear(self, out: Path) -> None:
        """Pages show alternatives that write to one folder: each begins without it."""
        shutil.rmtree(out, ignore_errors=True)
        self.made.append(out)

    def compare(self, block: Block) -> None:
        """All lines of an excerpt stand in the file, in this order; … stands for what is left out."""
        lines = iter((ROOT / block.excerpt).read_text().splitlines())
        for line in block.source.splitlines():
            wanted = line.partition("…")[0].rstrip() if "…" in line else line.rstrip()
            found = any(have.startswith(wanted) if "…" in line else have.rstrip() == wanted for have in lines)
            assert found, f"{block.excerpt} has no line {line!r} here"

    def run_python(self, block: Block, lexeme: Any, example: Example) -> None:
        if block.file:
            Path(block.file).write_text(block.source)
            self.monkeypatch.delitem(sys.modules, Path(block.file).stem, raising=False)
            runpy.run_path(block.file)
            return
        for out in self.made:
            shutil.rmtree(out, ignore_errors=True)
        if not self.started:
            example.namespace.update(given(self.page.name))
            self.started = True
        self.use(block.source)
        parsed, example.parsed = example.parsed, lexeme
        self.python(example)
        example.parsed = parsed
        self.made += [Path(out) for out in re.findall(r'"(merged|out|calibrated)"', block.source)]

    def use(self, code: str) -> None:
        for file in self.recipes:
            self.recipes[file] |= file in code

    def read_recipe(self, block: Block) -> None:
        file, text = block.file or "recipe.yaml", block.source
        if "merge_method" not in text:
            text = (
                yaml.safe_dump({"merge_method": "linear", "models": [{"model": "./base"}, {"model": "./chat"}]}) + text
            )
        Path(file).write_text(text)
        if "{range:" in text:
            load_space(file)
        else:
            load_recipe(file)
            self.recipes[file] = False

    def write(self, block: Block) -> None:
        check_syntax(block)
        if block.file or block.language == "json":
            Path(block.file or "machine.json").write_text(block.source)
        if block.language == "jsonl":
            Path("shown.jsonl").write_text(block.source)
            assert len(read_prompts(Path("shown.jsonl"))) == len(block.source.splitlines())

    def run_commands(self, block: Block) -> None:
        for words in commands(block.source):
            if words[:3] == ["python", "-m", "resm_kernels"]:
                words = ["resm-kernels", *words[3:]]
            if words[0] != "resm-kernels":
                check_command(words)
                continue
            for i, word in enumerate(words[:-1]):
                words[i + 1] = LESS.get(word, words[i + 1])
            if words[1] in MADE:
                self.clear(Path(words[1 + MADE[words[1]]]))
            self.use(" ".join(words))
            code, _, err = self.run(*words[1:])
            assert code == 0, f"{shlex.join(words)}: {err}"


def commands(source: str) -> Iterator[list[str]]:
    """The words of each command, without comments."""
    for line in source.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def check_syntax(block: Block) -> None:
    """Parse what is not run."""
    if block.language == "python":
        ast.parse(block.source)
    elif block.language == "yaml":
        list(yaml.safe_load_all(block.source))
    elif block.language == "json":
        json.loads(block.source)
    elif block.language == "jsonl":
        for line in block.source.splitlines():
            json.loads(line)
    elif block.language == "toml":
        pytest.importorskip("tomllib", reason="Python 3.11 has tomllib").loads(block.source)
    elif block.language == "bash":
        for words in commands(block.source):
            check_command(words)


def check_command(words: list[str]) -> None:
    """Check the words of a command that would take long or change this installation."""
    program, *rest = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)] or [""]
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert targets and set(rest) <= set(targets[1].split()), words
    elif program == "python" and rest[:1] == ["-m"]:
        check_module(rest[1], rest[2:])
    elif program == "python" and rest[:1] == ["-c"]:
        compile(rest[1], "a command", "exec")
    elif program == "python":
        parse_arguments(ROOT / rest[0], rest)
    elif program == "pip":
        check_pip(rest)


def check_module(module: str, arguments: list[str]) -> None:
    """Let a module of the repository read its arguments, and nothing more."""
    if module == "pytest":
        assert all((ROOT / a.partition("::")[0]).exists() for a in arguments if not a.startswith("-")), arguments
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    parse_arguments(Path(spec.origin), [module, *arguments])


class Parsed(BaseException):
    """Raised when a program has read its arguments."""


def parse_arguments(file: Path, argv: list[str]) -> None:
    """Run a program up to where its arguments are read; it is an error if it refuses them."""
    if "parse_args" not in file.read_text():
        assert len(argv) == 1, f"{file.name} takes no arguments"
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(self, *arguments)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
        patch.setattr(sys, "argv", argv)
        with pytest.raises(Parsed):
            runpy.run_path(str(file), run_name="__main__")


def check_pip(arguments: list[str]) -> None:
    """The extras and the files that pip is told of are the repository's."""
    text = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"(?:resm-kernels|\.)\[([\w,]+)\]", " ".join(arguments)):
        assert all(re.search(rf"^{name} = \[", text, re.MULTILINE) for name in extra.split(",")), extra
    for argument in arguments:
        if argument.startswith("dist/"):
            assert argument.startswith(f"dist/resm_kernels-{_version.__version__}+"), argument
        elif argument.startswith("torch=="):
            assert argument in (ROOT / "constraints.txt").read_text().splitlines()
        elif "/" in argument or argument.endswith(".txt"):
            assert (ROOT / argument).exists(), argument


@pytest.fixture(scope="module")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with the models, adapters and prompts of a page."""
    root = tmp_path_factory.mktemp("docs")

    def shelf(page: str) -> Path:
        folder = root / str(DEPTHS.get(page, 2))
        return folder if folder.exists() else make_shelf(folder, DEPTHS.get(page, 2))

    return shelf


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=name_of)
def test_blocks_run(
    page: Path,
    shelves: Callable[[str], Path],
    tmp_path: Path,
    run: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
    use_threads: UseThreads,
) -> None:
    use_threads(1)  # which a block may change
    set_up(shelves(page.name), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for block in blocks_of(ROOT / "docs" / "search.md"):  # README names the files that this page shows
        if block.file:
            Path(block.file).write_text(block.source)
    runner = Page(page, run, monkeypatch)
    document = Sybil([Parser(runner.evaluate)], encoding="utf-8").parse(page)
    for example in document.examples():
        example.evaluate()
    runner.finish()


def test_every_block_has_a_language_and_few_do_not_run() -> None:
    reasons = []
    for page in PAGES:
        blocks = blocks_of(page)
        assert len(FENCE.findall(page.read_text())) == 2 * len(blocks), page
        for block in blocks:
            assert block.language in LANGUAGES, f"{name_of(page)}: {block.source}"
            reasons += [block.reason] if block.reason else []
    assert all(reason.startswith(REASONS) for reason in reasons), reasons
    assert len(reasons) <= MOST_NOT_RUN


INLINE: Final = re.compile(r"`((?:\.venv/bin/)?(?:python|make|pip) [^`\n]+)`")


@pytest.mark.parametrize("page", [page for page in PAGES if INLINE.search(page.read_text())], ids=name_of)
def test_commands_in_sentences_are_right(page: Path) -> None:
    for line in INLINE.findall(page.read_text()):
        for words in commands(line):
            check_command(words)
